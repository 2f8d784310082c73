"""Small models with weights of some size, as runs of their own, and data to measure them on."""

import json
from pathlib import Path
from random import Random

import torch

from core.data import sets
from core.settings import loader
from core.settings.model import ModelConfig
from core.settings.training import PretrainConfig
from tests import corpus
from trainer.import_weights import write_first_checkpoint
from trainer.model.gpt import GPT

SMALL = ModelConfig(layers=2, heads=2, width=32, context=64)
# What GPT-2's pattern and HellaSwag's cleaning treat in different ways.
SUBJECTS = "A man,The dog,She,Two boys,[header] How to cook,An old woman,He,They".split(",")
WORDS = "opens the door runs  away [step] and laughs at 3 o'clock! it's naïve 🙂 so she does not know".split(" ")


def hellaswag_items(count: int) -> list[dict]:
    """Rows of our own with the published fields."""
    random = Random(count)
    items = []
    for number in range(count):
        start, rest = f"{SUBJECTS[number % len(SUBJECTS)]} stands in street {number}.", "then he" if number % 3 else ""
        items.append(
            {
                "ind": number,
                "activity_label": f"Activity {number % 5}",
                "ctx_a": start,
                "ctx_b": rest,
                "ctx": f"{start} {rest}".strip(),
                "split": "val",
                "split_type": "indomain",
                "label": random.randrange(4),
                "endings": [" ".join(random.choices(WORDS, k=random.randint(5, 7))) for _ in range(4)],
                "source_id": f"made~{number}",
            }
        )
    return items


def prepare_data(folder: Path, vocab: Path, items: int = 24, extra: tuple[str, ...] = ()) -> str:
    """A token set of a few speeches, with a HellaSwag set beside it. Returns its URL."""
    source = corpus.write_parquet(folder / "source", [[*corpus.speeches(16), *extra]])
    url = str(folder / "data")
    corpus.prepare_set(source, url, vocab)
    rows = "".join(json.dumps(item) + "\n" for item in hellaswag_items(items)).encode()
    sets.write(url, "hellaswag", "hellaswag", "made for the tests", "MIT", rows)
    return url


def random_model(choices: ModelConfig, seed: int = 0) -> GPT:
    """Weights that make sharp predictions, so that answers differ; padding rows of the vocabulary no less."""
    model = GPT(choices)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if parameter.dim() < 2 else 0.2 * noise)
    return model.eval()


def make_run(run_url: str, data_url: str, choices: ModelConfig = SMALL, seed: int = 0) -> GPT:
    """A run with one checkpoint, of step 0."""
    model = random_model(choices, seed)
    flags = [f"--model.{key}={value}" for key, value in loader.to_dict(choices).items()]
    settings = loader.load(PretrainConfig, [*flags, f"--run.url={run_url}", f"--data.url={data_url}"], {})
    write_first_checkpoint(settings, model, "random numbers", "")
    return model
