"""Loading token windows from a bucket: ours beside mosaicml-streaming and litdata, and beside raw range reads.

    python -m bench.loader [--rounds=3] [--million-tokens=64] [--sides=raw,ours,streaming,litdata] [--out=FILE]

The same tokens in the same bucket of a real S3 server on loopback, each side in its own format and in a process of
its own with an empty cache: seconds to the first batch, tokens/s of the first pass (downloads included) and of the
second one. Two clocks for the first batch, both from before any client of the store exists: from when numpy and
torch are imported, and from when the side's own library and its store's are imported as well. Batches are 64 random
windows of 1024 tokens. CPU seconds are the side's own, over both passes: on a machine that is shared they say more
than the clock. The other two are not dependencies: `pip install --no-deps mosaicml-streaming litdata` and what they
ask for.
"""

import argparse
import hashlib
import importlib.abc
import importlib.machinery
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from bench import record
from core import storage
from core.data import manifest
from core.data.manifest import Manifest, ShardEntry, Split, TokenizerInfo
from core.data.shard import shard_bytes
from core.figures import quantity
from demo.s3_server import S3Server

LENGTH, BATCH = 1024, 64
SHARD_TOKENS = 4 << 20
ROOT = "s3://bench"


class _Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stands in for packages that streaming and litdata import but do not need for tokens."""

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


# --- the token set, in three formats ---------------------------------------------------------------------------


def tokens_of(shard: int) -> np.ndarray:
    return np.random.default_rng(shard).integers(0, 50257, SHARD_TOKENS, dtype=np.uint16)


def write_ours(shards: int) -> None:
    entries = []
    for number in range(shards):
        data = shard_bytes(tokens_of(number))
        entries.append(ShardEntry(f"train/{number:05d}.bin", SHARD_TOKENS, len(data), hashlib.sha256(data).hexdigest()))
        storage.write_bytes(f"{ROOT}/ours/{entries[-1].name}", data)
    splits = {"train": Split(shards * SHARD_TOKENS, 1, tuple(entries))}
    manifest.write(f"{ROOT}/ours", Manifest(TokenizerInfo("gpt2", 50257, 50256, "none", "0"), {}, {}, splits))


def write_streaming(shards: int, folder: Path) -> None:
    from streaming import MDSWriter

    with MDSWriter(out=str(folder), columns={"tokens": "ndarray:uint16"}, size_limit=2 * SHARD_TOKENS) as writer:
        for number in range(shards):
            for window in tokens_of(number).reshape(-1, LENGTH):
                writer.write({"tokens": window})
    upload(folder, "streaming")


def write_litdata(shards: int, folder: Path) -> None:
    import torch
    from litdata import TokensLoader
    from litdata.streaming.writer import BinaryWriter

    writer = BinaryWriter(cache_dir=str(folder), chunk_bytes=2 * SHARD_TOKENS, item_loader=TokensLoader(LENGTH))
    for number in range(shards):
        for row, window in enumerate(tokens_of(number).astype(np.int32).reshape(-1, 1 << 16)):
            writer[number * SHARD_TOKENS // (1 << 16) + row] = torch.from_numpy(window.astype(np.int16))
    writer.done()
    writer.merge()
    upload(folder, "litdata")


def upload(folder: Path, name: str) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            storage.write_file(f"{ROOT}/{name}/{path.relative_to(folder)}", path)


# --- the sides: batches of one epoch, from the start -----------------------------------------------------------


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
    """The same bytes by range reads of 8 MB, four at a time, and nothing else."""
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


def run_side(name: str, tokens: int) -> dict[str, float]:
    """One side in this process, over a set of so many tokens: first batch, first pass, second pass."""
    importlib.import_module("torch")
    record.touch_pages(2 * tokens)
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
    options = _options()
    sys.meta_path.insert(0, _Absent())
    shards = max(1, round(options.million_tokens * 1e6 / SHARD_TOKENS))
    if options.side:
        print(json.dumps(run_side(options.side, shards * SHARD_TOKENS)), flush=True)
        os._exit(0)  # daemon threads of any side
    sides = options.sides.split(",")
    with tempfile.TemporaryDirectory() as folder, S3Server(Path(folder) / "s3") as server:
        os.environ.update(server.environment())
        server.make_bucket("bench")
        write_ours(shards)
        if "streaming" in sides:
            write_streaming(shards, Path(folder) / "mds")
        if "litdata" in sides:
            write_litdata(shards, Path(folder) / "litdata")
        runs: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
        for _ in range(options.rounds):
            for side in sides:
                command = [
                    sys.executable,
                    "-m",
                    "bench.loader",
                    f"--side={side}",
                    f"--million-tokens={options.million_tokens}",
                ]
                output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                runs[side].append(json.loads(output.splitlines()[-1]))
    medians = {
        side: {key: statistics.median(run[key] for run in all_runs) for key in all_runs[0]}
        for side, all_runs in runs.items()
    }
    results = {
        **record.header("numpy", "mosaicml-streaming", "litdata", "obstore"),
        "tokens": shards * SHARD_TOKENS,
        "rounds": options.rounds,
        "median": medians,
    }
    _show(results)
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--million-tokens", type=float, default=64)
    parser.add_argument("--sides", default="raw,ours,streaming,litdata")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def _show(results: dict) -> None:
    title = f"{quantity(results['tokens'])} tokens, {results['machine']['cores']} cores, medians of {results['rounds']}"
    firsts = ("first batch s", "with imports s")
    table = Table("side", *firsts, "first pass tokens/s", "second pass tokens/s", "tokens per CPU s", title=title)
    for side, run in results["median"].items():
        rates = [quantity(run["pass_1"]), quantity(run["pass_2"]), quantity(run["tokens"] / run["cpu_seconds"])]
        table.add_row(side, f"{run['first_batch']:.3f}", f"{run['first_batch_with_imports']:.3f}", *rates)
    Console().print(table)


if __name__ == "__main__":
    main()
