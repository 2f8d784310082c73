"""Interrupts launches on an emulated cloud, and measures when the machines are gone. There are 24 cells.

    LAB_DIR=… python -m bench.interruptions --scratch=FOLDER --out=FILE [--minutes=25] [--only=NUMBER ...]

A cell is one of four events at one of six stages of a launch. The kind of launch (on demand or managed) and the cloud
(AWS or Lambda) alternate, so that each kind and each cloud occurs with every event and at every stage. Each cell has a
separate emulated computer: a home folder with SkyPilot's API server. This computer runs `launch.submit` with
sky/prep-data.yaml. The container and the preparation are real. The events:

    ctrl-c   SIGINT to the launcher
    kill     SIGKILL to the launcher and to SkyPilot's server, as when the computer is lost
    stop     SIGSTOP to both, as when the computer's lid is closed
    cut      no packet reaches port 22 of the nodes from the computer, and the rest of the network works

A machine counts as gone when its cloud no longer lists it, or lists it as terminated. The time limit is SWITCH_MINUTES
plus two minutes. The limit counts from the latest of three times: the interruption, the machine's start, and the
machine's last sign of life.

If machines are still running after the limit, the computer comes back and ends them: on Lambda by `launch.watch` with a
limit of one minute, elsewhere by `launch.down`. Each finished cell is stored in FILE, and a second call runs the cells
that are missing. The emulated cloud must be up, with the project's `prep` image prepared.
"""

import argparse
import json
import signal
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench import harness
from bench.emulated import Bench
from bench.interrupted import FIRST, Cell, Trial, cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--scratch", type=Path, required=True, help="existing folder for files of the programs that are started"
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file; finished cases are added to it")
    parser.add_argument("--minutes", type=float, default=25.0, help="start no new case after this many minutes")
    parser.add_argument("--only", type=int, nargs="*", help="measure only the cases with these numbers")
    options = parser.parse_args()
    # A shell starts background processes with SIGINT ignored, and the launchers would inherit this setting.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    record = json.loads(options.out.read_text()) if options.out.exists() else {**header(), "cells": []}
    done = {each["number"] for each in record["cells"]}
    wanted = [each for each in cells() if each.number not in done and each.number in (options.only or range(1, 25))]
    wanted.sort(key=lambda cell: (cell.cloud, FIRST.index(cell.stage), -cell.number))
    bench, last = Bench(options.scratch.resolve()), time.monotonic() + options.minutes * 60
    keep = threading.Lock()

    def run(cell: Cell) -> None:
        with bench.slots:
            if time.monotonic() > last:
                return
            Trial(bench, cell).run()
        with keep:
            record["cells"] = sorted([*record["cells"], asdict(cell)], key=lambda each: each["number"])
            options.out.write_text(json.dumps(record, indent=1) + "\n")
            print(row(cell), flush=True)

    threads = [threading.Thread(target=run, args=(cell,)) for cell in wanted]
    for thread in threads:
        thread.start()
        time.sleep(0.1)  # in order
    for thread in threads:
        thread.join()
    show(record)


def header() -> dict[str, Any]:
    return {**harness.header(), "skypilot": "0.14.1", "limit_minutes": "those of the switch, and two"}


def row(cell: Cell) -> str:
    seconds = ["-" if each is None else f"{each:.0f}" for each in (cell.gone_after, cell.silent_for)]
    return " | ".join([str(cell.number), cell.name, cell.launcher, *seconds, cell.ended_by, cell.verdict, *cell.notes])


def show(record: dict[str, Any]) -> None:
    heads = ("cell", "launcher", "gone after", "silent for", "ended by", "verdict")
    rows = [row(Cell(**each)).split(" | ") for each in record["cells"]]
    harness.print_table("interruptions of a launch", heads, [(f"{r[0]} {r[1]}", *r[2:7]) for r in rows])


if __name__ == "__main__":
    main()
