"""What an export may be told (`python -m trainer.export --help`). Torch-free."""

from dataclasses import dataclass
from typing import Literal

from core.settings.loader import setting


@dataclass(frozen=True)
class ExportConfig:
    """`python -m trainer.export`."""

    format: Literal["huggingface", "gguf"] = setting(
        "huggingface", "a folder for transformers, or one with a file for llama.cpp and its relatives"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = setting("float32", "numbers of the weights")
    publish: str = setting(
        "", "also store the folder there: hf:OWNER/NAME (with HF_TOKEN), or a URL such as s3://bucket/models/name"
    )
    private: bool = setting(True, "a repository that publishing creates on the Hub is private")
