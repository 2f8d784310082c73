"""Defines the phases of a run's time and the marks of its ledger, in two tables.

To add a phase, add a line to PHASES and book its time with `SegmentLog.switch` or `SegmentLog.phase`. The ledger then
accepts the phase, and report and page show it. `python -m bench.tables` renews docs/formats.md.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Phase:
    """A kind of time in a run. `colour` and `dark` are its CSS colours on a light and on a dark page."""

    name: str
    by: Literal["ledger", "launcher", "report"]  # who records its time
    help: str
    colour: str
    dark: str
    is_preparation: bool = False  # the machine prepares to work


@dataclass(frozen=True)
class Mark:
    """A kind of dated fact in the ledger. `help` describes its fields in Markdown."""

    name: str
    fields: tuple[str, ...]
    help: str


# A report lists the phases in this order.
PHASES = (
    Phase("provision", "launcher", "time from the launch to the beginning of the ledger", "#707d91", "#9aa5b6"),
    Phase("setup", "ledger", "time from machine start to program start", "#8d99ae", "#7f8ba0", is_preparation=True),
    Phase("init", "ledger", "the program loads its code and opens the run", "#a5afc0", "#667085", is_preparation=True),
    Phase("prep", "ledger", "preparation: documents are turned into shards", "#2f9e63", "#3fb577"),
    Phase("finalize", "ledger", "preparation: shards are chosen, and the manifest is written", "#3aa6b9", "#4fb9cb"),
    Phase("compile", "ledger", "the first step, which includes compilation", "#6d8fd6", "#7d9de0", is_preparation=True),
    Phase("restore", "ledger", "weights and optimizer state are loaded", "#8a6fc9", "#a08be0", is_preparation=True),
    Phase("data_wait", "ledger", "a step waits for its tokens", "#d9a13b", "#e0b159"),
    Phase("train", "ledger", "optimizer steps", "#2f9e63", "#3fb577"),
    Phase("train_kept", "report", "the part of `train` that was not repeated later", "#2f9e63", "#3fb577"),
    Phase("train_lost", "report", "the part of `train` that was repeated later or not finished", "#d64545", "#ec6a6a"),
    Phase("eval", "ledger", "the model is evaluated: validation loss, HellaSwag and other tasks", "#3aa6b9", "#4fb9cb"),
    Phase("serve", "ledger", "a server answers requests, or waits for them", "#c77d3a", "#d9975c"),
    Phase("export", "ledger", "weights are converted and stored", "#5c8a8a", "#78a5a5"),
    Phase("sample", "ledger", "text samples are generated, or an endpoint is called", "#7cc4c9", "#3f8d96"),
    Phase("api", "report", "dollars paid to an endpoint. This cost adds no seconds", "#b58f5c", "#c8a573"),
    Phase("checkpoint", "ledger", "the part of a checkpoint that blocks training", "#b0749e", "#c98bb6"),
    Phase("idle", "launcher", "time between two segments on one machine", "#c9ced6", "#4a515c"),
    Phase("idle_until_down", "launcher", "time from the last segment's end to the machine's end", "#c9ced6", "#4a515c"),
    Phase(
        "billing_unit",
        "launcher",
        "time that the cloud bills after the end of the machine, because it bills in whole units such as minutes",
        "#c9ced6",
        "#4a515c",
    ),
    Phase("disks", "report", "disks of the machines. This cost adds no seconds", "#8fb7a1", "#5d8a72"),
    Phase("addresses", "report", "public IPv4 addresses. This cost adds no seconds", "#a9c4b3", "#4e7360"),
    Phase(
        "traffic", "report", "billed traffic of machines and bucket. This cost adds no seconds", "#7fa3b5", "#57798a"
    ),
    Phase("requests", "report", "requests to the object store. This cost adds no seconds", "#9db8c4", "#46626f"),
    Phase("storage", "report", "storage of the run's objects. This cost adds no seconds", "#b7b39a", "#7a765c"),
    Phase("controller", "report", "the controller of managed jobs. This cost adds no seconds", "#b9a9c9", "#766690"),
    Phase(
        "elsewhere", "report", "bills added by `cost_report.py add`. This cost adds no seconds", "#a8a27a", "#7d7850"
    ),
    Phase("factor", "report", "tax and discounts (`COST_FACTOR`). This cost adds no seconds", "#c4a9a9", "#8a6666"),
    Phase("not_attributed", "report", "paid time that belongs to no other phase", "#e3b7b7", "#8d5a5a"),
)
LEDGER_PHASES = tuple(phase.name for phase in PHASES if phase.by == "ledger")
# A report splits the ledger's `train` into kept and lost.
REPORT_PHASES = tuple(phase.name for phase in PHASES if phase.name != "train")
PREPARATION_PHASES = frozenset(phase.name for phase in PHASES if phase.is_preparation)
# These phases recur between steps: a forecast adds them as a share of the training time.
OVERHEAD_PHASES = ("data_wait", "eval", "sample", "checkpoint")
STEP_PHASES = ("train", "data_wait")  # the time of an optimizer step

MARKS = (
    Mark(
        "restored",
        ("step", "checkpoint", "skipped"),
        "`step`: the step from which the segment continues, 0 for a new run; `skipped`: the newer "
        "checkpoints that could not be used, as a list of `{name, why}`",
    ),
    Mark(
        "first_step",
        ("step", "seconds", "step_seconds"),
        "`step`: the first step that the segment completed; `seconds`: from the start of the process to the beginning "
        "of this step; `step_seconds`: duration of this step, with its compilation",
    ),
    Mark("checkpoint_begun", ("step",), "`step` of the checkpoint. Its upload begins at the time of the mark"),
    Mark(
        "checkpoint",
        ("step", "bytes", "blocked_seconds", "background_seconds"),
        "`step` and `bytes` of a complete checkpoint; `blocked_seconds`: the time for which training waited; "
        "`background_seconds`: the duration of the upload",
    ),
    Mark("notice", ("kind", "detail"), "`kind` and `detail` of a request to stop, such as a spot notice"),
    Mark("cap", ("limit_usd", "spent_usd"), "`limit_usd`: the cap; `spent_usd`: dollars spent when it was reached"),
    Mark(
        "anneal",
        ("kind", "step", "steps", "why"),
        "`kind`: anneal or replan; `step`: the last step before the cooldown; `steps`: number of steps of the "
        "cooldown; `why`: budget, request, target, length or replan",
    ),
    Mark(
        "slow_rank",
        ("rank", "times"),
        "`rank`: a slow rank; `times`: the time of its forward passes divided by the median of all ranks",
    ),
    Mark(
        "api",
        ("usd", "answers"),
        "`usd`: dollars paid to an endpoint since the run began; `answers`: number of stored answers",
    ),
    Mark("clock_jump", ("seconds",), "`seconds`: how far the wall clock was set forward; negative if it was set back"),
)
_NAMES = frozenset(phase.name for phase in PHASES)
_FIELDS = {mark.name: frozenset(mark.fields) for mark in MARKS}


def label(name: str) -> str:
    """train_lost → "train lost"."""
    return name.replace("_", " ")


def colour_class(name: str) -> str:
    """The CSS class with the colour of a phase; `p-other` for any name that is not in the table."""
    return f"p-{name if name in _NAMES else 'other'}"


def check_mark(name: str, fields: set[str]) -> None:
    """Raises ValueError unless the table lists the mark and its fields."""
    if name not in _FIELDS:
        raise ValueError(f"unknown mark {name!r}; known: {', '.join(_FIELDS)}")
    if unknown := fields - _FIELDS[name]:
        raise ValueError(f"mark {name!r} has no field {', '.join(sorted(unknown))}")


def markdown() -> str:
    """Both tables for docs/formats.md."""
    lines = ["| phase | booked by | meaning |", "|---|---|---|"]
    lines += [f"| `{phase.name}` | {phase.by} | {phase.help} |" for phase in PHASES]
    lines += ["", "| mark | fields |", "|---|---|"]
    lines += [f"| `{mark.name}` | {mark.help} |" for mark in MARKS]
    return "\n".join(lines)


def css() -> str:
    """The phases' colours as CSS variables and classes, for the cost page."""

    def variables(colour: str) -> str:
        return " ".join(f"--p-{phase.name}: {getattr(phase, colour)};" for phase in PHASES)

    classes = " ".join(f".p-{phase.name} {{ fill: var(--p-{phase.name}); }}" for phase in PHASES)
    return (
        f":root {{ {variables('colour')} }}\n"
        f"@media (prefers-color-scheme: dark) {{ :root {{ {variables('dark')} }} }}\n{classes}\n"
    )
