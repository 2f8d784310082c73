"""Settings of what follows pretraining: the shipped files load, and contradictions are refused by name."""

from pathlib import Path

import pytest

from core.errors import ConfigError
from core.settings import loader
from core.settings.stages import training_schema
from core.settings.tuning import DistilConfig, DpoConfig, FinetuneConfig, SynthesisConfig

FOLDER = Path(__file__).parent.parent / "trainer" / "configs" / "tuning"
RUN = "--run.url=s3://bucket/run"
# By the first word of a file's name: its program's settings, and what only the user can say.
PROGRAMS = {
    "finetune": (FinetuneConfig, ["--start.weights=gpt2"]),
    "dpo": (DpoConfig, ["--start.weights=gpt2"]),
    "distil-logits": (DistilConfig, ["--teacher.weights=gpt2-xl", "--data.url=s3://bucket/data"]),
    "synthesize": (
        SynthesisConfig,
        ["--make.prompts=p.txt", "--make.url=s3://bucket/data", "--make.licence=x", "--endpoint.model=m"],
    ),
}


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.yaml")), ids=lambda file: file.name)
def test_shipped_configs_load(file: Path):
    (known,) = [name for name in PROGRAMS if file.stem.startswith(name)]
    schema, flags = PROGRAMS[known]
    loaded = loader.load(schema, [str(file), RUN, *flags], {})
    if known != "synthesize":
        assert training_schema([str(file)]) is schema
    if known in ("finetune", "dpo"):
        assert loaded.batch.tokens_per_step % (max(1, loaded.batch.micro_batch_size) * 1024) == 0


@pytest.mark.parametrize(
    ("name", "flag", "problem"),
    [
        ("finetune", "--data.val_fraction=1", "data.val_fraction: is 1.0, must be at least 0 and below 1"),
        ("finetune", "--lora.targets=attn.c_atn", "lora.targets is 'attn.c_atn', must be one of"),
        ("finetune", "--model.width=3", "unknown setting model.width"),
        ("dpo", "--dpo.beta=0", "dpo.beta: is 0.0, must be above 0"),
        ("dpo", "--batch.micro_batch_size=3", "batch.micro_batch_size: is 3, must be even"),
        ("distil-logits", "--distil.kl_weight=0", "distil.kl_weight: is 0.0, must be above 0 and at most 1"),
        ("synthesize", "--budget.max_usd=1", "nothing would be counted against max_usd; set the endpoint's prices"),
        ("synthesize", "--endpoint.url=ftp://x", "endpoint.url: is 'ftp://x', must begin with http:// or https://"),
    ],
)
def test_contradictions_are_refused(name: str, flag: str, problem: str):
    schema, flags = PROGRAMS[name]
    with pytest.raises(ConfigError) as failure:
        loader.load(schema, [RUN, *flags, flag], {})
    assert problem in str(failure.value)


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_help_names_every_setting(name: str):
    schema, flags = PROGRAMS[name]
    text = loader.help_text(schema, "usage")
    for key in loader.flatten(loader.to_dict(loader.load(schema, [RUN, *flags], {}))):
        assert f"--{key}=" in text
