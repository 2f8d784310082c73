"""Compares loaders of token windows from a bucket: this project's, mosaicml-streaming, litdata, and raw range reads.

    python -m bench.loader [--rounds=3] [--million-tokens=64] [--sides=raw,ours,streaming,litdata] [--out=FILE]

An S3 server on loopback holds the same tokens in the format of each side. A side runs as a process with an empty cache.
A batch is 64 random windows of 1024 tokens. The figures of a side:

    first batch       seconds without imports, and seconds with the imports of the libraries of the side and the store
    first pass        tokens/s, downloads included
    second pass       tokens/s
    tokens per CPU s  in both passes; on a shared machine, CPU seconds are more reliable than wall-clock time

streaming and litdata are not dependencies of this project. To install them: `pip install --no-deps mosaicml-streaming
litdata` and the packages that their imports then miss.
"""

import argparse
import importlib.abc
import importlib.machinery
import os
import resource
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from bench import harness, tokens
from core import storage
from core.data import manifest
from core.figures import quantity

LENGTH, BATCH = 1024, 64
SHARD_TOKENS = 4 << 20
ROOT = f"s3://{harness.BUCKET}"


class _Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Replaces packages that streaming and litdata import but do not need for tokens."""

    def find_spec(self, name: str, path: object, target: object = None) -> importlib.machinery.ModuleSpec | None:
        absent = name.split(".")[0] in ("transformers", "torchvision")
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if absent else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = types.ModuleType(spec.name)

        def attribute(name: str) -> type:
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {})

        module.__getattr__ = attribute
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


# --- the dataset, in three formats -----------------------------------------------------------------------------


def write_ours(shards: int, folder: Path) -> None:
    train = (tokens.random_ids(SHARD_TOKENS, seed) for seed in range(shards))
    tokens.write(f"{ROOT}/ours", {"train": train})


def write_streaming(shards: int, folder: Path) -> None:
    from streaming import MDSWriter

    with MDSWriter(out=str(folder), columns={"tokens": "ndarray:uint16"}, size_limit=2 * SHARD_TOKENS) as writer:
        for number in range(shards):
            for window in tokens.random_ids(SHARD_TOKENS, number).reshape(-1, LENGTH):
                writer.write({"tokens": window})
    upload(folder, "streaming")


def write_litdata(shards: int, folder: Path) -> None:
    import torch
    from litdata import TokensLoader
    from litdata.streaming.writer import BinaryWriter

    writer = BinaryWriter(cache_dir=str(folder), chunk_bytes=2 * SHARD_TOKENS, item_loader=TokensLoader(LENGTH))
    for number in range(shards):
        for row, window in enumerate(tokens.random_ids(SHARD_TOKENS, number).astype(np.int32).reshape(-1, 1 << 16)):
            writer[number * SHARD_TOKENS // (1 << 16) + row] = torch.from_numpy(window.astype(np.int16))
    writer.done()
    writer.merge()
    upload(folder, "litdata")


WRITERS = {"ours": write_ours, "raw": write_ours, "streaming": write_streaming, "litdata": write_litdata}


def upload(folder: Path, name: str) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            storage.write_file(f"{ROOT}/{name}/{path.relative_to(folder)}", path)


# --- the sides: each yields the batches of pass after pass, and None after each pass ----------------------------


def ours(cache: Path) -> Iterator[object]:
    import torch

    from trainer.data.cache import ShardCache
    from trainer.data.loader import Batches, TokenSource

    shards = ShardCache(f"{ROOT}/ours", manifest.read(f"{ROOT}/ours"), "train", cache, 1e12)
    source = TokenSource(shards, LENGTH, seed=1, shards_mixed=4)
    each = Batches(source, 0, BATCH, BATCH, 0, 1, 8, torch.device("cpu"), fetches=True)
    while True:
        for _ in range(source.order.windows // BATCH):
            yield next(each)
        yield None


def streaming(cache: Path) -> Iterator[object]:
    from streaming import StreamingDataset
    from torch.utils.data import DataLoader

    data = StreamingDataset(remote=f"{ROOT}/streaming", local=str(cache), shuffle=True, batch_size=BATCH)
    while True:
        yield from DataLoader(data, batch_size=BATCH, drop_last=True)
        yield None


def litdata(cache: Path) -> Iterator[object]:
    from litdata import StreamingDataLoader, StreamingDataset, TokensLoader

    data = StreamingDataset(
        f"{ROOT}/litdata", cache_dir=str(cache), item_loader=TokensLoader(LENGTH), shuffle=True, drop_last=True
    )
    while True:
        yield from StreamingDataLoader(data, batch_size=BATCH)
        yield None


def raw(cache: Path) -> Iterator[object]:
    """Reads the same bytes by range reads of 8 MB, four at a time."""
    objects = [info for info in storage.list_objects(f"{ROOT}/ours") if info.uri.endswith(".bin")]
    ranges = [(o.uri, a, min(a + (8 << 20), o.size)) for o in objects for a in range(0, o.size, 8 << 20)]
    with ThreadPoolExecutor(4) as pool:
        while True:
            for data in pool.map(lambda each: storage.read_range(*each), ranges):
                yield from [data] * (len(data) // (2 * LENGTH * BATCH))
            yield None


SIDES = {"ours": ours, "streaming": streaming, "litdata": litdata, "raw": raw}
OBSTORE = "core.stores.remote"
LIBRARIES = {
    "ours": ("trainer.data.loader", OBSTORE),
    "streaming": ("streaming", "boto3"),
    "litdata": ("litdata", "boto3"),
    "raw": ("core.storage", OBSTORE),
}


def run_side(name: str, dataset_tokens: int) -> dict[str, float]:
    """Measure one side in this process: first batch, first pass, second pass."""
    importlib.import_module("torch")
    harness.touch_pages(2 * dataset_tokens)
    begun = time.perf_counter()
    for library in LIBRARIES[name]:
        importlib.import_module(library)
    with tempfile.TemporaryDirectory() as cache:
        cpu, started = _cpu_seconds(), time.perf_counter()
        batches = SIDES[name](Path(cache))
        next(batches)
        now = time.perf_counter()
        found = {"first_batch": now - started, "first_batch_with_imports": now - begun}
        for number in (1, 2):
            count = 1 if number == 1 else 0
            since = started if number == 1 else time.perf_counter()
            while next(batches) is not None:
                count += 1
            found[f"pass_{number}"] = count * BATCH * LENGTH / (time.perf_counter() - since)
            found["tokens"] = found.get("tokens", 0) + count * BATCH * LENGTH
        found["cpu_seconds"] = _cpu_seconds() - cpu
    return found


def _cpu_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def main() -> None:
    parser = harness.options(__doc__, rounds=3)
    parser.add_argument("--million-tokens", type=float, default=64)
    parser.add_argument("--sides", default="raw,ours,streaming,litdata")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    options = parser.parse_args()
    sys.meta_path.insert(0, _Absent())
    shards = max(1, round(options.million_tokens * 1e6 / SHARD_TOKENS))
    if options.side:
        harness.say(options.side, **run_side(options.side, shards * SHARD_TOKENS))
        os._exit(0)  # exit without cleanup, because daemon threads of the libraries delay a normal exit
    with harness.s3_server() as (folder, _):
        for write in dict.fromkeys(WRITERS[side] for side in options.sides.split(",")):
            write(shards, folder / write.__name__)
        runs = harness.interleaved({side: _process(side, options) for side in options.sides.split(",")}, options.rounds)
    results = {
        **harness.header("numpy", "mosaicml-streaming", "litdata", "obstore"),
        "tokens": shards * SHARD_TOKENS,
        "rounds": options.rounds,
        "median": harness.medians(runs),
    }
    harness.finish(results, show, options.out)


def _process(side: str, options: argparse.Namespace) -> Callable[[int], dict[str, float]]:
    module = [sys.executable, "-m", "bench.loader", f"--side={side}", f"--million-tokens={options.million_tokens}"]
    return lambda _: harness.measured(module)


def show(results: dict) -> None:
    rows = []
    for side, run in results["median"].items():
        rates = [quantity(run["pass_1"]), quantity(run["pass_2"]), quantity(run["tokens"] / run["cpu_seconds"])]
        rows.append([side, f"{run['first_batch']:.3f}", f"{run['first_batch_with_imports']:.3f}", *rates])
    title = f"{quantity(results['tokens'])} tokens, {results['machine']['cores']} cores, medians of {results['rounds']}"
    heads = ("side", "first batch s", "with imports s", "first pass tokens/s", "second pass tokens/s")
    harness.print_table(title, (*heads, "tokens per CPU s"), rows)


if __name__ == "__main__":
    main()
