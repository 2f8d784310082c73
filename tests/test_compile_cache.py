"""trainer.loop.compile_cache: a second process finds what the first one compiled. Slow: a compiler runs."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
PROGRAM = """
import sys, torch
from torch._dynamo.utils import counters
from core.settings.training import ModelConfig
from trainer import compile_cache

uri = compile_cache.uri_of(sys.argv[1], ModelConfig(), 4, "cpu")
found = compile_cache.load(uri)
torch.compile(lambda x: (x * 2 + 1).relu().sum())(torch.ones(64))
compile_cache.save(uri)
print(found, counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"])
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs g++")
def test_the_second_process_compiles_nothing(tmp_path: Path):
    answers = []
    for number in (1, 2):
        # Each with an empty local cache, as on a new machine.
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / f"local-{number}")}
        command = [sys.executable, "-c", PROGRAM, str(tmp_path / "run")]
        result = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        answers.append(result.stdout.split())
    assert answers == [["False", "0", "1"], ["True", "1", "0"]]
