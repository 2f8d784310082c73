"""Declares the settings of programs that use a trained model: sampling, serving, export. Imports no torch."""

from dataclasses import dataclass
from typing import Literal

from core.settings.loader import Bounded, require, setting
from core.settings.run import shutdown_reserve


@dataclass(frozen=True)
class Sampling(Bounded):
    """Sampling settings of one request, applied in this order, as in `transformers`."""

    max_tokens: int = setting(128, "maximum number of new tokens; a text also ends at the model's context", ge=1)
    repetition_penalty: float = setting(
        1.0,
        "a token that the text already has becomes less likely: its logit is divided by this number if it is positive, "
        "and multiplied if it is negative (Keskar et al. 2019); 1: off",
        ge=0.01,
        le=100,
    )
    temperature: float = setting(0.8, "divides the logits; 0: always choose the likeliest token", ge=0)
    top_k: int = setting(50, "choose among the k likeliest tokens; 0: all", ge=0)
    top_p: float = setting(
        1.0, "choose among the likeliest tokens that have this probability together (Holtzman et al. 2020)", gt=0, le=1
    )
    min_p: float = setting(
        0.0,
        "choose among tokens with at least this fraction of the highest probability (Nguyen et al. 2024); 0: off",
        ge=0,
        le=1,
    )
    seed: int | None = setting(None, "the same seed gives the same text; none: a new seed each time")
    stop: tuple[str, ...] = setting((), "texts before which generation stops, separated by commas; \\n is a line break")

    def __post_init__(self):
        super().__post_init__()
        require(all(self.stop), "stop", f"is {self.stop}, must not hold an empty text")


@dataclass(frozen=True)
class InferenceOptions(Bounded):
    """Device, precision and batch size of inference."""

    device: Literal["auto", "cuda", "cpu"] = setting("auto", "auto: a GPU if there is one")
    precision: Literal["auto", "bf16", "fp32"] = setting("auto", "auto: bf16 on a GPU, fp32 on a CPU")
    max_batch_size: int = setting(16, "number of texts computed together; further requests wait", ge=1)


@dataclass(frozen=True)
class ServeConfig(InferenceOptions, Sampling):
    """Settings of `trainer.serve`. The settings of Sampling are defaults that a request can override."""

    host: str = setting(
        "127.0.0.1", "address to listen on; any address except loopback needs SERVE_API_KEY in the environment"
    )
    port: int = setting(8000, "port; 0: a free one", ge=0, le=65535)
    name: str = setting("", "the model's name in the API; empty: the last part of the checkpoint's URL")
    idle_minutes: float = setting(0.0, "minutes without a request after which the server ends; 0: never", ge=0)
    max_usd: float = setting(
        0.0,
        "hard cap in dollars for all servers of the run at RUN_URL together; 0: no cap",
        ge=0,
    )
    shutdown_reserve_seconds: float = shutdown_reserve(identity=True)
    queue: int = setting(256, "limit of texts in progress and waiting; further requests get the status 429", ge=1)


@dataclass(frozen=True)
class ExportConfig(Bounded):
    """Settings of `python -m trainer.export`."""

    format: Literal["huggingface", "gguf"] = setting(
        "huggingface", "huggingface: a folder for transformers; gguf: one file for llama.cpp and compatible programs"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = setting("float32", "data type of the exported weights")
    publish: str = setting(
        "", "also store the folder at hf:OWNER/NAME (needs HF_TOKEN) or at a URL such as s3://bucket/models/name"
    )
    private: bool = setting(True, "if `publish` creates a repository on the Hub, make it private")
    max_usd: float = setting(
        0.0, "no export begins once exports of the run at RUN_URL have cost this many dollars; 0: no cap", ge=0
    )
