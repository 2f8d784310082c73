"""Writes the model card (README.md) of an exported model from the run's records.

The card omits a fact that is not recorded, or calls it "not known".
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.data import manifest
from core.data.vocabulary import GPT2_VOCAB_SIZE
from core.errors import LauncherError
from core.run.folder import RunFolder
from core.run.model import BY_LEDGER, Run
from core.run.reader import Detail, read_run
from core.settings import loader as settings
from core.settings.model import ModelConfig, parameters
from trainer.weights import huggingface
from trainer.weights.open import TrainedModel

log = logging.getLogger("export")
POINTS = 12  # number of rows in the table of losses


@dataclass
class Facts:
    """The facts that a run has recorded about one of its checkpoints.

    `spent_usd` is None if a price or a time is not known.
    """

    train: list[tuple[int, float]] = field(default_factory=list)  # step, loss
    validation: list[tuple[int, float]] = field(default_factory=list)
    evaluations: Sequence[Mapping[str, Any]] = ()
    data: manifest.Manifest | None = None
    segments: int = 0
    spent_usd: float | None = None
    evaluation_usd: float | None = None


def gather(trained: TrainedModel, evaluations: Sequence[Mapping[str, Any]]) -> Facts:
    """Reads the run's metrics, data manifest and ledger.

    If the model has no run, its `evaluations` are the only facts.
    """
    facts = Facts(evaluations=evaluations)
    if not trained.run_url:
        return facts
    if trained.data_url:
        try:
            facts.data = manifest.read(trained.data_url)
        except LauncherError:
            facts.data = None  # the data was moved or removed: the card omits its section
    facts.segments = len(RunFolder(trained.run_url).segment_numbers())
    if facts.segments:
        run = read_run(trained.run_url, Detail.ALL)
        facts.spent_usd = run.usd
        facts.train = _curve(run, "train", "loss", trained.step)
        facts.validation = _curve(run, "eval", "val_loss", trained.step)
    folder = RunFolder(trained.run_url).evaluations
    if RunFolder(folder).segment_numbers():
        facts.evaluation_usd = read_run(folder, Detail.MONEY).usd
    return facts


def write(trained: TrainedModel, facts: Facts, dtype: str, curve: str | None, gguf: str | None = None) -> str:
    """The card as Markdown with the Hub's front matter. `curve` and `gguf` name files of the same folder."""
    kind = huggingface.kind_of(trained.model.config)
    name = (trained.run_url or trained.name).rstrip("/").rpartition("/")[2]
    library = "gguf" if gguf else "transformers"
    head = ["---", f"library_name: {library}", "pipeline_tag: text-generation", "tags: [pretrain-launcher]", "---"]
    parts = [
        "\n".join(head),
        f"# {name}",
        f"```sh\nllama-cli -m {gguf}\n```" if gguf else _usage(kind),
        _model(trained, kind, dtype),
        _data(trained, facts),
        _training(trained, facts, curve),
        _evaluation(facts),
        _cost(trained, facts),
        "Written by pretrain-launcher from the records of the run.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _usage(kind: str) -> str:
    trust = ", trust_remote_code=True" if kind == huggingface.OWN else ""
    return (
        "```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("FOLDER_OR_NAME"{trust})\n'
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER_OR_NAME")\n'
        "```"
    )


def _model(trained: TrainedModel, kind: str, dtype: str) -> str:
    config = trained.model.config
    count = parameters(ModelConfig(**{**vars(config), "padded_vocab_size": GPT2_VOCAB_SIZE}))
    plain = settings.to_dict(ModelConfig())
    chosen = {key: value for key, value in settings.to_dict(config).items() if value != plain[key]}
    chosen.pop("padded_vocab_size", None)
    lines = [
        "## Model",
        "",
        f"- {huggingface.CLASSES[kind]}, {count:,} parameters, {dtype}",
        f"- {config.layers} layers, {config.heads} heads, width {config.width}, context {config.context} tokens",
        f"- vocabulary: GPT-2's {GPT2_VOCAB_SIZE:,} byte pairs",
    ]
    if config.padded_vocab_size > GPT2_VOCAB_SIZE:
        lines.append(f"- {config.padded_vocab_size - GPT2_VOCAB_SIZE} rows that padded the vocabulary are removed")
    unusual = {key: value for key, value in chosen.items() if key not in ("layers", "heads", "width", "context")}
    if unusual:
        lines.append(f"- differs from GPT-2: {', '.join(f'{key} {value}' for key, value in unusual.items())}")
    if trained.state.get("origin"):
        lines.append(f"- started from the weights of {trained.state['origin']}")
    return "\n".join(lines)


def _data(trained: TrainedModel, facts: Facts) -> str:
    if facts.data is None:
        return ""
    source = facts.data.source
    lines = ["## Data", ""]
    if source.get("url"):
        revision = f" at {source['revision']}" if source.get("revision") else ""
        lines.append(f"- {source['url']}{revision}")
    for name, split in sorted(facts.data.splits.items()):
        lines.append(f"- {name}: {split.tokens:,} tokens, {split.documents:,} documents")
    lines.append(f"- fingerprint `{facts.data.fingerprint[:16]}`")
    return "\n".join(lines)


def _training(trained: TrainedModel, facts: Facts, curve: str | None) -> str:
    if not trained.step:
        return ""
    lines = ["## Training", "", f"- {trained.step:,} steps, {trained.state.get('tokens', 0):,} tokens"]
    flat = settings.flatten(trained.state.get("config", {}))
    shown = (
        "batch.tokens_per_step",
        "optimizer.name",
        "optimizer.lr",
        "optimizer.schedule",
        "train.seed",
        "train.precision",
    )
    lines += [f"- {key}: {flat[key]}" for key in shown if key in flat]
    if facts.train:
        lines += ["", "| step | training loss | validation loss |", "|-:|-:|-:|"]
        validation = dict(facts.validation)
        steps = sorted({*thinned([step for step, _ in facts.train], POINTS), *thinned(sorted(validation), POINTS)})
        train = dict(facts.train)
        for step in steps:
            lines.append(f"| {step:,} | {_loss(train.get(step))} | {_loss(validation.get(step))} |")
    if curve:
        lines += ["", f"![loss over steps]({curve})"]
    return "\n".join(lines)


def _evaluation(facts: Facts) -> str:
    if not facts.evaluations:
        return ""
    lines = ["## Evaluation", "", "| task | metric | value | standard error |", "|-|-|-:|-:|"]
    for document in facts.evaluations:
        scores = document["scores"]
        for metric, value in scores.items():
            if not metric.endswith("_stderr"):
                error = scores.get(f"{metric}_stderr")
                lines.append(f"| {document['task']} | {metric} | {_number(value)} | {_number(error)} |")
    return "\n".join(lines)


def _cost(trained: TrainedModel, facts: Facts) -> str:
    if not facts.segments:
        return ""

    def dollars(amount: float | None) -> str:
        return "not known" if amount is None else f"${amount:,.2f}"

    segments = f"{facts.segments} segment{'s' * (facts.segments != 1)}"
    lines = ["## Cost", "", f"- training: {dollars(facts.spent_usd)} {BY_LEDGER}, {segments}"]
    if facts.evaluation_usd is not None:
        lines.append(f"- evaluation: {dollars(facts.evaluation_usd)} {BY_LEDGER}")
    return "\n".join(lines)


def thinned(values: Sequence[int], count: int) -> list[int]:
    """At most `count` of the values, evenly spaced. The last value is always among them."""
    if len(values) <= count:
        return list(values)
    return [values[(index + 1) * len(values) // count - 1] for index in range(count)]


def _curve(run: Run, kind: str, name: str, last_step: int) -> list[tuple[int, float]]:
    """(step, value) of a metric for each kept step up to `last_step`. Empty for imported weights."""
    points = [(point.step, point.values.get(name)) for point in run.points(kind)]
    return [(step, loss) for step, loss in points if step <= last_step and loss is not None]


def draw_curve(path: Path, train: Sequence[tuple[int, float]], validation: Sequence[tuple[int, float]]) -> str | None:
    """Draws the losses by step and returns the file's name. None if there are too few points or no matplotlib."""
    if len(train) < 2:
        return None
    try:
        from matplotlib.figure import Figure
    except ImportError:
        log.info("the model card has no loss curve: matplotlib is not installed (pip install matplotlib)")
        return None
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*train, strict=True), linewidth=1, color="#8aa4c8", label="training")
    if validation:
        axes.plot(*zip(*validation, strict=True), marker="o", markersize=4, color="#c2452d", label="validation")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    return path.name


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _number(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}" if isinstance(value, float) else json.dumps(value)
