"""A server of trainer.serve in a process of its own, and what it should answer."""

import contextlib
import dataclasses
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE

from core.data import chat_template
from core.settings.inference import Sampling
from tests import checkpoints, warm
from tests.conftest import REPOSITORY
from tests.patience import PATIENCE_SECONDS
from trainer.inference.engine import Engine, GenerationRequest

CONFIG = dataclasses.replace(checkpoints.SMALL, context=1024)
KEY = "correct-horse-battery"
HELLO = [{"role": "user", "content": "Hello"}]


def runs_in(folder: Path) -> Path:
    """Store the runs `base` and `tuned` there."""
    checkpoints.store(str(folder / "base"), checkpoints.random_model(CONFIG))
    checkpoints.store(str(folder / "tuned"), checkpoints.random_model(CONFIG, seed=1), template=chat_template.NAME)
    return folder


@contextlib.contextmanager
def serving(run: Path | None, vocab_bpe: Path, *flags: str, key: str = "", **more: str) -> Iterator[str]:
    """URL of a server in a process of its own, which must end well when asked to. `more` are variables."""
    environment = {**os.environ, "VOCAB_URL": str(vocab_bpe), "SERVE_API_KEY": key, "OMP_NUM_THREADS": "1", **more}
    names = [str(run)] if run else []
    command = [sys.executable, "-m", "trainer.serve", *names, "--port=0", *flags]
    process = warm.Popen(command, cwd=REPOSITORY, env=environment, stderr=PIPE, text=True)
    try:
        said = ""
        for line in process.stderr:
            said += line
            if match := re.search(r"page at (http://\S+)/,", line):
                break
        else:
            raise AssertionError(said)
        yield match[1]
        process.send_signal(signal.SIGTERM)
        _, rest = process.communicate(timeout=PATIENCE_SECONDS)
        assert process.returncode == 0, rest
        assert "Traceback" not in rest
        assert not key or key not in said + rest
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def locally(engine: Engine, prompt: list[int], **sampling) -> str:
    return engine.complete([GenerationRequest(prompt, Sampling(**sampling))])[0].text
