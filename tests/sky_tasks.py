"""Task files written by hand, for tests of the forecast."""

import textwrap
from pathlib import Path

GPT2 = "torchrun --nproc-per-node=8 -m trainer.train trainer/configs/gpt2-124m.yaml --run.url=$RUN_URL"


def write(path: Path, resources: str, run: str = GPT2, more: str = "") -> str:
    file = path / "task.yaml"
    lines = textwrap.indent(textwrap.dedent(resources).strip(), "  ")
    file.write_text(
        f"name: example\nresources:\n{lines}\n{more}\nenvs: {{RUN_URL: '', DATA_URL: ''}}\nrun: |\n  {run}\n"
    )
    return str(file)
