"""Writes the scores of several models side by side: as JSON, or as a chart with a panel per task and metric.

    write({"first": {"perplexity": {"perplexity": 31.2}}, "gpt2": {...}}, "comparison.svg")

A chart needs matplotlib, which the extra `plot` installs.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from core.errors import ConfigError

Scores = Mapping[str, Mapping[str, Mapping[str, float]]]  # scores by model, task and metric
# If a task has some of these metrics, only these are drawn. If it has none of them, all of its metrics are drawn.
SHOWN = ("perplexity", "accuracy", "accuracy_norm", "acc", "acc_norm")
BAR_INCHES, PANEL_INCHES = 0.45, 3.2


def check(out: Sequence[str]) -> None:
    """Raises ConfigError if the folder of a file does not exist, or if a chart needs matplotlib and it is missing."""
    for file in out:
        if not Path(file).expanduser().absolute().parent.is_dir():
            raise ConfigError(f"out: {file}: its folder does not exist; create it first")
        if not file.endswith(".json"):
            _figure_class()


def write(scores: Scores, file: str) -> None:
    """Write the scores of all models to a local file. The ending of its name determines the format."""
    path = Path(file).expanduser()
    if file.endswith(".json"):
        path.write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")
    else:
        draw(scores, path)


def panels(scores: Scores) -> dict[tuple[str, str], dict[str, float]]:
    """The values to draw. The result maps (task, metric) to the values by model."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for task in dict.fromkeys(task for tasks in scores.values() for task in tasks):
        metrics = dict.fromkeys(metric for tasks in scores.values() for metric in tasks.get(task, {}))
        chosen = [metric for metric in metrics if metric in SHOWN]
        for metric in chosen or [each for each in metrics if not each.endswith("_stderr")]:
            values = {model: tasks[task][metric] for model, tasks in scores.items() if metric in tasks.get(task, {})}
            found[task, metric] = values
    return found


def draw(scores: Scores, path: Path) -> None:
    """Draw one panel per task and metric, with one bar per model. The standard error is drawn if the task has one."""
    drawn = panels(scores)
    size = (1.5 + PANEL_INCHES * len(drawn), 1.5 + BAR_INCHES * len(scores))
    figure = _figure_class()(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(drawn), squeeze=False, sharey=True)
    for axis, ((task, metric), values) in zip(axes[0], drawn.items(), strict=True):
        models = list(scores)
        heights = [values.get(model, 0.0) for model in models]
        errors = [scores[model].get(task, {}).get(f"{metric}_stderr", 0.0) for model in models]
        bars = axis.barh(models, heights, xerr=errors if any(errors) else None, color="#4878b0", ecolor="#444444")
        axis.bar_label(bars, [f"{values[model]:.4g}" if model in values else "?" for model in models], padding=3)
        axis.set_title(f"{task}: {metric.replace('_', ' ')}", fontsize=10)
        axis.margins(x=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].invert_yaxis()  # the first model is on top
    figure.savefig(path, dpi=150)


def _figure_class() -> type:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("out: a chart needs matplotlib; run `pip install -e '.[plot]'`, or write .json") from None
    return Figure
