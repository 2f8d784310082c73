"""The loss curve of a model card, as a picture (extra `plot`: matplotlib)."""

import logging
from collections.abc import Sequence
from pathlib import Path

log = logging.getLogger("export")
Points = Sequence[tuple[int, float]]


def draw(path: Path, train: Points, held_out: Points) -> str | None:
    """Its name; None if there is nothing to draw, or nothing to draw with."""
    if len(train) < 2:
        return None
    try:
        from matplotlib.figure import Figure
    except ImportError:
        log.info("no picture of the loss: matplotlib is not installed (pip install matplotlib)")
        return None
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*train, strict=True), linewidth=1, color="#8aa4c8", label="training")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), marker="o", markersize=4, color="#c2452d", label="validation")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    return path.name
