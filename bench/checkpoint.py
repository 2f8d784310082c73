"""Checkpoints side by side: how long training waits, how long until it is safe, how long to read it back.

    python -m bench.checkpoint --scratch=/tmp/bench [--rounds=5] [--preset=FILE] [--out=FILE]

GPT-2 124M with AdamW's moments, float32, one rank. Sides are interleaved; medians are printed. `copy` is the limit of
the blocking part: one copy of the same bytes into memory that exists. `put` is the limit of the background part: the
same bytes handed to the same store. `ours` is the trainer's own Saver; `torch.save` and DCP are called as their
documentation says. CPU seconds are those of this process.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from rich.console import Console
from rich.table import Table

from bench import record
from core import storage
from core.settings.training import CheckpointConfig, ModelConfig, OptimizerConfig
from demo.s3_server import S3Server
from trainer.checkpoint.load import load_newest
from trainer.checkpoint.save import Saver
from trainer.distributed import process_group
from trainer.model.gpt import GPT
from trainer.optim.optimizer import BlockOptimizer


def main() -> None:
    options = _options()
    os.environ.setdefault("AWS_EC2_METADATA_DISABLED", "true")
    ranks = process_group.start("cpu")
    model = GPT(ModelConfig(layers=options.layers))
    model.initialise(0)
    optimizer = BlockOptimizer(model, OptimizerConfig(), 0, 1)
    size = sum(rows.nbytes for _, rows in optimizer.blocks())
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder, S3Server(Path(folder) / "s3") as server:
        os.environ.update(server.environment())
        server.make_bucket("bench")
        sides = _sides(Path(folder), ranks, optimizer)
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
        for number in range(options.rounds + 1):
            for name, side in sides.items():
                if name != "copy":  # the others fill files
                    record.touch_pages(size)
                measured = side(number + 1)
                if number:  # the first round touches memory and fills caches
                    runs[name].append(measured)
    process_group.stop()
    results = {
        **record.header("torch"),
        "bytes": size,
        "rounds": options.rounds,
        "median": {
            name: {key: statistics.median(run[key] for run in all_runs) for key in all_runs[0]}
            for name, all_runs in runs.items()
        },
    }
    _show(results)
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True, help="existing folder for files, about 8 GB")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=12, help="fewer for a quick look")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    return parser.parse_args()


@contextmanager
def _timed(into: dict[str, float], name: str) -> Iterator[None]:
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    into[name] = time.perf_counter() - wall
    into[f"{name}_cpu"] = time.process_time() - cpu


def _sides(folder: Path, ranks, optimizer: BlockOptimizer) -> dict[str, Callable[[int], dict[str, float]]]:
    blocks = dict(optimizer.blocks())
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

    def ours(url: str) -> Callable[[int], dict[str, float]]:
        def side(step: int) -> dict[str, float]:
            found: dict[str, float] = {}
            with _timed(found, "total"):
                with _timed(found, "blocked"):
                    savers[url].begin(step, {"step": step})
                savers[url].finish(step)
            with _timed(found, "restore"):
                load_newest(url, optimizer, ranks)
            return found

        return side

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

    def put(target: str) -> Callable[[int], dict[str, float]]:
        def side(_: int) -> dict[str, float]:
            found: dict[str, float] = {}
            with _timed(found, "total"):
                storage.write_bytes(target, payload)
            return found

        return side

    return {
        "copy": copy,
        "ours, local": ours(str(folder / "ours")),
        "ours, S3": ours("s3://bench/ours"),
        "torch.save, local": torch_save,
        "DCP async, local": dcp_async,
        "put, local": put(str(folder / "put")),
        "put, S3": put("s3://bench/put"),
    }


def _show(results: dict) -> None:
    gigabytes = results["bytes"] / 1e9
    about = f"torch {results['versions']['torch']}, {results['machine']['cores']} cores, medians of {results['rounds']}"
    title = f"{gigabytes:.2f} GB, {about}"
    table = Table("side", "blocked s", "x copy", "total s", "CPU s per GB", "restore s", title=title)
    copy = results["median"]["copy"]["blocked"]
    for name, run in results["median"].items():
        blocked, total = run.get("blocked"), run.get("total")
        cells = [
            "" if blocked is None else f"{blocked:.3f}",
            "" if blocked is None else f"{blocked / copy:.1f}",
            "" if total is None else f"{total:.2f}",
            "" if total is None else f"{run['total_cpu'] / gigabytes:.2f}",
            f"{run['restore']:.2f}" if "restore" in run else "",
        ]
        table.add_row(name, *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
