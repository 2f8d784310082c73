"""Compares checkpoints: seconds in which training is blocked, seconds to store, and seconds to restore.

    python -m bench.checkpoint --scratch=/tmp/bench [--rounds=5] [--layers=12] [--out=FILE]

The state is GPT-2 124M with AdamW's moments in float32, on one rank. `copy` copies the same bytes into allocated
memory. This is the lower bound of the blocked time. `put` writes the same bytes to the same store. This is the lower
bound of the background time. `ours` is the trainer's Saver; `torch.save` and DCP are called as their documentation
says. CPU seconds are those of this process. The table shows medians.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from bench import harness
from core import storage
from core.settings.training import CheckpointConfig, ModelConfig, OptimizerConfig
from trainer.checkpoint.load import load_newest
from trainer.checkpoint.save import Saver
from trainer.distributed import process_group
from trainer.model.gpt import GPT
from trainer.optim.optimizer import BlockOptimizer

Side = Callable[[int], dict[str, float]]


def main() -> None:
    parser = harness.options(__doc__, rounds=5)
    parser.add_argument("--scratch", type=Path, required=True, help="existing folder for files, about 8 GB")
    parser.add_argument("--layers", type=int, default=12, help="number of layers; fewer give a smaller checkpoint")
    options = parser.parse_args()
    ranks = process_group.start("cpu")
    model = GPT(ModelConfig(layers=options.layers))
    model.initialise(0)
    optimizer = BlockOptimizer(model, OptimizerConfig(), 0, 1)
    with harness.s3_server(options.scratch) as (folder, _):
        # The first round only touches memory and fills caches, and is not counted.
        runs = harness.interleaved(_sides(folder, ranks, optimizer), options.rounds, warm_up=1)
    process_group.stop()
    results = {
        **harness.header("torch"),
        "bytes": sum(rows.nbytes for _, rows in optimizer.blocks()),
        "rounds": options.rounds,
        "median": harness.medians(runs),
    }
    harness.finish(results, show, options.out)


@contextmanager
def _timed(into: dict[str, float], name: str) -> Iterator[None]:
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    into[name] = time.perf_counter() - wall
    into[f"{name}_cpu"] = time.process_time() - cpu


def _sides(folder: Path, ranks, optimizer: BlockOptimizer) -> dict[str, Side]:
    blocks = dict(optimizer.blocks())
    size = sum(rows.nbytes for rows in blocks.values())
    buffers = {key: torch.empty_like(rows) for key, rows in blocks.items()}
    savers = {
        url: Saver(url, 1, ranks, CheckpointConfig(), None, lambda: True, optimizer.blocks)
        for url in (str(folder / "ours"), "s3://bench/ours")
    }
    payload = savers["s3://bench/ours"].staged.data

    def copy(_: int) -> dict[str, float]:
        found: dict[str, float] = {}
        with _timed(found, "blocked"):
            for key, rows in blocks.items():
                buffers[key].copy_(rows)
        return found

    def ours(url: str, number: int) -> dict[str, float]:
        found: dict[str, float] = {}
        step = number + 1
        with _timed(found, "total"):
            with _timed(found, "blocked"):
                savers[url].begin(step, {"step": step})
            savers[url].finish(step)
        with _timed(found, "restore"):
            load_newest(url, optimizer, ranks)
        return found

    def torch_save(_: int) -> dict[str, float]:
        found: dict[str, float] = {}
        path = folder / "torch.pt"
        with _timed(found, "total"), path.open("wb") as file:
            torch.save(blocks, file)
            file.flush()
            os.fsync(file.fileno())
        found |= {"blocked": found["total"], "blocked_cpu": found["total_cpu"]}
        with _timed(found, "restore"):
            for key, rows in torch.load(path, weights_only=True).items():
                blocks[key].copy_(rows)
        return found

    def dcp_async(_: int) -> dict[str, float]:
        found: dict[str, float] = {}
        path = folder / "dcp"
        shutil.rmtree(path, ignore_errors=True)
        with _timed(found, "total"):
            with _timed(found, "blocked"):
                future = dcp.async_save(blocks, checkpoint_id=path)
            future.result()
        with _timed(found, "restore"):
            dcp.load(blocks, checkpoint_id=path)
        return found

    def put(url: str, _: int) -> dict[str, float]:
        found: dict[str, float] = {}
        with _timed(found, "total"):
            storage.write_bytes(url, payload)
        return found

    def on_touched_pages(side: Callable, *arguments: str) -> Side:
        def measure(number: int) -> dict[str, float]:
            # The files that a side writes take memory of the page cache. This memory is used once before the side is
            # measured.
            harness.touch_pages(size)
            return side(*arguments, number)

        return measure

    return {
        "copy": copy,
        "ours, local": on_touched_pages(ours, str(folder / "ours")),
        "ours, S3": on_touched_pages(ours, "s3://bench/ours"),
        "torch.save, local": on_touched_pages(torch_save),
        "DCP async, local": on_touched_pages(dcp_async),
        "put, local": on_touched_pages(put, str(folder / "put")),
        "put, S3": on_touched_pages(put, "s3://bench/put"),
    }


def show(results: dict) -> None:
    gigabytes, copy = results["bytes"] / 1e9, results["median"]["copy"]["blocked"]
    rows = []
    for name, run in results["median"].items():
        blocked, total = run.get("blocked"), run.get("total")
        rows.append(
            [
                name,
                "" if blocked is None else f"{blocked:.3f}",
                "" if blocked is None else f"{blocked / copy:.1f}",
                "" if total is None else f"{total:.2f}",
                "" if total is None else f"{run['total_cpu'] / gigabytes:.2f}",
                f"{run['restore']:.2f}" if "restore" in run else "",
            ]
        )
    title = f"{gigabytes:.2f} GB, torch {results['versions']['torch']}, {results['machine']['cores']} cores, "
    heads = ("side", "blocked s", "x copy", "total s", "CPU s per GB", "restore s")
    harness.print_table(f"{title}medians of {results['rounds']}", heads, rows)


if __name__ == "__main__":
    main()
