"""Every setting of what follows pretraining: fine-tuning, distillation, preference optimisation, synthetic data."""

from dataclasses import dataclass
from typing import Literal

from core import urls
from core.settings.loader import Bounded, require, section, setting
from core.settings.model import ModelConfig
from core.settings.training import (
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    OptimizerConfig,
    RunConfig,
    TrainLoopConfig,
)


@dataclass(frozen=True)
class RowsConfig(Bounded):
    """Where examples come from, and how they become sequences."""

    url: str = setting(
        "",
        "token set (local, s3://, gs://, az://) beside which sets lie; empty: the one that the start was trained on",
        env="DATA_URL",
        identity=False,
        check=urls.mistake,
    )
    examples: str = setting(
        "instructions",
        "name of a set below url/sets, or a .jsonl file (local, s3://, gs://, az://)",
        identity=False,
        check=urls.mistake,
    )
    length: int = setting(0, "tokens per sequence; what is longer is cut at its end. 0: the model's context", ge=0)
    val_fraction: float = setting(0.05, "share of the examples that is held out, by hash of their question", ge=0, lt=1)
    max_bad_fraction: float = setting(
        0.01,
        "share of rows without an answer, or of another form, at which to stop; below it they are left out",
        ge=0,
        le=1,
    )

    def __post_init__(self):
        super().__post_init__()
        require(bool(self.examples), "examples", "is empty; name a set or a .jsonl file")


@dataclass(frozen=True)
class PairsConfig(RowsConfig):
    """Where pairs of answers come from, and how they become sequences."""

    examples: str = setting(
        "preferences",
        "name of a set below url/sets, or a .jsonl file (local, s3://, gs://, az://)",
        identity=False,
        check=urls.mistake,
    )


LayerName = Literal["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]


@dataclass(frozen=True)
class LoraConfig(Bounded):
    """Low-rank adapters (Hu et al. 2021) instead of all weights."""

    rank: int = setting(0, "of the adapters; 0: all weights train", ge=0)
    alpha: float = setting(16.0, "adapters count alpha / rank times", gt=0)
    targets: tuple[LayerName, ...] = setting(
        ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"), "layers of every block that get one"
    )

    def __post_init__(self):
        super().__post_init__()
        require(not self.rank or bool(self.targets), "targets", "is empty, so that nothing would train")


def _check_start(start: str) -> None:
    require(
        bool(start),
        "start",
        "is empty; name a run, a checkpoint, a folder in Hugging Face's form, or gpt2 and the like",
    )


START = "weights to begin with: a run, a checkpoint, a folder in Hugging Face's form, or a public name such as gpt2"
EPOCHS = "passes over the examples, which give the number of steps; 0: train.steps"


@dataclass(frozen=True)
class StartConfig:
    """What to tune, and how long."""

    start: str = setting("", START, check=urls.mistake_in_model)
    epochs: float = setting(0.0, EPOCHS)

    def __post_init__(self):
        _check_start(self.start)
        require(self.epochs >= 0, "epochs", f"is {self.epochs}, must not be below 0")


@dataclass(frozen=True)
class PreferenceConfig:
    """Direct preference optimisation (Rafailov et al. 2023)."""

    start: str = setting("", START + "; also the reference", check=urls.mistake_in_model)
    epochs: float = setting(0.0, EPOCHS)
    beta: float = setting(0.1, "how dear it is to move away from the reference")
    label_smoothing: float = setting(
        0.0, "share of pairs that are taken to be labelled the wrong way round (Mitchell 2023, conservative DPO)"
    )

    def __post_init__(self):
        _check_start(self.start)
        require(self.epochs >= 0, "epochs", f"is {self.epochs}, must not be below 0")
        require(self.beta > 0, "beta", f"is {self.beta}, must be above 0")
        require(
            0 <= self.label_smoothing < 0.5,
            "label_smoothing",
            f"is {self.label_smoothing}, must be at least 0 and below 0.5",
        )


def _check_lora(config) -> None:
    if config.lora.rank:
        require(config.optimizer.name == "adamw", "optimizer.name", "is muon, which does not fit adapters; set adamw")
        require(config.train.precision != "fp8", "train.precision", "is fp8, which adapters do not have; set bf16")


@dataclass(frozen=True)
class FinetuneConfig:
    """`python -m trainer.finetune`."""

    run: RunConfig = section(RunConfig)
    data: RowsConfig = section(RowsConfig)
    finetune: StartConfig = section(StartConfig)
    lora: LoraConfig = section(LoraConfig)
    batch: BatchConfig = section(BatchConfig)
    optimizer: OptimizerConfig = section(OptimizerConfig)
    train: TrainLoopConfig = section(TrainLoopConfig)
    checkpoint: CheckpointConfig = section(CheckpointConfig)

    def __post_init__(self):
        _check_lora(self)


@dataclass(frozen=True)
class DpoConfig:
    """`python -m trainer.dpo`."""

    run: RunConfig = section(RunConfig)
    data: PairsConfig = section(PairsConfig)
    dpo: PreferenceConfig = section(PreferenceConfig)
    lora: LoraConfig = section(LoraConfig)
    batch: BatchConfig = section(BatchConfig)
    optimizer: OptimizerConfig = section(OptimizerConfig)
    train: TrainLoopConfig = section(TrainLoopConfig)
    checkpoint: CheckpointConfig = section(CheckpointConfig)

    def __post_init__(self):
        _check_lora(self)
        require(
            self.batch.micro_batch_size % 2 == 0,
            "batch.micro_batch_size",
            f"is {self.batch.micro_batch_size}, must be even: a pair is two sequences",
        )


@dataclass(frozen=True)
class TeacherConfig(Bounded):
    """Distillation on the teacher's distributions (Hinton et al. 2015)."""

    teacher: str = setting(
        "",
        "a run, a checkpoint, a folder in Hugging Face's form, a public name such as gpt2-xl; or transformers:NAME for "
        "what only `transformers` can run. Its vocabulary must be GPT-2's",
        check=urls.mistake_in_model,
    )
    start: str = setting(
        "",
        "weights to begin with, named likewise, of the same model; empty: from train.seed",
        check=urls.mistake_in_model,
    )
    temperature: float = setting(2.0, "both distributions are softened by it", gt=0)
    kl_weight: float = setting(
        0.5, "share of the teacher in the loss; the rest is cross-entropy with the data", gt=0, le=1
    )

    def __post_init__(self):
        super().__post_init__()
        require(bool(self.teacher), "teacher", "is empty; name a run, a checkpoint or a public model")


@dataclass(frozen=True)
class DistilConfig:
    """`python -m trainer.distil`."""

    run: RunConfig = section(RunConfig)
    data: DataConfig = section(DataConfig)
    model: ModelConfig = section(ModelConfig)
    distil: TeacherConfig = section(TeacherConfig)
    batch: BatchConfig = section(BatchConfig)
    optimizer: OptimizerConfig = section(OptimizerConfig)
    train: TrainLoopConfig = section(TrainLoopConfig)
    checkpoint: CheckpointConfig = section(CheckpointConfig)


# --- synthetic data --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EndpointConfig(Bounded):
    """An OpenAI-compatible server."""

    url: str = setting("https://api.openai.com/v1", "its base URL", env="OPENAI_BASE_URL", identity=False)
    model: str = setting("", "name of the model there")
    concurrency: int = setting(8, "calls at a time", identity=False, gt=0)
    timeout_seconds: float = setting(120.0, "for one call", identity=False, gt=0)
    attempts: int = setting(6, "calls for one answer, before its prompt is given up", identity=False, gt=0)
    max_wait_seconds: float = setting(
        120.0,
        "longest pause before a call is made again; Retry-After counts up to this",
        identity=False,
        gt=0,
    )

    def __post_init__(self):
        super().__post_init__()
        require(bool(self.model), "model", "is empty; name the model that shall answer")
        require(
            self.url.startswith(("http://", "https://")), "url", f"is {self.url!r}, must begin with http:// or https://"
        )


@dataclass(frozen=True)
class BudgetConfig(Bounded):
    """What the answers may cost, by the endpoint's price list."""

    max_usd: float = setting(0.0, "no call is made that could exceed it; required", identity=False, ge=0)
    usd_per_million_input: float = setting(0.0, "price of a million prompt tokens in dollars", identity=False, ge=0)
    usd_per_million_output: float = setting(0.0, "price of a million answer tokens in dollars", identity=False, ge=0)

    def __post_init__(self):
        super().__post_init__()
        priced = self.usd_per_million_input or self.usd_per_million_output
        require(bool(self.max_usd) or not priced, "max_usd", "is 0, but answers have a price; set what they may cost")
        require(
            bool(priced) or not self.max_usd,
            "usd_per_million_output",
            "is 0, and so is the input's: nothing would be counted against max_usd; set the endpoint's prices",
        )


@dataclass(frozen=True)
class SynthesisConfig(Bounded):
    """What is asked, and where rows go."""

    prompts: str = setting(
        "",
        "file of prompts: .txt, one per line, or .jsonl with `prompt` or `messages`",
        identity=False,
        check=urls.mistake,
    )
    url: str = setting(
        "", "token set beside which the set is stored", env="DATA_URL", identity=False, check=urls.mistake
    )
    name: str = setting("synthetic", "of the set: url/sets/NAME.jsonl", identity=False)
    licence: str = setting(
        "", "what the endpoint's terms allow with its answers; stands in the set's description", identity=False
    )
    system: str = setting("", "system message of every call; not part of the rows")
    answers: int = setting(1, "answers per prompt", gt=0)
    temperature: float = setting(0.7, "of the sampling at the endpoint")
    top_p: float = setting(1.0, "likewise")
    max_tokens: int = setting(512, "longest answer; one that is cut off there is left out", gt=0)

    def __post_init__(self):
        super().__post_init__()
        for key, remedy in (
            ("prompts", "name a file"),
            ("url", "set it, --make.url=... or DATA_URL"),
            ("licence", "say under which terms the answers may be used; whoever trains on the rows will want to know"),
        ):
            require(bool(getattr(self, key)), key, f"is empty; {remedy}")


@dataclass(frozen=True)
class WorkConfig:
    """Where the work is kept."""

    url: str = setting(
        "",
        "folder for calls, answers and ledger (local, s3://, gs://, az://)",
        env="RUN_URL",
        identity=False,
        check=urls.mistake,
    )

    def __post_init__(self):
        require(bool(self.url), "url", "is empty; set it, --run.url=... or RUN_URL")


@dataclass(frozen=True)
class MakeConfig:
    """`python -m trainer.distil make`."""

    run: WorkConfig = section(WorkConfig)
    make: SynthesisConfig = section(SynthesisConfig)
    endpoint: EndpointConfig = section(EndpointConfig)
    budget: BudgetConfig = section(BudgetConfig)
