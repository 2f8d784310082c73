"""Texts from a trained model.

    python -m trainer.generate s3://bucket/runs/first --prompt="Once upon a time" --tokens=64 --samples=3

Reads a run's newest checkpoint, one checkpoint, or a model that `transformers` knows. Prints to standard output.
"""

import json
import logging
import os
import time
from dataclasses import dataclass

from core import storage, urls
from core.console import run_entry, set_up_logging
from core.errors import ConfigError
from core.exit_codes import OK
from core.settings import loader
from core.settings.loader import SettingError, setting
from trainer.inference import sampling as generation
from trainer.inference.sampling import Machine, Sampling

log = logging.getLogger("generate")
USAGE = "python -m trainer.generate RUN_OR_CHECKPOINT [--prompt=TEXT | --prompts=FILE] [--name=value ...]"


@dataclass(frozen=True)
class GenerateConfig(Machine, Sampling):
    """What `trainer.generate` takes."""

    prompt: str = setting("", "text to continue; empty: the beginning of a document")
    prompts: str = setting(
        "", "file with one prompt per line (local, s3://, gs://, az://), instead of --prompt", check=urls.mistake
    )
    samples: int = setting(1, "texts per prompt; with a seed, the next one has the next seed")
    json: bool = setting(False, "one JSON object per text instead of plain text")

    def __post_init__(self):
        Sampling.__post_init__(self)
        Machine.__post_init__(self)
        if self.samples < 1:
            raise SettingError("samples", f"is {self.samples}, must be at least 1")
        if self.prompt and self.prompts:
            raise SettingError("prompts", "is set beside --prompt; give one of them")


def main(arguments: list[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        print(loader.help_text(GenerateConfig, USAGE))
        return OK
    where, flags = generation.split_arguments(arguments, USAGE)
    settings = generation.load(GenerateConfig, flags, os.environ)
    set_up_logging()
    prompts = _prompts(settings)
    # torch takes seconds to import: a wrong setting should not have to wait for it.
    from trainer.inference.chat_model import open_speaker
    from trainer.inference.engine import Request

    speaker = open_speaker(where, settings)
    log.info("%s, opened in %.1f s", speaker.name, speaker.opened_seconds)
    requests, labels = [], []
    for prompt in prompts:
        tokens = speaker.engine.encode(prompt)
        for sample in range(settings.samples):
            seed = None if settings.seed is None else settings.seed + sample
            requests.append(Request(tokens, generation.sampling_of(settings, seed=seed)))
            labels.append({"prompt": prompt, "sample": sample, "seed": seed})
    start = time.monotonic()
    count = _print(speaker.engine, requests, labels, settings.json)
    seconds = time.monotonic() - start
    log.info("%d texts, %d tokens in %.1f s: %.0f tokens/s", len(requests), count, seconds, count / seconds)
    return OK


def _prompts(settings: GenerateConfig) -> list[str]:
    if not settings.prompts:
        return [settings.prompt]
    try:
        lines = storage.read_bytes(settings.prompts).decode().splitlines()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{settings.prompts}: is no UTF-8 text: {error}; give one prompt per line") from error
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise ConfigError(f"{settings.prompts}: holds no prompt; give one per line")
    return prompts


def _print(engine, requests: list, labels: list[dict], as_json: bool) -> int:
    """Print every text and return the number of new tokens. One alone is shown as it comes."""
    if len(requests) == 1 and not as_json:
        print(labels[0]["prompt"], end="", flush=True)
        count = 0
        for piece in engine.stream(requests):
            print(piece.text, end="", flush=True)
            count += piece.token is not None
        print()
        return count
    completions = engine.complete(requests)
    for label, completion in zip(labels, completions, strict=True):
        if as_json:
            values = {"text": completion.text, "tokens": len(completion.tokens), "finish": completion.finish}
            print(json.dumps(label | values, ensure_ascii=False))
        else:
            print(f"--- sample {label['sample'] + 1} of {label['prompt']!r} ({completion.finish})")
            print(label["prompt"] + completion.text)
    return sum(len(completion.tokens) for completion in completions)


if __name__ == "__main__":
    run_entry(main)
