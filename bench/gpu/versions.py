"""Reports the machine, the versions of packages, and the missing packages; a measurement of bench.on_gpu."""

import importlib.metadata
import importlib.util
import os
import platform

import torch

from bench import harness
from bench.gpu import records

OURS = (
    "aiohttp boto3 botocore datasets dotenv fsspec gigatoken huggingface_hub numpy pyarrow pytest rich s3fs "
    "safetensors tiktoken torchao triton xxhash yaml"
).split()


def main() -> None:
    missing = [name for name in OURS if not _is_installed(name)]
    versions = {name: version for name in OURS if (version := _version(name))}
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None,
        "nvidia_smi": records.gpu_facts() or None,
        "cores": os.cpu_count(),
        "versions": versions,
        "missing": missing,
    }
    if torch.cuda.is_available():
        facts = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": facts.name,
            "compute_capability": f"{facts.major}.{facts.minor}",
            "memory_bytes": facts.total_memory,
            "multiprocessors": facts.multi_processor_count,
        }
    gpu = f"{found['gpu']}, {found['memory_bytes'] / 1e9:.0f} GB" if "gpu" in found else "no GPU"
    text = f"torch {found['torch']}, CUDA {found['cuda']}, cuDNN {found['cudnn']}, {gpu}, Python {found['python']}"
    harness.say(f"{text}\nnot installed: {', '.join(missing) or 'nothing'}", **found)


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:
        return False


def _version(name: str) -> str:
    names = {"dotenv": "python-dotenv", "yaml": "PyYAML", "huggingface_hub": "huggingface-hub"}
    try:
        return importlib.metadata.version(names.get(name, name))
    except importlib.metadata.PackageNotFoundError:
        return ""


if __name__ == "__main__":
    main()
