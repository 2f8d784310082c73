"""The charts of a report as PNG files. Needs matplotlib (the extra `plot`)."""

from pathlib import Path

from core.errors import ConfigError
from costs import drawings
from costs.breakdown import Report
from costs.wording import label

COLOURS = {
    "train_kept": "#2f9e63", "train_lost": "#d64545", "data_wait": "#d9a13b", "setup": "#8d99ae", "init": "#a5afc0",
    "compile": "#6d8fd6", "restore": "#8a6fc9", "eval": "#3aa6b9", "sample": "#7cc4c9", "checkpoint": "#b0749e",
    "api": "#b58f5c", "provision": "#707d91", "idle_until_down": "#c9ced6", "idle": "#c9ced6",
    "not_attributed": "#e3b7b7",
}  # fmt: skip
OTHER = "#b9c0ca"


def save_all(report: Report, folder: Path) -> list[Path]:
    """Write one PNG per chart that has data; return them. Raises ConfigError without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("--plot needs matplotlib; run `pip install 'pretrain-launcher[plot]'`") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    charts = report.charts
    folder.mkdir(parents=True, exist_ok=True)
    written = []

    def save(name: str, draw) -> None:
        figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
        draw(axes)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=150)
        pyplot.close(figure)
        written.append(path)

    def hours(times: list[float]) -> list[float]:
        return [(time - charts.spend_time[0]) / 3600 for time in times]

    def spend(axes) -> None:
        curves = drawings.stacked(report)
        colours = [COLOURS.get(name, OTHER) for name in curves]
        axes.stackplot(hours(charts.spend_time), *curves.values(), labels=map(label, curves), colors=colours)
        axes.set(title="Dollars over time", xlabel="hours", ylabel="USD")
        axes.legend(loc="upper left", reverse=True, fontsize="small", frameon=False)

    def loss(axes) -> None:
        axes.plot(charts.loss_usd, charts.loss, color=OTHER, label="train")
        axes.plot(charts.val_usd, charts.val_loss, "o-", markersize=3, color="#2563eb", label="validation")
        axes.set(title="Loss against dollars", xlabel="USD", ylabel="loss")
        axes.legend(frameon=False)

    def speed(axes) -> None:
        axes.plot(hours(charts.speed_time), charts.tokens_per_second, ".", markersize=3, color="#2f9e63")
        axes.set(title="Speed; dashed: a machine was lost or ended", xlabel="hours", ylabel="tokens/s", ylim=(0, None))
        for at in hours(charts.losses_of_machines):
            axes.axvline(at, color="#d64545", linestyle="--", linewidth=1)

    def phases(axes) -> None:
        rows = [line for line in report.phases if line.usd][::-1]
        reached = report.total.usd
        for line in rows:
            reached -= line.usd
            axes.barh(label(line.name), line.usd, left=reached, color=COLOURS.get(line.name, OTHER))
        axes.set(title="Where the dollars went", xlabel="USD")

    if charts.spend_time:
        save("dollars-over-time", spend)
        save("phases", phases)
        if any(value is not None for value in charts.tokens_per_second):
            save("speed", speed)
    if charts.loss:
        save("loss-against-dollars", loss)
    return written
