"""Data preparation side by side: ours against the two usual ways, end to end and encoding alone.

    python -m bench.prep --scratch=/tmp/bench-prep [--megabytes=300] [--rounds=3] [--out=bench/results/DATE-prep.json]

End to end: parquet in a bucket of a real S3 server on loopback → token shards in that bucket, on all cores of this
machine, which the server shares. Sides are interleaved; medians are printed, with the peak memory of the whole
process tree (proportional set size) and the CPU time of the S3 server, which counts against everyone. `read` is
the limit: our reader alone. Text: bench/corpus.py. The vocabulary comes from VOCAB_URL.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench import corpus
from core import manifest, storage
from core.console import quantity
from demo.s3_server import S3Server

SAMPLE_SECONDS = 0.1
BUCKET = "bench"


def main() -> None:
    options = _options()
    files = corpus.parquet_files(options.scratch, options.megabytes)
    larger = corpus.parquet_files(options.scratch, 4 * options.megabytes) if options.larger else []
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder, S3Server(Path(folder)) as server:
        server.make_bucket(BUCKET)
        os.environ.update(server.environment())
        for name, paths in (("source", files), ("larger", larger)):
            for path in paths:
                storage.write_file(f"s3://{BUCKET}/{name}/{path.name}", path)
        results = _end_to_end(options, server)
        results["encode"] = _encode_only(options, files)
        if larger:
            results["larger"] = [_run(_ours("larger", "set-larger"), server)]
            results["larger_text_bytes"] = manifest.read(f"s3://{BUCKET}/set-larger").stats["text_bytes"]
    _show(results)
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True, help="folder for the text, kept between runs")
    parser.add_argument("--megabytes", type=int, default=300, help="text in MB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sides", default="ours,fineweb,map,read")
    parser.add_argument("--larger", action="store_true", help="also ours with four times the text, for its memory")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    return parser.parse_args()


def _end_to_end(options: argparse.Namespace, server: S3Server) -> dict:
    runs: dict[str, list[dict]] = {side: [] for side in options.sides.split(",")}
    for number in range(options.rounds):
        for side in runs:
            target = f"set-{side}-{number}"
            command = _ours("source", target) if side == "ours" else _rival(side, target)
            runs[side].append(_run(command, server))
            print(f"round {number + 1}, {side}: {runs[side][-1]['seconds']:.1f} s", file=sys.stderr)
    stats = manifest.read(f"s3://{BUCKET}/set-ours-0").stats
    return {
        "date": date.today().isoformat(),
        "machine": {"cores": os.cpu_count(), "python": platform.python_version(), "system": platform.platform()},
        "text_bytes": stats["text_bytes"],
        "tokens": stats["tokens"],
        "documents": stats["documents"],
        "parquet_bytes": sum(info.size for info in storage.list_objects(f"s3://{BUCKET}/source")),
        "runs": runs,
    }


def _ours(source: str, target: str) -> list[str]:
    flags = [f"--source.url=s3://{BUCKET}/{source}/*.parquet", f"--data.url=s3://{BUCKET}/{target}"]
    return [sys.executable, "-m", "data_prep.prepare", *flags, "--data.part_bytes=8000000"]


def _rival(side: str, target: str) -> list[str]:
    return [sys.executable, "-m", "bench.prep_rivals", side, f"s3://{BUCKET}/source", f"s3://{BUCKET}/{target}"]


def _run(command: list[str], server: S3Server) -> dict:
    """Run one side; its wall seconds, the peak memory of its process tree, and the server's CPU seconds."""
    server_before = _cpu_seconds(server._process.pid)
    with tempfile.TemporaryFile() as output:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
        peak = 0
        while process.poll() is None:
            peak = max(peak, _tree_bytes(process.pid))
            time.sleep(SAMPLE_SECONDS)
        seconds = time.perf_counter() - started
        if process.returncode:
            output.seek(0)
            raise SystemExit(f"{' '.join(command)} failed:\n{output.read().decode()}")
    server_cpu = _cpu_seconds(server._process.pid) - server_before
    return {"seconds": seconds, "peak_bytes": peak, "server_cpu_seconds": server_cpu}


def _tree_bytes(session: int) -> int:
    """Proportional set size of all processes of a session: shared pages count once."""
    total = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rsplit(")", 1)[1].split()[3]) == session:
                rollup = (stat.parent / "smaps_rollup").read_text()
                total += next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:")) << 10
        except (OSError, StopIteration):  # ended while we looked
            continue
    return total


def _cpu_seconds(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
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
    table = Table("end to end", "seconds", "tokens/s", "MB/s of text", "peak memory", "S3 server CPU s", title=title)
    for side, runs in results["runs"].items():
        seconds = statistics.median(run["seconds"] for run in runs)
        table.add_row(
            side,
            f"{seconds:.1f}",
            quantity(tokens / seconds),
            f"{text / 1e6 / seconds:.1f}",
            f"{max(run['peak_bytes'] for run in runs) / 1e6:.0f} MB",
            f"{statistics.median(run['server_cpu_seconds'] for run in runs):.1f}",
        )
    for run in results.get("larger", []):
        size = results["larger_text_bytes"]
        table.add_row(
            f"ours, {size / 1e6:.0f} MB",
            f"{run['seconds']:.1f}",
            "",
            f"{size / 1e6 / run['seconds']:.1f}",
            f"{run['peak_bytes'] / 1e6:.0f} MB",
            f"{run['server_cpu_seconds']:.1f}",
        )
    console = Console()
    console.print(table)
    table = Table("encode only", "seconds", "tokens/s", "MB/s of text")
    for side, all_seconds in results["encode"].items():
        seconds = statistics.median(all_seconds)
        table.add_row(side, f"{seconds:.2f}", quantity(tokens / seconds), f"{text / 1e6 / seconds:.1f}")
    console.print(table)


if __name__ == "__main__":
    main()
