"""How fast this machine reads prompts and writes texts with a model, and how much memory that takes."""

import random
import resource
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch

from trainer.inference.engine import Engine, Request
from trainer.inference.sampling import Sampling

PROMPT_TOKENS, NEW_TOKENS = 256, 32
ROWS = (1, 8)
PATIENCE_SECONDS = 60.0  # more rows are left out where they would take longer


class Speed(NamedTuple):
    """Tokens per second of all rows together: `prefill` of prompts, `decode` of new tokens, each chosen."""

    rows: int
    prompt_tokens: int
    new_tokens: int
    prefill: float
    decode: float


class Memory(NamedTuple):
    """`cache_bytes` per token of one text; `peak_bytes` of the process, on a GPU of what torch allocated there."""

    weights_bytes: int
    cache_bytes: int
    peak_bytes: int


def measure(engine: Engine) -> Iterator[Speed]:
    """One result per number of rows, after a round that does not count. In an engine of its own, on the same model."""
    prompt_tokens = min(PROMPT_TOKENS, engine.context // 2)
    new_tokens = min(NEW_TOKENS, engine.context - prompt_tokens)
    _round(engine, 1, prompt_tokens, new_tokens)
    seconds = 0.0
    for rows in ROWS:
        if seconds * rows > PATIENCE_SECONDS:
            return
        start = time.monotonic()
        yield _round(engine, rows, prompt_tokens, new_tokens)
        seconds = time.monotonic() - start


def memory(engine: Engine) -> Memory:
    config = engine.model.config
    weights = sum(parameter.numel() * parameter.element_size() for parameter in engine.model.parameters())
    cache = 2 * config.layers * config.width * engine.dtype.itemsize
    if engine.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(engine.device)
    else:
        # Kilobytes on Linux, bytes on macOS (getrusage(2)).
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Memory(weights, cache, peak)


def _round(engine: Engine, rows: int, prompt_tokens: int, new_tokens: int) -> Speed:
    own = Engine(engine.model, engine.encoding, engine.device, engine.precision, rows)
    source = random.Random(0)
    sampling = Sampling(tokens=new_tokens, seed=0)
    for _ in range(rows):
        prompt = [source.randrange(engine.vocabulary) for _ in range(prompt_tokens)]
        own.add(Request(prompt, sampling, endless=True))
    start = time.monotonic()
    read = 0
    while own.waiting:  # each of these steps takes in prompts; the step ends when its tokens are here
        read += len(own.step())
    middle = time.monotonic()
    written = 0
    while own.busy:
        written += len(own.step())
    return Speed(
        rows,
        prompt_tokens,
        new_tokens,
        read * prompt_tokens / (middle - start),
        written / (time.monotonic() - middle),
    )
