"""Exported GGUF files in llama.cpp itself."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import models
from tests.test_exchange import exported, small
from trainer.weights.open import open_weights

TEXTS = [
    "My fellow citizens",
    "a  b\n\n c",
    "\u2028x\u0085",
    " 12345678 's't don't I'LL",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 cafe\u0301",
    "\u00a0x\u3000y\t\tz",
    "### User:\nhi\n\n### Assistant:\n",
    "   indented\n    code(x)  #\r\n",
    "\u4e2d\u6587\u0e44\u0e17\u0e22 \u0915\u094d\u0937",
    "x" * 200,
    "1\u00bd \u2460 \u0663",
]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("stem", ["gpt2-124m", "llama-416m"])
def test_llama_cpp_has_the_same_tokens_and_logits(stem: str, dtype: str, tmp_path, vocab_bpe):
    llama_cpp = pytest.importorskip("llama_cpp", reason="pip install llama-cpp-python")
    data_url = models.prepare_data(tmp_path / "data", vocab_bpe)
    choices = dataclasses.replace(small(Path(f"trainer/configs/{stem}.yaml")), context=1024)
    model = models.make_run(str(tmp_path / "run"), data_url, choices)
    encoding = open_weights(str(tmp_path / "run"), torch.device("cpu")).encoding
    path = exported(str(tmp_path / "run"), tmp_path / "out", "--format=gguf", f"--dtype={dtype}")
    theirs = llama_cpp.Llama(str(path / f"run-{dtype}.gguf"), n_ctx=0, logits_all=True, verbose=False)
    for text in TEXTS:
        tokens = encoding.encode_ordinary(text)
        assert theirs.tokenize(text.encode(), add_bos=False, special=False) == tokens
        assert theirs.detokenize(tokens) == text.encode()
    tokens = encoding.encode_ordinary(" ".join(TEXTS[:4]))
    theirs.eval(tokens)
    found = torch.from_numpy(np.array(theirs.scores[: len(tokens)]))
    with torch.no_grad():
        ours = model(torch.tensor([tokens]))[0, :, :50257]
    torch.testing.assert_close(found, ours, rtol=0, atol=0.01 * float(ours.abs().max()))
