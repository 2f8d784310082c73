"""Generates texts with a trained model.

    python -m trainer.generate s3://bucket/runs/first --prompt="Once upon a time" --max_tokens=64 --samples=3

The argument is a run (its newest checkpoint is used), a checkpoint, or a public model. The texts go to standard output.
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
from core.settings.inference import InferenceOptions, Sampling
from core.settings.loader import SettingError, setting
from trainer.inference import sampling as generation

log = logging.getLogger("generate")
USAGE = "python -m trainer.generate RUN_OR_CHECKPOINT [--prompt=TEXT | --prompts=FILE] [--name=value ...]"


@dataclass(frozen=True)
class GenerateConfig(InferenceOptions, Sampling):
    """Settings of `trainer.generate`."""

    prompt: str = setting("", "text to continue; empty: start a new document")
    prompts: str = setting(
        "", "file with one prompt per line (local, s3://, gs://, az://), instead of --prompt", check=urls.mistake
    )
    samples: int = setting(1, "texts per prompt; with a seed, each text uses the next seed", ge=1)
    json: bool = setting(False, "one JSON object per text instead of plain text")

    def __post_init__(self):
        super().__post_init__()
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
    # Importing torch takes seconds. Errors in the settings are reported before the import.
    from trainer.inference.chat_model import open_chat_model
    from trainer.inference.engine import GenerationRequest

    model = open_chat_model(where, settings)
    log.info("%s, opened in %.1f s", model.name, model.opened_seconds)
    requests, labels = [], []
    for prompt in prompts:
        tokens = model.engine.encode(prompt)
        for sample in range(settings.samples):
            seed = None if settings.seed is None else settings.seed + sample
            requests.append(GenerationRequest(tokens, generation.sampling_of(settings, seed=seed)))
            labels.append({"prompt": prompt, "sample": sample, "seed": seed})
    start = time.monotonic()
    count = _print(model.engine, requests, labels, settings.json)
    seconds = time.monotonic() - start
    log.info("%d texts, %d tokens in %.1f s: %.0f tokens/s", len(requests), count, seconds, count / seconds)
    return OK


def _prompts(settings: GenerateConfig) -> list[str]:
    if not settings.prompts:
        return [settings.prompt]
    try:
        lines = storage.read_bytes(settings.prompts).decode().splitlines()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{settings.prompts}: not UTF-8 text: {error}; give one prompt per line") from error
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise ConfigError(f"{settings.prompts}: contains no prompt; give one per line")
    return prompts


def _print(engine, requests: list, labels: list[dict], as_json: bool) -> int:
    """Prints all texts and returns the number of new tokens. A single text is streamed."""
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
    run_entry(main, shows=True)
