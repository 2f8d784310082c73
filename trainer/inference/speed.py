"""Measures generation on this machine: tokens per second, memory, and the time that the KV cache saves.

    for found in measure_speed(engine): ...     # the speed for synthetic prompts of one length
    timed(engine, request)                      # the seconds for one text

Each measurement uses a new engine on the same model.
"""

import random
import resource
import statistics
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch

from core.settings.inference import Sampling
from trainer.inference.engine import Engine, GenerationRequest

PROMPT_TOKENS, NEW_TOKENS = 256, 32  # length of the synthetic prompts and of the answers, in tokens
BATCH_SIZES = (1, 8)
ROUNDS = 3
PATIENCE_SECONDS = 60.0  # a batch size that would take longer is skipped


class Timed(NamedTuple):
    """One text: its new tokens, and the seconds from the request to the last of them."""

    text: str
    tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def timed(engine: Engine, request: GenerationRequest, caches: bool = True) -> Timed:
    """Generate one text with a new engine. If `caches` is false, the KV cache is not used."""
    fresh = Engine(engine.model, engine.encoding, engine.device, engine.precision, 1, caches)
    start = time.monotonic()
    [found] = fresh.complete([request])
    return Timed(found.text, len(found.tokens), time.monotonic() - start)


class Speed(NamedTuple):
    """Speeds of the whole batch in tokens per second. `prefill` is the speed of processing prompts.

    `decode` is the speed of new tokens, including sampling.
    """

    batch_size: int
    prompt_tokens: int
    new_tokens: int
    prefill: float
    decode: float


class Memory(NamedTuple):
    """`cache_bytes` is the size of the KV cache per token of one text.

    `peak_bytes` is the highest memory use, by torch on a GPU, else by the process.
    """

    weights_bytes: int
    cache_bytes: int
    peak_bytes: int


def measure_speed(engine: Engine) -> Iterator[Speed]:
    """Yields one result per batch size: the mean of ROUNDS rounds, or of those that begin within PATIENCE_SECONDS.

    It begins with a warm-up round.
    """
    prompt_tokens = min(PROMPT_TOKENS, engine.context // 2)
    new_tokens = min(NEW_TOKENS, engine.context - prompt_tokens)
    _round(engine, 1, prompt_tokens, new_tokens)
    seconds = 0.0
    for batch_size in BATCH_SIZES:
        if seconds * batch_size > PATIENCE_SECONDS:
            return
        start = time.monotonic()
        rounds = [_round(engine, batch_size, prompt_tokens, new_tokens)]
        seconds = time.monotonic() - start
        while len(rounds) < ROUNDS and time.monotonic() - start < PATIENCE_SECONDS:
            rounds.append(_round(engine, batch_size, prompt_tokens, new_tokens))
        prefill, decode = (statistics.mean(getattr(each, name) for each in rounds) for name in ("prefill", "decode"))
        yield rounds[0]._replace(prefill=prefill, decode=decode)


def measure_memory(engine: Engine) -> Memory:
    config = engine.model.config
    weights = sum(parameter.numel() * parameter.element_size() for parameter in engine.model.parameters())
    cache = 2 * config.layers * config.width * engine.dtype.itemsize
    if engine.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(engine.device)
    else:
        # ru_maxrss is in kilobytes on Linux and in bytes on macOS (getrusage(2)).
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Memory(weights, cache, peak)


def _round(engine: Engine, batch_size: int, prompt_tokens: int, new_tokens: int) -> Speed:
    fresh = Engine(engine.model, engine.encoding, engine.device, engine.precision, batch_size)
    source = random.Random(0)
    sampling = Sampling(max_tokens=new_tokens, seed=0)
    for _ in range(batch_size):
        prompt = [source.randrange(engine.vocabulary) for _ in range(prompt_tokens)]
        fresh.add(GenerationRequest(prompt, sampling, endless=True))
    start = time.monotonic()
    read = 0
    while fresh.waiting:  # these steps process the prompts
        read += len(fresh.step())
    middle = time.monotonic()
    written = 0
    while fresh.busy:
        written += len(fresh.step())
    return Speed(
        batch_size,
        prompt_tokens,
        new_tokens,
        read * prompt_tokens / (middle - start),
        written / (time.monotonic() - middle),
    )
