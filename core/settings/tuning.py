"""Every setting of what follows pretraining: fine-tuning, distillation, preference optimisation, synthetic data."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from core import urls
from core.errors import ConfigError
from core.settings import loader
from core.settings.loader import Bounded, require, section, setting
from core.settings.training import STAGE, PretrainConfig, TrainingConfig, TrainLoopConfig


@dataclass(frozen=True)
class ExamplesConfig(Bounded):
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
class PairsConfig(ExamplesConfig):
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


MODEL_NAME = "a run, a checkpoint, a folder in Hugging Face's form, or a public name such as gpt2"


@dataclass(frozen=True)
class StartConfig(Bounded):
    """The weights to begin with."""

    weights: str = setting("", MODEL_NAME + "; of dpo also the reference", check=urls.mistake_in_model)

    def __post_init__(self):
        super().__post_init__()
        require(bool(self.weights), "weights", f"is empty; name {MODEL_NAME}")


@dataclass(frozen=True)
class OptionalStartConfig(Bounded):
    """The weights to begin with, or none."""

    weights: str = setting(
        "", f"{MODEL_NAME}, of the same model; empty: random, from train.seed", check=urls.mistake_in_model
    )


@dataclass(frozen=True)
class TuningLoopConfig(TrainLoopConfig):
    """Length, cadence, and how the step is computed."""

    epochs: float = setting(0.0, "passes over the examples, which give the number of steps; 0: train.steps", ge=0)


@dataclass(frozen=True)
class FinetuneConfig(TrainingConfig):
    """Fine-tuning on conversations."""

    stage: Literal["finetune"] = setting("finetune", STAGE)
    train: TuningLoopConfig = section(TuningLoopConfig)
    data: ExamplesConfig = section(ExamplesConfig)
    start: StartConfig = section(StartConfig)
    lora: LoraConfig = section(LoraConfig)

    def __post_init__(self):
        if self.lora.rank:
            require(self.optimizer.name == "adamw", "optimizer.name", "is muon, which does not fit adapters; set adamw")
            require(self.train.precision != "fp8", "train.precision", "is fp8, which adapters do not have; set bf16")


@dataclass(frozen=True)
class PreferenceConfig(Bounded):
    """Direct preference optimisation (Rafailov et al. 2023)."""

    beta: float = setting(0.1, "weight of the divergence from the reference", gt=0)
    label_smoothing: float = setting(
        0.0,
        "share of pairs that are taken to be labelled the wrong way round (Mitchell 2023, conservative DPO)",
        ge=0,
        lt=0.5,
    )


@dataclass(frozen=True)
class DpoConfig(FinetuneConfig):
    """Preference optimisation on pairs of answers."""

    stage: Literal["dpo"] = setting("dpo", STAGE)
    data: PairsConfig = section(PairsConfig)
    dpo: PreferenceConfig = section(PreferenceConfig)

    def __post_init__(self):
        super().__post_init__()
        require(
            self.batch.micro_batch_size % 2 == 0,
            "batch.micro_batch_size",
            f"is {self.batch.micro_batch_size}, must be even: a pair is two sequences",
        )


@dataclass(frozen=True)
class TeacherConfig(Bounded):
    """The model to learn from."""

    weights: str = setting(
        "",
        "a run, a checkpoint, a folder in Hugging Face's form, a public name such as gpt2-xl; or transformers:NAME for "
        "a model that only `transformers` can run. Its vocabulary must be GPT-2's",
        check=urls.mistake_in_model,
    )

    def __post_init__(self):
        super().__post_init__()
        require(bool(self.weights), "weights", "is empty; name a run, a checkpoint or a public model")


@dataclass(frozen=True)
class DistillationConfig(Bounded):
    """Distillation on the teacher's distributions (Hinton et al. 2015)."""

    temperature: float = setting(2.0, "divides the logits of both models before the softmax", gt=0)
    kl_weight: float = setting(
        0.5, "share of the divergence in the loss; the rest is cross-entropy with the data", gt=0, le=1
    )


@dataclass(frozen=True)
class DistilConfig(PretrainConfig):
    """Distillation: pretraining with a teacher."""

    stage: Literal["distil"] = setting("distil", STAGE)
    start: OptionalStartConfig = section(OptionalStartConfig)
    teacher: TeacherConfig = section(TeacherConfig)
    distil: DistillationConfig = section(DistillationConfig)


STAGES: dict[str, type[TrainingConfig]] = {
    "pretrain": PretrainConfig,
    "finetune": FinetuneConfig,
    "dpo": DpoConfig,
    "distil": DistilConfig,
}


def training_schema(arguments: Sequence[str]) -> type[TrainingConfig]:
    """The schema of the stage that `--stage=...` or the config file names; without either, pretraining's.

    Raises ConfigError for an unknown stage and for a file that cannot be read.
    """
    name, where = loader.peek("stage", arguments) or ("pretrain", "")
    if name not in STAGES:
        raise ConfigError(f"{where}: stage is {name!r}, must be one of {', '.join(STAGES)}")
    return STAGES[name]


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
class MakeConfig(Bounded):
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
class SynthesisConfig:
    """`python -m trainer.synthesize`."""

    run: WorkConfig = section(WorkConfig)
    make: MakeConfig = section(MakeConfig)
    endpoint: EndpointConfig = section(EndpointConfig)
    budget: BudgetConfig = section(BudgetConfig)
