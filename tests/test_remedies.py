"""What our messages tell a user to type exists, and the settings that they name are accepted as printed."""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from core.errors import ConfigError
from core.settings import evaluation, loader
from core.settings.memory import possible
from core.settings.preparation import FetchConfig, PrepConfig
from core.settings.renamed import REMOVED, RENAMED
from core.settings.stages import training_schema
from core.settings.tuning import SynthesisConfig
from tests import remedies
from trainer.generate import GenerateConfig
from trainer.inference import sampling


def test_everything_that_a_message_names_exists():
    found = {
        f"{message.path}:{message.line} names {kind} {name}"
        for message in (*remedies.messages(), *remedies.sentences())
        for kind, name in remedies.missing(message)
    }
    assert not found
    # The search itself finds what is there: a few hundred messages, and every kind of name.
    assert len(remedies.messages()) > 300
    kinds = {kind for _, names in remedies.naming() for kind, _ in names}
    assert kinds == set("module target flag setting word variable file extra package command".split())


def test_commands_that_are_printed_can_be_copied():
    all_of_them = (*remedies.messages(), *remedies.sentences())
    assert not {f"{each.path}:{each.line}": holes for each in all_of_them if (holes := remedies.unquoted(each))}
    assert remedies.unquoted(remedies.Message("core/x.py", 1, "", "run python -m data_prep.verify {url}")) == ["url"]


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("core/x.py", "run python -m data_prep.no_such"),
        ("core/x.py", "run `make no-such`"),
        ("core/x.py", "give BUCKET=NAME and BUKET=NAME to make"),
        ("core/x.py", "set NO_SUCH_VARIABLE"),
        ("trainer/loop/x.py", "lower optimizer.learning_rate"),
        ("trainer/loop/x.py", "set --optimizer.learning_rate=1"),
        ("trainer/loop/x.py", "set --source.url=..."),  # of another program
        ("data_prep/x.py", "check text_colum"),
        ("core/x.py", "run `pip install nosuch`"),
        ("core/x.py", "run `pip install -e '.[nosuch]'`"),
        ("trainer/inference/chat.py", "try /halp"),
        ("core/x.py", "see docs/no-such.md"),
    ],
)
def test_the_search_sees_what_does_not_exist(path: str, text: str):
    assert len(remedies.missing(remedies.Message(path, 1, "ConfigError", text))) == 1


def test_a_message_is_told_by_its_literal_parts():
    message = remedies.Message("core/x.py", 1, "ConfigError", "{uri}: there is no set {name}; store it first")
    assert message.fits("/a/b.json: there is no set 'x'; store it first: now")
    assert not message.fits("/a/b.json: there is no set 'x'")


# --- settings: refused, corrected as printed, accepted -----------------------------------------------------------

TRAIN = ("--run.url=/r", "--data.url=/d")
TUNE = ("--stage=finetune", "--run.url=/r", "--start.weights=gpt2", "--data.examples=rows.jsonl")
PREP = ("--data.url=/d", "--source.url=/s/*.parquet")
MAKE = (
    *("--run.url=/r", "--make.url=/d", "--make.prompts=p.txt", "--make.licence=MIT", "--endpoint.model=m"),
    *("--budget.max_usd=1", "--budget.usd_per_million_output=1"),
)
MUON = ("--optimizer.name=muon", "--lora.rank=2")


def train(flags: Sequence[str], environment: dict[str, str]) -> Any:
    return loader.load(training_schema(flags), flags, environment)


def train_on(ranks: int) -> Callable:
    def load(flags: Sequence[str], environment: dict[str, str]) -> Any:
        settings = train(flags, environment)
        return possible(settings, settings.model, ranks)

    return load


def of(schema: type) -> Callable:
    return lambda flags, environment: loader.load(schema, flags, environment)


def evaluate(flags: Sequence[str], environment: dict[str, str]) -> Any:
    return evaluation.parse(flags, environment)


def generate(flags: Sequence[str], environment: dict[str, str]) -> Any:
    return sampling.load(GenerateConfig, sampling.split_arguments(flags, "usage")[1], environment)


prepare, fetch, synthesize = of(PrepConfig), of(FetchConfig), of(SynthesisConfig)

# Program; what it is given beside the flags that are right; a pattern of what it says; the remedy, with the groups of
# the pattern in braces. A remedy `-KEY` leaves a flag out; one of capitals is a variable.
SETTINGS = [
    (train, (*TRAIN, "--optimizer.lrr=1"), r"did you mean (optimizer\.lr)\?", "-optimizer.lrr --{0}=1"),
    (train, (*TRAIN, "--train.lr=1"), r"did you mean (optimizer\.lr)\?", "-train.lr --{0}=1"),
    (train, (*TRAIN, "--optimizer=1"), r"set one of optimizer\.name, (optimizer\.lr),", "-optimizer --{0}=1"),
    (train, (*TRAIN, "--train.steps"), r"write (--train\.steps)=VALUE", "-train.steps {0}=50000"),
    (train, (*TRAIN, "--batch.tokens_per_step=1000"), r"(batch\.tokens_per_step): .* nearest is (\d+)", "--{0}={1}"),
    (train, (*TRAIN, "--train.steps=5"), r"(optimizer\.warmup_steps): .* more than train\.steps = (5)", "--{0}={1}"),
    (train, ("--run.url=/r",), r"set it with (--data\.url=)\.\.\. or with DATA_URL", "{0}/d"),
    (train, ("--run.url=/r",), r"set it with --data\.url=\.\.\. or with (DATA_URL)", "{0}=/d"),
    (train, ("--data.url=/d",), r"set it with (--run\.url=)\.\.\. or with RUN_URL", "{0}/r"),
    (train, ("--data.url=/d",), r"set it with --run\.url=\.\.\. or with (RUN_URL)", "{0}=/r"),
    (train, ("--data.url=/d", "--run.url=s3:/b/r"), r"did you mean (s3://b/r)\?", "--run.url={0}"),
    (train, (*TRAIN, "--model.heads=7"), r"(model\.heads): .* the nearest that does is (\d+)", "--{0}={1}"),
    (train, (*TRAIN, "--train.device=gpu"), r"(train\.device) is 'gpu', must be one of auto, (cpu), cuda", "--{0}={1}"),
    (train, (*TRAIN, "--train.device=cdua"), r"(train\.device) .*; did you mean (cuda)\?", "--{0}={1}"),
    *(
        (train, (*TRAIN, "--train.precision=fp8", "--train.device=cpu"), rf"(train\.precision): .* set {way}",
         "--{0}={1}") for way in ("(fp32) or auto", "fp32 or (auto)")
    ),
    (train, (*TRAIN, '--train.sample_prompts=["a'), r'(train\.sample_prompts) .* write (\[.*\]), or', "--{0}={1}"),
    (train, (*TRAIN, "--stage=fintune"), r"must be one of pretrain, finetune, dpo, (distil)",
     "--stage={0} --teacher.weights=gpt2"),
    (train, ("--lora.rank=2", *TUNE[1:]), r"add (--stage=finetune), dpo or distil", "{0}"),
    (train, tuple(each for each in TUNE if "start" not in each), r"(start\.weights): is empty; .* such as (gpt2)",
     "--{0}={1}"),
    (train, (*TUNE[:3], "--data.examples="), r"(data\.examples): is empty; name a set or a (\.jsonl) file",
     "--{0}=rows{1}"),
    (train, (*TUNE, *MUON), r"(optimizer\.name): .* set (adamw)", "--{0}={1}"),
    (train, (*TUNE, "--lora.rank=2", "--train.precision=fp8"), r"(train\.precision): .* set (bf16)", "--{0}={1}"),
    (train_on(3), (*TRAIN, "--batch.tokens_per_step=262144"),
     r"(batch\.tokens_per_step) = 262144 .* make it a multiple of (\d+)", "--{0}={1} --batch.micro_batch_size=1"),
    (train, (*TUNE[1:], "--stage=dpo", "--batch.micro_batch_size=3", "--batch.tokens_per_step=98304"),
     r"(batch\.micro_batch_size): is 3, must be even", "--{0}=4 --batch.tokens_per_step=131072"),
    (prepare, ("--data.url=/d",), r"\((--source\.dataset=\S+) (--source\.name=[^)]+)\)", "{0} {1}"),
    (prepare, ("--data.url=/d",), r"or files \((--source\.url=)\.\.\.\)", "{0}/s/*.parquet"),
    (prepare, (*PREP, "--source.dataset=a/b"), r"give (one) of them", "-source.dataset"),
    (prepare, ("--data.url=/d", "--source.dataset=a/b/c"), r"or name files by (source\.url)",
     "-source.dataset --{0}=/s/*.parquet"),
    (prepare, (*PREP, "--source.text_column="), r"name the column with the text, or (leave it out)",
     "-source.text_column"),
    (prepare, (*PREP, "--source.split="), r"(source\.split): is empty; name one, such as (train)", "--{0}={1}"),
    (prepare, (*PREP, "--filter.min_tokens=9", "--filter.max_tokens=5"), r"(filter\.max_tokens): .* must be (0)",
     "--{0}={1}"),
    (prepare, (*PREP, "--filter.min_tokens=9", "--filter.max_tokens=5"),
     r"(filter\.max_tokens): .* at least min_tokens = (\d+)", "--{0}={1}"),
    (prepare, (*PREP, "--num_nodes=2", "--node_rank=2"), r"(node_rank): .* to num_nodes - 1 = (\d)", "--{0}={1}"),
    (prepare, (*PREP, "--data.shard_tokens=2147483648"), r"(data\.shard_tokens): .* at most (\d+)", "--{0}={1}"),
    (prepare, ("--source.url=/s/*.parquet",), r"or with (DATA_URL)", "{0}=/d"),
    (fetch, ("--data.url=/d",), r"(source\.train_url): is empty; give a file or glob", "--{0}=/s/*.bin"),
    (fetch, ("--data.url=/d", "--source.train_url=/s/*.bin", "--source.revision=main"), r"only an (hf://) source",
     "--source.train_url={0}datasets/a/b/*.bin"),
    (synthesize, MAKE[1:], r"set it with (--run\.url=)\.\.\. or with RUN_URL", "{0}/r"),
    (synthesize, (*MAKE[:1], *MAKE[2:]), r"set it with --make\.url=\.\.\. or with (DATA_URL)", "{0}=/d"),
    (synthesize, (*MAKE, "--budget.max_usd=0"), r"(budget\.max_usd): .* set the most that they may cost", "--{0}=1"),
    (synthesize, (*MAKE, "--budget.usd_per_million_output=0"), r"(budget\.usd_per_million_output): .* set",
     "--{0}=1"),
    (synthesize, (*MAKE, "--endpoint.url=localhost:1"), r"(endpoint\.url): .* must begin with (http://)",
     "--{0}={1}localhost:1"),
    (evaluate, ("--tasks=helaswag", "/r"), r"(tasks): .* choose from perplexity, (hellaswag)", "--{0}={1}"),
    (evaluate, (), r"no model given; .*, or set (RUN_URL)", "{0}=/r"),
    (evaluate, ("/r", "--again=true"), r"write (rerun)", "-again --{0}=true"),
    (generate, ("--seed=1",), r"give exactly one checkpoint or (run), not 0", "/{0}"),
]  # fmt: skip


def corrected(flags: Sequence[str], remedy: str) -> tuple[list[str], dict[str, str]]:
    """The command line and environment after a remedy."""
    kept, environment = {each.partition("=")[0]: each for each in flags}, {}
    for word in re.findall(r"\S*\[.*\]|\S+", remedy):
        name, _, value = word.partition("=")
        if name.isupper():
            environment[name] = value
        elif name.startswith(("--", "/")):
            kept[name] = word
        else:
            del kept[f"--{name[1:]}"]
    return list(kept.values()), environment


@pytest.mark.parametrize(
    ("program", "flags", "said", "remedy"), SETTINGS, ids=[f"{row[0].__name__} {row[2]}" for row in SETTINGS]
)
def test_a_refused_setting_is_accepted_as_the_message_corrects_it(program, flags, said: str, remedy: str):
    with pytest.raises(ConfigError) as caught:
        program(flags, {})
    match = re.search(said, str(caught.value))
    assert match, str(caught.value)
    assert program(*corrected(flags, remedy.format(*match.groups())))


STAGED = {
    "finetune": TUNE,
    "dpo": ("--stage=dpo", *TUNE[1:]),
    "distil": (*TRAIN, "--stage=distil", "--teacher.weights=gpt2"),
}


@pytest.mark.parametrize("old", [*RENAMED, *REMOVED])
def test_what_is_said_of_an_old_name_is_accepted_by_each_program_that_had_it(old: str):
    programs = [
        (train, TRAIN),
        *((train, flags) for flags in STAGED.values()),
        (evaluate, ("/r",)),
        (generate, ("/r",)),
    ]
    accepted = 0
    for program, flags in programs:
        try:
            program((*flags, f"--{old}=1"), {})
            continue  # a setting of this program
        except ConfigError as error:
            said = str(error)
        if match := re.search(r" write ([\w.]+)(=\d)?(?: with stage=(\w+))?$", said):
            key, value, stage = match.groups()
            flags = STAGED.get(stage, flags)
            program((*flags, f"--{key}{value or '=' + a_value_of(key)}"), {})
            accepted += 1
        accepted += " is gone; remove it: " in said
    assert accepted


def a_value_of(key: str) -> str:
    """The default of a setting, where it has one."""
    schemas = remedies.SCHEMAS[-1][1]
    defaults = [re.search(rf"^  --{re.escape(key)}=(\S*)", loader.help_text(each, ""), re.M) for each in schemas]
    found = next(match[1] for match in defaults if match)
    return {'""': "gpt2", "none": "gpt2", "()": "1"}.get(found, found)


# --- docs/troubleshooting.md --------------------------------------------------------------------------------------

TROUBLES = remedies.ROOT / "docs" / "troubleshooting.md"


def quoted() -> list[str]:
    rows = [line for line in TROUBLES.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    return [re.match(r"\| `([^`]+)` \|", row)[1] for row in rows]


@functools.cache
def printed() -> tuple[str, ...]:
    return tuple(" ".join(each.text.split()) for each in (*remedies.messages(), *remedies.sentences()))


def is_printed(quote: str) -> bool:
    """Whether one message holds the literal parts of `quote` in this order."""
    parts = [part for part in quote.split("…") if part.strip(" :;,(")]
    return any(holds(text, parts) for text in printed())


def holds(text: str, parts: list[str]) -> bool:
    at = 0
    for part in parts:
        at = text.find(part, at) + len(part)
        if at < len(part):
            return False
    return True


def test_every_quoted_message_is_one_of_the_programs():
    assert len(quoted()) > 25
    assert [quote for quote in quoted() if not is_printed(quote)] == []


def test_a_sentence_that_nothing_prints_is_found():
    assert not is_printed("…: this sentence is printed by no program")
