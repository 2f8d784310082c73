"""Declares the settings of fine-tuning, preference optimisation, distillation and synthetic data."""

from dataclasses import dataclass
from typing import Literal

from core import urls
from core.settings.loader import Bounded, require, section, setting
from core.settings.run import shutdown_reserve
from core.settings.training import STAGE, PretrainConfig, TrainingConfig, TrainLoopConfig


@dataclass(frozen=True)
class ExamplesConfig(Bounded):
    """The source of examples, and their length and split."""

    url: str = setting(
        "",
        "dataset (local, s3://, gs://, az://) with the sets; empty: the dataset that start.weights was trained on",
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
    length: int = setting(0, "tokens per sequence; longer examples are cut at their end. 0: the model's context", ge=0)
    val_fraction: float = setting(
        0.05, "fraction of the examples for validation, chosen by a hash of their question", ge=0, lt=1
    )
    max_bad_fraction: float = setting(
        0.01,
        "largest allowed fraction of unusable rows: rows without an answer or of an unknown form. They are skipped; a "
        "larger fraction is an error",
        ge=0,
        le=1,
    )

    def __post_init__(self):
        super().__post_init__()
        require(bool(self.examples), "examples", "is empty; name a set or a .jsonl file")


@dataclass(frozen=True)
class PairsConfig(ExamplesConfig):
    """The source of pairs of answers, and their length and split."""

    examples: str = setting(
        "preferences",
        "name of a set below url/sets, or a .jsonl file (local, s3://, gs://, az://)",
        identity=False,
        check=urls.mistake,
    )


LayerName = Literal["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]


@dataclass(frozen=True)
class LoraConfig(Bounded):
    """Low-rank adapters (Hu et al. 2021). If there are adapters, no other weights are trained."""

    rank: int = setting(0, "rank of the adapters; 0: no adapters, all weights train", ge=0)
    alpha: float = setting(16.0, "the output of an adapter is multiplied by alpha / rank", gt=0)
    targets: tuple[LayerName, ...] = setting(
        ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"), "layers of every block that get an adapter"
    )

    def __post_init__(self):
        super().__post_init__()
        require(not self.rank or bool(self.targets), "targets", "is empty, so nothing would train")


MODEL_NAME = "a run, a checkpoint, a folder in Hugging Face's form, or a public name such as gpt2"


@dataclass(frozen=True)
class StartConfig(Bounded):
    """The weights to begin with."""

    weights: str = setting("", MODEL_NAME + "; with stage=dpo also the reference model", check=urls.mistake_in_model)

    def __post_init__(self):
        super().__post_init__()
        require(bool(self.weights), "weights", f"is empty; name {MODEL_NAME}")


@dataclass(frozen=True)
class OptionalStartConfig(Bounded):
    """The weights to begin with, or none."""

    weights: str = setting(
        "", f"{MODEL_NAME}, of the same architecture; empty: random weights", check=urls.mistake_in_model
    )


@dataclass(frozen=True)
class TuningLoopConfig(TrainLoopConfig):
    """Length and intervals of the run, and the computation of a step."""

    epochs: float = setting(
        0.0,
        "passes over the examples, from which the number of steps follows; 0: use `steps`",
        ge=0,
        replaces=("steps", "tokens"),
    )


@dataclass(frozen=True)
class FinetuneConfig(TrainingConfig):
    """Fine-tuning on conversations."""

    stage: Literal["finetune"] = setting("finetune", STAGE)
    train: TuningLoopConfig = section(TuningLoopConfig)
    data: ExamplesConfig = section(ExamplesConfig)
    start: StartConfig = section(StartConfig)
    lora: LoraConfig = section(LoraConfig)

    def __post_init__(self):
        super().__post_init__()
        if self.lora.rank:
            require(self.optimizer.name == "adamw", "optimizer.name", "is muon, which does not fit adapters; set adamw")
            require(self.train.precision != "fp8", "train.precision", "is fp8, which adapters do not have; set bf16")


@dataclass(frozen=True)
class PreferenceConfig(Bounded):
    """Direct preference optimisation (Rafailov et al. 2023)."""

    beta: float = setting(0.1, "weight of the penalty for divergence from the reference model", gt=0)
    label_smoothing: float = setting(
        0.0,
        "assumed fraction of pairs whose labels are swapped (conservative DPO, Mitchell 2023)",
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
            f"is {self.batch.micro_batch_size}, must be even, because a pair is two sequences",
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
        0.5, "weight of the KL divergence from the teacher; cross-entropy has the weight 1 - kl_weight", gt=0, le=1
    )


@dataclass(frozen=True)
class DistilConfig(PretrainConfig):
    """Distillation: pretraining with a teacher."""

    stage: Literal["distil"] = setting("distil", STAGE)
    start: OptionalStartConfig = section(OptionalStartConfig)
    teacher: TeacherConfig = section(TeacherConfig)
    distil: DistillationConfig = section(DistillationConfig)


# --- synthetic data --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EndpointConfig(Bounded):
    """An OpenAI-compatible server."""

    url: str = setting("https://api.openai.com/v1", "the server's base URL", env="OPENAI_BASE_URL", identity=False)
    model: str = setting("", "name of the model at the server")
    concurrency: int = setting(8, "concurrent calls", identity=False, gt=0)
    timeout_seconds: float = setting(120.0, "time limit of one call, in seconds", identity=False, gt=0)
    attempts: int = setting(6, "calls for one answer before its prompt is skipped", identity=False, gt=0)
    max_wait_seconds: float = setting(
        120.0,
        "longest pause in seconds before a call is repeated, even if the server's Retry-After is longer",
        identity=False,
        gt=0,
    )
    limit_parameter: Literal["max_tokens", "max_completion_tokens"] = setting(
        "max_tokens", "the server's name for make.max_tokens; newer models need max_completion_tokens", identity=False
    )
    omit: tuple[Literal["temperature", "top_p"], ...] = setting(
        (), "sampling parameters that are not sent, for a model that refuses them", identity=False
    )

    def __post_init__(self):
        super().__post_init__()
        require(bool(self.model), "model", "is empty; name the model that answers")
        require(
            self.url.startswith(("http://", "https://")), "url", f"is {self.url!r}, must begin with http:// or https://"
        )


@dataclass(frozen=True)
class BudgetConfig(Bounded):
    """The most that all answers may cost, and the prices of the server."""

    max_usd: float = setting(
        0.0, "limit in dollars of the cost of all calls; required if answers have a price", identity=False, ge=0
    )
    usd_per_million_input: float = setting(0.0, "price of a million prompt tokens in dollars", identity=False, ge=0)
    usd_per_million_output: float = setting(0.0, "price of a million answer tokens in dollars", identity=False, ge=0)

    def __post_init__(self):
        super().__post_init__()
        priced = self.usd_per_million_input or self.usd_per_million_output
        require(
            bool(self.max_usd) or not priced,
            "max_usd",
            "is 0, but answers have a price; set the most that they may cost",
        )
        require(
            bool(priced) or not self.max_usd,
            "usd_per_million_output",
            "is 0 like usd_per_million_input, so nothing would be counted against max_usd; set the endpoint's prices",
        )


@dataclass(frozen=True)
class MakeConfig(Bounded):
    """The prompts, the set to which answers are added as rows, and the sampling of the answers."""

    prompts: str = setting(
        "",
        "file of prompts: .txt, one per line, or .jsonl with `prompt` or `messages`",
        identity=False,
        check=urls.mistake,
    )
    url: str = setting("", "dataset to which the set is added", env="DATA_URL", identity=False, check=urls.mistake)
    name: str = setting("synthetic", "name of the set: url/sets/NAME.jsonl", identity=False)
    licence: str = setting(
        "", "terms under which the answers may be used; part of the set's description", identity=False
    )
    system: str = setting("", "system message of every call; not part of the rows")
    answers: int = setting(1, "answers per prompt", gt=0)
    temperature: float = setting(0.7, "temperature of the sampling at the endpoint")
    top_p: float = setting(1.0, "top_p of the sampling at the endpoint")
    max_tokens: int = setting(512, "longest answer; an answer that is cut off there is skipped", gt=0)
    retry_declined: bool = setting(False, "ask again the prompts that the server declined before", identity=False)

    def __post_init__(self):
        super().__post_init__()
        for key, remedy in (
            ("prompts", "name a file"),
            ("url", "set it with --make.url=... or with DATA_URL"),
            ("licence", "name the terms under which the answers may be used, for those who train on the rows"),
        ):
            require(bool(getattr(self, key)), key, f"is empty; {remedy}")


@dataclass(frozen=True)
class WorkConfig(Bounded):
    """The folder of the run, and the money for its machines."""

    url: str = setting(
        "",
        "folder for calls, answers and ledger (local, s3://, gs://, az://)",
        env="RUN_URL",
        identity=False,
        check=urls.mistake,
    )

    max_usd: float = setting(
        0.0,
        "hard cap in dollars for the machines of all segments together; budget.max_usd caps the endpoint; 0: no cap",
        identity=False,
        ge=0,
    )
    shutdown_reserve_seconds: float = shutdown_reserve()

    def __post_init__(self):
        super().__post_init__()
        require(bool(self.url), "url", "is empty; set it with --run.url=... or with RUN_URL")


@dataclass(frozen=True)
class SynthesisConfig:
    """Settings of `python -m trainer.synthesize`."""

    run: WorkConfig = section(WorkConfig)
    make: MakeConfig = section(MakeConfig)
    endpoint: EndpointConfig = section(EndpointConfig)
    budget: BudgetConfig = section(BudgetConfig)
