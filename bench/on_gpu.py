"""Checks the project on one GPU in a quarter of an hour: functions, exactness and speed. See docs/gpu-check.md.

    python -m bench.on_gpu look --out=FOLDER      3 minutes: versions, steps of two presets, graphs, a profile
    python -m bench.on_gpu exact --out=FOLDER     4 minutes: compiled and plain blocks, kill and resume, determinism
    python -m bench.on_gpu speed --out=FOLDER     5 minutes: MFU beside other trainers, attention kernels, switches
    python -m bench.on_gpu gains --out=FOLDER     3 minutes: steps without one of the optimizations of a step
    python -m bench.on_gpu all --out=FOLDER       all four parts, one after another

Each measurement runs as a separate process and stores each result immediately. FOLDER receives, for each part, a JSON
record, the same as text, and a log of the processes' output. The program continues after a failed measurement. If the
time is over, it names the measurements that it skips. The exit status is 0 if no measurement failed or lacked time. The
program needs torch, numpy, PyYAML and fsspec, but no network: it generates its tokens. --rehearse runs the same
commands on a CPU with small models; its numbers have no meaning.
"""

import argparse
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import TextIO

from bench import harness, tokens
from bench.gpu.parts import MINUTES, PARTS, Place, Skip, shown
from bench.gpu.records import Record

TOKENS, SMALL_TOKENS = 1 << 24, 1 << 16
_PROBLEMS = ("failed", "no time")
NO_TIME = "the time was over before this measurement began; give more time with --minutes"


def main() -> None:
    options = _options()
    _exit_on_signals()
    # A process group of one rank uses loopback, so it does not depend on the machine's network interfaces.
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    if options.rehearse:
        os.environ["OMP_NUM_THREADS"] = "1"  # more threads slow other programs and do not speed up small models
    problems = []
    with tempfile.TemporaryDirectory(prefix="on-gpu-", ignore_cleanup_errors=True) as work:
        data = options.data or str(Path(work) / "tokens")
        if not options.data:
            tokens.make(data, SMALL_TOKENS if options.rehearse else TOKENS, options.text)
        for name in PARTS if options.part == "all" else [options.part]:
            place = Place(data, Path(work) / name, options.out.resolve(), options.rivals, options.rehearse)
            problems += _run(name, place, options)
    if problems:
        sys.exit("\n".join(problems))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*PARTS, "all"])
    parser.add_argument("--out", type=Path, required=True, help="folder for records, logs and traces")
    parser.add_argument("--minutes", type=float, help=f"time limit of each part in minutes; default {MINUTES}")
    parser.add_argument("--rivals", type=_folder, help="folder that holds a checkout of karpathy/nanoGPT")
    parser.add_argument("--data", default="", help="dataset to train on; default: generated tokens")
    parser.add_argument("--text", type=Path, help="file whose bytes are the tokens; default: generated tokens")
    parser.add_argument(
        "--only", default="", help="names of measurements, separated by commas; default: all of the part"
    )
    parser.add_argument("--rehearse", action="store_true", help="run on a CPU, with small models")
    options = parser.parse_args()
    if options.minutes is not None and options.minutes <= 0:
        parser.error(f"--minutes is {options.minutes:g}, must be above 0")
    if options.data and options.text:
        parser.error("--data and --text both say what the tokens are; give one of them")
    if options.only and options.part == "all":
        parser.error(f"--only goes with one part; name one of {', '.join(PARTS)} instead of all")
    if options.data and "://" not in options.data:
        options.data = str(Path(options.data).resolve())
    return options


def _exit_on_signals() -> None:
    """Turn SIGTERM, SIGHUP and SIGINT into SystemExit, so that the processes started here end first."""
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)

    def leave(number: int, _: object) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        sys.exit(128 + number)

    for each in numbers:
        signal.signal(each, leave)


def _folder(text: str) -> Path:
    path = Path(text).resolve()
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is not a folder")
    return path


def _run(name: str, place: Place, options: argparse.Namespace) -> list[str]:
    """Run one part. Returns a sentence for each measurement that failed or lacked time."""
    minutes = options.minutes or MINUTES[name]
    deadline = time.monotonic() + 60 * minutes
    place.work.mkdir()
    command = shown([sys.executable, "-m", "bench.on_gpu", *sys.argv[1:]])
    label = f"gpu-{name}-rehearsal" if options.rehearse else f"gpu-{name}"
    record = Record(place.out, label, command, part=name, rehearsal=options.rehearse, minutes=minutes)
    only, names = {each for each in options.only.split(",") if each}, []
    state = "cut off"
    try:
        with record.path.with_suffix(".log").open("w") as log:
            for measurement, what in PARTS[name](place, record):
                names.append(measurement)
                if not only or measurement in only:
                    _measure(measurement, what, place, record, deadline, log)
        state = "finished"
    finally:
        record.finish(state)
        print(f"\n{record.as_text()}\n\nrecord: {record.path}", flush=True)
    return _problems(record) + _unknown(only, names, name)


def _measure(name: str, what, place: Place, record: Record, deadline: float, log: TextIO) -> None:
    """Run one measurement, or record why it is skipped."""
    if isinstance(what, Skip):
        record.skip(name, what.why)
        return
    if isinstance(what, dict):
        record.begin(name, "")
        record.add(name, what)
        record.end(name, "measured", 0.0)
        print(f"  {what['text']}", flush=True)
        return
    if time.monotonic() >= deadline:
        record.skip(name, NO_TIME, "no time")
        return
    command = shown(what, place.work.parent)
    print(f"$ {command}", flush=True)
    log.write(f"$ {command}\n")
    record.begin(name, command)
    started = time.monotonic()

    def take(result: dict) -> None:
        record.add(name, result)
        print("  " + result["text"].replace("\n", "\n  "), flush=True)

    state, why = "cut off", ""
    try:
        why = harness.run_process(what, log, deadline, take)
        state = ("no time" if time.monotonic() >= deadline else "failed") if why else "measured"
    finally:
        record.end(name, state, time.monotonic() - started, why)
    print(f"  {name}: {why or f'{time.monotonic() - started:.0f} s'}", flush=True)


def _problems(record: Record) -> list[str]:
    found = record.document["measurements"]
    return [f"{name} {each['state']}: {each['why']}" for name, each in found.items() if each["state"] in _PROBLEMS]


def _unknown(only: set[str], names: list[str], part: str) -> list[str]:
    """A sentence for each name in `--only` that is not a measurement of the part."""
    known = f"which {part} does not measure; it measures {', '.join(names)}"
    return [f"--only names {each}, {known}" for each in sorted(only - set(names))]


if __name__ == "__main__":
    main()
