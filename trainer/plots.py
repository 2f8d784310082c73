"""Plots the curves of runs as PNG and SVG, several runs in one figure.

    python -m trainer.plots RUN_URL [RUN_URL ...] [--out=plots] [--format=png,svg] [--smooth=0.9]

Reads metrics and ledger of each run (core.run.measured). Writes five figures into --out: loss (over tokens, machine
hours and dollars), hellaswag, recipe (learning rate and gradient norm), speed (tokens/s and MFU, with restarts and
checkpoints) and norms. Also writes samples.md, with the text samples of each prompt by step. A figure without data is
skipped, and its name is logged. The figures need matplotlib (the extra `plot`).
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core import urls
from core.console import run_entry, set_up_logging
from core.errors import ConfigError
from core.exit_codes import OK
from core.run import measured
from core.run.model import Point, Run

log = logging.getLogger("plots")
FORMATS = ("png", "svg")
COLOURS = ("#2563eb", "#d9480f", "#2f9e63", "#8a6fc9", "#b0749e", "#8d6e2f")
RESTART, CHECKPOINT = "#d64545", "#9aa5b1"
MAX_MARKS = 100  # most lines drawn for checkpoints or for restarts; more would hide the curve
FIGURES = ("loss", "hellaswag", "recipe", "speed", "norms")


@dataclass(frozen=True)
class Options:
    """Options of the command line."""

    runs: tuple[str, ...]
    folder: Path
    formats: tuple[str, ...]
    smooth: float


def main(arguments: list[str]) -> int:
    if not arguments or {"-h", "--help"} & set(arguments):
        print((__doc__ or "").strip())
        return OK
    set_up_logging()
    options = parse(arguments)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("plots need matplotlib; run `pip install -e '.[plot]'`") from None
    runs = measured.read_all(options.runs)
    for _, run in runs:
        for problem in run.problems:
            log.warning("%s", problem)
    options.folder.mkdir(parents=True, exist_ok=True)
    for name in FIGURES:
        figure = Figure(figsize=(12, 4) if name == "loss" else (8, 4.5), layout="constrained")
        if not _DRAW[name](figure, runs, options.smooth):
            log.info("%s: no data", name)
            continue
        for kind in options.formats:
            path = options.folder / f"{name}.{kind}"
            figure.savefig(path, dpi=150)
            print(path)
    table = samples(runs)
    if table:
        path = options.folder / "samples.md"
        path.write_text(table)
        print(path)
    return OK


def parse(arguments: Sequence[str]) -> Options:
    """Parses the command line. Raises ConfigError for an unknown flag or an invalid value."""
    flags = {"out": "plots", "format": ",".join(FORMATS), "smooth": "0.9"}
    runs = []
    for argument in arguments:
        key, _, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--"):
            runs.append(argument)
        elif key not in flags:
            raise ConfigError(f"{argument}: unknown flag; known ones: {', '.join(f'--{name}=' for name in flags)}")
        else:
            flags[key] = value
    if not runs:
        raise ConfigError("no run named; give the run.url of one or more runs")
    formats = tuple(flags["format"].split(","))
    unknown = set(formats) - set(FORMATS)
    if unknown:
        raise ConfigError(f"--format={flags['format']}: must be one or several of {', '.join(FORMATS)}")
    try:
        smooth = float(flags["smooth"])
    except ValueError:
        smooth = -1.0
    if not 0 <= smooth < 1:
        raise ConfigError(f"--smooth={flags['smooth']}: must be a number, at least 0 and below 1")
    return Options(tuple(runs), urls.local_path(flags["out"], "--out"), formats, smooth)


def smoothed(values: Sequence[float], weight: float) -> list[float]:
    """Exponential moving average with bias correction (Kingma & Ba 2015, section 3)."""
    found, mean, total = [], 0.0, 0.0
    for value in values:
        mean = weight * mean + (1 - weight) * value
        total = weight * total + (1 - weight)
        found.append(mean / total)
    return found


def samples(runs: Sequence[tuple[str, Run]]) -> str:
    """Markdown with a table per run and prompt, and a row per step."""
    parts = []
    for name, run in runs:
        for prompt in dict.fromkeys(point.values["prompt"] for point in run.points("sample")):
            parts += [f"## {name}: {prompt}", "", "| step | continuation |", "|---:|---|"]
            for point in run.points("sample"):
                if point.values["prompt"] == prompt:
                    text = " ".join(point.values["text"].removeprefix(prompt).split()).replace("|", "\\|")
                    parts.append(f"| {point.step:,} | {text} |")
            parts.append("")
    return "\n".join(parts)


Runs = Sequence[tuple[str, Run]]


def _loss(figure: Any, runs: Runs, smooth: float) -> bool:
    across: list[tuple[str, Callable[[Point], float | None]]] = [
        ("tokens (millions)", lambda point: point.values["tokens"] / 1e6),
        ("machine hours", lambda point: point.seconds / 3600),
        ("dollars", lambda point: point.usd),
    ]
    axes = figure.subplots(1, 3, sharey=True)
    drawn = False
    for panel, (label, of) in zip(axes, across, strict=True):
        for colour, (name, run) in zip(_colours(), runs, strict=False):
            train = [(of(point), point.values["loss"]) for point in run.points("train")]
            train = [(x, y) for x, y in train if x is not None and y is not None]
            validation = [(of(point), point.values.get("val_loss")) for point in run.points("eval")]
            validation = [(x, y) for x, y in validation if x is not None and y is not None]
            if train:
                x, y = zip(*train, strict=True)
                panel.plot(x, y, color=colour, alpha=0.2, linewidth=0.8)
                panel.plot(x, smoothed(y, smooth), color=colour, linewidth=1.4, label=f"{name}, train")
                drawn = True
            if validation:
                panel.plot(*zip(*validation, strict=True), "o", color=colour, markersize=4, label=f"{name}, validation")
        panel.set_xlabel(label)
        if not panel.lines:
            panel.text(0.5, 0.5, "the price is not known", ha="center", transform=panel.transAxes)
        _tidy(panel)
    axes[0].set_ylabel("loss (nats per token)")
    return drawn


def _hellaswag(figure: Any, runs: Runs, smooth: float) -> bool:
    axes = figure.subplots()
    drawn = False
    for colour, (name, run) in zip(_colours(), runs, strict=False):
        points = run.points("hellaswag")
        if points:
            x = [point.values["tokens"] / 1e6 for point in points]
            y, error = (
                [100 * point.values[key] for point in points] for key in ("accuracy_norm", "accuracy_norm_stderr")
            )
            axes.errorbar(x, y, yerr=error, fmt="o-", color=colour, markersize=4, capsize=2, label=name)
            drawn = True
    axes.axhline(25, color=CHECKPOINT, linestyle=":", label="random choice")
    axes.set(xlabel="tokens (millions)", ylabel="HellaSwag, normalised accuracy (%)")
    _tidy(axes)
    return drawn


def _recipe(figure: Any, runs: Runs, smooth: float) -> bool:
    panels = figure.subplots(2, 1, sharex=True)
    for panel, (key, label) in zip(panels, (("lr", "learning rate"), ("grad_norm", "gradient norm")), strict=True):
        for colour, (name, run) in zip(_colours(), runs, strict=False):
            points = [(p.step, p.values[key]) for p in run.points("train") if p.values.get(key) is not None]
            if points:
                panel.plot(*zip(*points, strict=True), color=colour, linewidth=1, label=name)
        panel.set_ylabel(label)
        _tidy(panel)
    panels[1].set_xlabel("step")
    return any(panel.lines for panel in panels)


def _speed(figure: Any, runs: Runs, smooth: float) -> bool:
    panels = figure.subplots(2, 1, sharex=True)
    rows = (("tokens_per_second", "tokens/s", 1.0), ("mfu", "MFU (%)", 100.0))
    drawn = False
    for panel, (key, label, factor) in zip(panels, rows, strict=True):
        for colour, (name, run) in zip(_colours(), runs, strict=False):
            points = [
                (p.seconds / 3600, factor * p.values[key]) for p in run.points("train") if p.values.get(key) is not None
            ]
            if points:
                panel.plot(*zip(*points, strict=True), ".", color=colour, markersize=2, label=name)
                drawn = True
            for mark in run.machine_seconds("checkpoint_begun")[:MAX_MARKS]:
                panel.axvline(mark / 3600, color=CHECKPOINT, linewidth=0.6, alpha=0.6)
            for mark in run.restarts()[:MAX_MARKS]:
                panel.axvline(mark / 3600, color=RESTART, linestyle="--", linewidth=1)
        if not panel.get_legend_handles_labels()[0]:
            panel.text(0.5, 0.5, "not known", ha="center", transform=panel.transAxes)
        panel.set_ylabel(label)
        panel.set_ylim(bottom=0)
        _tidy(panel)
    panels[0].set_title("red: restart; grey: start of a checkpoint", fontsize="small")
    panels[1].set_xlabel("machine hours")
    return drawn


def _norms(figure: Any, runs: Runs, smooth: float) -> bool:
    panels = figure.subplots(1, 2)
    for colour, (name, run) in zip(_colours(), runs, strict=False):
        points = run.points("norms")
        for part, style in (("attention", "-"), ("mlp", "--")):
            shares = [
                (p.step, p.values["updates"][part] / p.values["weights"][part])
                for p in points
                if p.values["updates"].get(part) is not None and p.values["weights"].get(part)
            ]
            if shares:
                panels[0].plot(*zip(*shares, strict=True), style, color=colour, label=f"{name}, {part}")
        largest = [(p.step, max(v for v in p.values["largest_activations"] if v is not None)) for p in points]
        if largest:
            panels[1].plot(*zip(*largest, strict=True), color=colour, label=name)
    panels[0].set(xlabel="step", ylabel="norm of update / norm of weights")
    panels[1].set(xlabel="step", ylabel="largest activation of any block")
    for panel in panels:
        panel.set_yscale("log")
        _tidy(panel)
    return any(panel.lines for panel in panels)


_DRAW = {"loss": _loss, "hellaswag": _hellaswag, "recipe": _recipe, "speed": _speed, "norms": _norms}


def _colours() -> list[str]:
    return list(COLOURS) * 8


def _tidy(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize="small")


if __name__ == "__main__":
    run_entry(main)
