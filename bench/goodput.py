"""What share of the paid time becomes training that is kept, under preemptions.

    python -m bench.goodput [--checkpoint=FILE] [--restart=FILE] [--chaos=FILE] [--out=FILE]

A simulation of one run, event by event, with costs that were measured: the blocking part of a checkpoint and its
upload (from bench.checkpoint, scaled to --upload-mb-per-second if given) and the seconds from the start of torchrun
to the first step (from bench.restart; --machine-seconds adds what a machine is paid for before that). The trainer's
own Cadence decides when to save. Preemptions are a Poisson process, or the gaps of a trace (--trace=FILE: one gap in
hours per line). Paid time is the time that a machine is up; `notice` is the share of preemptions that come with a
warning early enough to save (AWS: two minutes), which then lose no step.

With --chaos (the file that tests.chaos wrote) the lives of that run are simulated with its own costs, and what it
really kept is printed beside what the simulation says.
"""

import argparse
import itertools
import json
import random
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from rich.console import Console
from rich.table import Table

from core.settings.training import CheckpointConfig
from trainer.checkpoint.save import Cadence


@dataclass(frozen=True)
class Costs:
    """Seconds. `restart` is from the start of paid time to the first step, restore included."""

    step: float
    blocked: float
    upload: float
    restart: float


@dataclass
class Outcome:
    """Seconds of paid time by what became of them."""

    kept: float = 0.0
    lost: float = 0.0
    blocked: float = 0.0
    restart: float = 0.0
    preemptions: int = 0
    worst_loss: float = 0.0

    @property
    def paid(self) -> float:
        return self.kept + self.lost + self.blocked + self.restart


def simulate(
    costs: Costs,
    lives: Iterator[tuple[float, float]],
    notice: float,
    work_seconds: float,
    chance: random.Random,
    config: CheckpointConfig,
) -> Outcome:
    """Run until `work_seconds` of training are kept. `lives`: how long a machine lives, how long its start takes."""
    outcome = Outcome()
    while outcome.kept < work_seconds:
        life, restart = next(lives)
        noticed = chance.random() < notice
        if life <= restart:
            outcome.restart += life
            outcome.preemptions += 1
            continue
        outcome.restart += restart
        cadence = Cadence(config, now=restart)
        cadence.measured(costs.blocked, costs.upload)
        now, trained, safe = restart, 0.0, 0.0
        in_flight: tuple[float, float] | None = None  # (when it is complete, work that it holds)
        step = 0
        while True:
            if outcome.kept + trained >= work_seconds:
                safe = trained
                break
            if in_flight and in_flight[0] <= now:
                safe, in_flight = in_flight[1], None
            if in_flight is None and cadence.due(step, costs.step, now):
                now += costs.blocked
                outcome.blocked += costs.blocked
                cadence.saved(now)
                in_flight = (now + costs.upload, trained)
            # With a notice the last two minutes hold a step, a save and its upload.
            if now + costs.step > life:
                if noticed:
                    safe = trained
                    outcome.blocked += max(0.0, life - now)
                elif in_flight and in_flight[0] <= life:
                    safe = in_flight[1]
                outcome.lost += 0.0 if noticed else life - now
                outcome.preemptions += 1
                break
            now += costs.step
            trained += costs.step
            step += 1
        outcome.kept += safe
        outcome.lost += trained - safe
        outcome.worst_loss = max(outcome.worst_loss, trained - safe)
    return outcome


def main() -> None:
    options = _options()
    measured = json.loads(options.checkpoint.read_text())
    ours = measured["median"]["ours, S3"]
    upload = ours["total"] - ours["blocked"]
    if options.upload_mb_per_second:
        upload = measured["bytes"] / 1e6 / options.upload_mb_per_second
    restart = json.loads(options.restart.read_text())["median"]["all"]
    costs = Costs(options.step_seconds, ours["blocked"], upload, restart + options.machine_seconds)
    rows = []
    for mean_hours, notice in itertools.product(options.mean_hours, (0.0, 1.0)):
        outcomes = []
        for seed in range(options.runs):
            chance = random.Random(seed)
            lives = ((gap, costs.restart) for gap in _gaps(options, mean_hours, chance))
            outcomes.append(simulate(costs, lives, notice, options.work_hours * 3600, chance, CheckpointConfig()))
        rows.append(
            {
                "mean_hours": mean_hours,
                "notice": notice,
                "goodput": statistics.mean(o.kept / o.paid for o in outcomes),
                "lost": statistics.mean(o.lost / o.paid for o in outcomes),
                "restart": statistics.mean(o.restart / o.paid for o in outcomes),
                "blocked": statistics.mean(o.blocked / o.paid for o in outcomes),
                "worst_loss_seconds": max(o.worst_loss for o in outcomes),
            }
        )
    _show(costs, options, rows)
    real = compare_with(json.loads(options.chaos.read_text())) if options.chaos else None
    if options.out:
        facts = {"date": date.today().isoformat(), "costs": costs.__dict__, "runs": options.runs, "rows": rows}
        facts |= {"chaos": real} if real else {}
        options.out.write_text(json.dumps(facts | {"checkpoint": options.checkpoint.name}, indent=1) + "\n")


def compare_with(chaos: dict) -> dict[str, float]:
    """Goodput of a run under kills, real and simulated with the lives, the starts and the mean costs of that run."""
    costs = Costs(*(chaos[f"{name}_seconds"] for name in ("step", "blocked", "background", "restart")))
    # A life that did not reach a step was all start.
    lives = [(life["seconds"], life["restart_seconds"] or life["seconds"]) for life in chaos["lives"]]
    lives[-1] = (float("inf"), lives[-1][1])  # nothing killed the last one
    config = CheckpointConfig(max_lost_seconds=chaos["max_lost_seconds"])
    simulated = simulate(costs, iter(lives), 0.0, chaos["kept_seconds"], random.Random(0), config)
    found = {"real": chaos["kept_seconds"] / chaos["up_seconds"], "simulated": simulated.kept / simulated.paid}
    print(f"chaos run of {len(lives) - 1} kills: " + ", ".join(f"{k} {100 * v:.1f} %" for k, v in found.items()))
    return found


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=Path("bench/results/2026-11-20-checkpoint.json"))
    parser.add_argument("--upload-mb-per-second", type=float, help="another network than the measured one")
    parser.add_argument("--restart", type=Path, default=Path("bench/results/2026-11-20-restart.json"))
    parser.add_argument("--machine-seconds", type=float, default=0.0, help="paid before torchrun starts")
    parser.add_argument("--chaos", type=Path, help="what tests.chaos --out wrote")
    parser.add_argument("--step-seconds", type=float, default=0.3, help="llm.c's 124M on 8xA100: 300 ms")
    parser.add_argument("--work-hours", type=float, default=2.0)
    parser.add_argument(
        "--mean-hours", type=float, nargs="+", default=[0.25, 1.0, 4.0, 24.0], help="between preemptions"
    )
    parser.add_argument(
        "--trace", type=Path, help="gaps between preemptions in hours, one per line, in place of Poisson"
    )
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def _gaps(options: argparse.Namespace, mean_hours: float, chance: random.Random) -> Iterator[float]:
    if options.trace:
        gaps = [float(line) * 3600 for line in options.trace.read_text().split()]
        start = chance.randrange(len(gaps))
        yield from itertools.cycle(gaps[start:] + gaps[:start])
    while True:
        yield chance.expovariate(1 / (mean_hours * 3600))


def _show(costs: Costs, options: argparse.Namespace, rows: list[dict]) -> None:
    title = (
        f"{options.runs} runs of {options.work_hours:g} h of work; step {costs.step:g} s, "
        f"save blocks {costs.blocked:.3f} s, upload {costs.upload:.1f} s, restart {costs.restart:.1f} s"
    )
    table = Table("mean h between", "notice", "goodput", "lost", "restarting", "blocked", "worst loss s", title=title)
    for row in rows:
        shares = [f"{100 * row[key]:.2f} %" for key in ("goodput", "lost", "restart", "blocked")]
        table.add_row(f"{row['mean_hours']:g}", f"{row['notice']:.0%}", *shares, f"{row['worst_loss_seconds']:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
