"""README.md of an exported model, out of what the run itself has recorded: nothing is typed in, nothing is guessed.

What is not known is left out, or said to be unknown.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from core.data import manifest
from core.data.vocabulary import GPT2_VOCAB_SIZE
from core.errors import LauncherError
from core.run.folder import RunFolder
from core.run.model import Run
from core.run.reader import Detail, read_run
from core.settings import loader as settings
from core.settings.model import ModelConfig, parameters
from trainer.evals import results
from trainer.weights import huggingface
from trainer.weights.open import Opened

POINTS = 12  # of the loss curve's table


@dataclass
class Facts:
    """What a run knows about a checkpoint of its own. `spent_usd` is None where a price or a time is not known."""

    train: list[tuple[int, float]] = field(default_factory=list)  # step, loss
    held_out: list[tuple[int, float]] = field(default_factory=list)
    evaluations: Sequence[Mapping[str, Any]] = ()
    data: manifest.Manifest | None = None
    segments: int = 0
    spent_usd: float | None = None
    evaluation_usd: float | None = None


def gather(opened: Opened) -> Facts:
    """Read the run's metrics, evaluations, data manifest and ledger; nothing for a model that is no run of ours."""
    facts = Facts()
    if not opened.run_url:
        return facts
    facts.evaluations = results.read_all(results.folder_of(opened, ""))
    if opened.data_url:
        try:
            facts.data = manifest.read(opened.data_url)
        except LauncherError:
            facts.data = None  # moved or removed since: the card says less
    facts.segments = len(RunFolder(opened.run_url).segment_numbers())
    if facts.segments:
        run = read_run(opened.run_url, Detail.ALL)
        facts.spent_usd = run.usd
        facts.train = _curve(run, "train", "loss", opened.step)
        facts.held_out = _curve(run, "eval", "val_loss", opened.step)
    evaluations = RunFolder(opened.run_url).evaluations
    if RunFolder(evaluations).segment_numbers():
        facts.evaluation_usd = read_run(evaluations, Detail.MONEY).usd
    return facts


def write(opened: Opened, facts: Facts, dtype: str, curve: str | None, gguf: str | None = None) -> str:
    """Markdown with the Hub's front matter. `curve` and `gguf` are names of files beside it."""
    kind = huggingface.kind_of(opened.model.config)
    name = (opened.run_url or opened.name).rstrip("/").rpartition("/")[2]
    library = "gguf" if gguf else "transformers"
    head = ["---", f"library_name: {library}", "pipeline_tag: text-generation", "tags: [pretrain-launcher]", "---"]
    parts = [
        "\n".join(head),
        f"# {name}",
        f"```sh\nllama-cli -m {gguf}\n```" if gguf else _usage(kind),
        _model(opened, kind, dtype),
        _data(opened, facts),
        _training(opened, facts, curve),
        _evaluation(facts),
        _cost(opened, facts),
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


def _model(opened: Opened, kind: str, dtype: str) -> str:
    config = opened.model.config
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
        lines.append(f"- {config.padded_vocab_size - GPT2_VOCAB_SIZE} rows that padded it in training are cut off")
    unusual = {key: value for key, value in chosen.items() if key not in ("layers", "heads", "width", "context")}
    if unusual:
        lines.append(f"- other than GPT-2: {', '.join(f'{key} {value}' for key, value in unusual.items())}")
    if opened.state.get("origin"):
        lines.append(f"- began with the weights of {opened.state['origin']}")
    return "\n".join(lines)


def _data(opened: Opened, facts: Facts) -> str:
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


def _training(opened: Opened, facts: Facts, curve: str | None) -> str:
    if not opened.step:
        return ""
    lines = ["## Training", "", f"- {opened.step:,} steps, {opened.state.get('tokens', 0):,} tokens"]
    flat = settings.flatten(opened.state.get("config", {}))
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
        held_out = dict(facts.held_out)
        steps = sorted({*thinned([step for step, _ in facts.train], POINTS), *thinned(sorted(held_out), POINTS)})
        train = dict(facts.train)
        for step in steps:
            lines.append(f"| {step:,} | {_loss(train.get(step))} | {_loss(held_out.get(step))} |")
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


def _cost(opened: Opened, facts: Facts) -> str:
    if not facts.segments:
        return ""

    def dollars(amount: float | None) -> str:
        return "not known" if amount is None else f"${amount:,.2f}"

    stretches = f"{facts.segments} stretch{'es' * (facts.segments != 1)} of machine time"
    lines = ["## Cost", "", f"- training: {dollars(facts.spent_usd)}, {stretches}"]
    if facts.evaluation_usd is not None:
        lines.append(f"- evaluation: {dollars(facts.evaluation_usd)}")
    return "\n".join(lines)


def thinned(values: Sequence[int], count: int) -> list[int]:
    """About `count` of them, evenly, the last one among them."""
    if len(values) <= count:
        return list(values)
    return [values[(index + 1) * len(values) // count - 1] for index in range(count)]


def _curve(run: Run, kind: str, name: str, last_step: int) -> list[tuple[int, float]]:
    """A metric by kept step, up to one; empty for weights that were imported, not trained here."""
    points = [(point.step, point.values.get(name)) for point in run.points(kind)]
    return [(step, loss) for step, loss in points if step <= last_step and loss is not None]


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _number(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}" if isinstance(value, float) else json.dumps(value)
