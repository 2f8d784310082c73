"""The commands of docs/parity.md, and who types each: a kind of tests/test_parity_typed.py, another test, or nobody.

`kind_of` knows no default: a new row belongs to one of the kinds below, or tests fail.
"""

import contextlib
import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "parity.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| ((?:S\d|C)-\d\d) \| (.+?) \| (.+?) \| (.*?) \|$", PAGE.replace("\\|", "/"), re.M)
SPECIAL = ("LICENSE", ".env.example")
# Words of a log that the notes name.
LOGGED = ("batch:", "data:", "model:", "optimizer:", "remaining")
# Packages, files and targets that a note only mentions. A target alone lacks a setting, and says which.
NAMED = ("datasets",)
ALONE = ("make fetch-data", "make finetune", "make plan", "make prep-data", "make pretrain")
# Programs that are typed to their end, or until they answer.
PROGRAMS = (
    "data_prep.fetch data_prep.inspect data_prep.prepare data_prep.sets data_prep.verify trainer.chat trainer.evaluate "
    "trainer.export trainer.generate trainer.import_weights trainer.metrics trainer.plots trainer.serve "
    "trainer.synthesize"
).split()
# Targets that rent nothing.
HERE = ("make fetch-data SOURCE", "make prep-data SOURCE", "make train", "make plan USD", "make pull")

# Typed by another test: its file and name. What the command itself starts is what that test starts.
ELSEWHERE = {
    "make setup": "test_setup.py::test_a_new_environment_gets_the_pinned_set_and_torch_by_its_hash",
    "make setup-launch": "test_setup.py::test_a_new_environment_gets_the_pinned_set_and_torch_by_its_hash",
    "make setup GPU=1": "test_setup.py::test_a_gpu_gets_torch_with_cuda_and_is_tried",
    "python -m bench.ladder": "test_ladder.py::test_every_row_is_rehearsed_on_a_cpu",
    "python -m bench.ladder --preset=gpt2-124m": "test_ladder.py::test_every_row_is_rehearsed_on_a_cpu",
    "python -m bench.on_gpu speed --out=gpu": (
        "test_on_gpu.py::test_a_part_runs_alone_and_without_the_packages_that_a_machine_may_lack"
    ),
    "python -m trainer.export RUN_URL exported/mine --publish=hf:OWNER/NAME": (
        "test_export.py::test_published_on_the_hub_and_read_by_name"
    ),
}
# Typed by nobody, with the reason.
UNTYPED = {
    "python -m data_prep.sets hellaswag DATA_URL": (
        "the published 10,042 rows, by checksum, are at the Hub; test_sets.py stores rows of its own by the same code"
    ),
    "python -m trainer.evaluate RUN_URL --tasks=hellaswag,lm-eval:arc_easy": (
        "the task's questions are at the Hub; test_evaluate.py and test_harness.py run tasks of local files"
    ),
    "pip install '.[prep,train,plot]'": "downloads packages; test_package.py checks what an installation gets",
    "pip install wandb": "downloads a package of others",
}
# Flags that a command gets beside its own, and why.
_SMALL = "--model.layers=1 --model.heads=2 --model.width=16 --model.context=64 --train.eval_tokens=1024"
_BATCH = "--batch.tokens_per_step=1024 --batch.micro_batch_size=2"
_PRESET = "a step of the preset takes hours on a CPU"
ADDED = {
    "trainer.train trainer/configs/gpt2-124m.yaml": (f"{_SMALL} {_BATCH}", _PRESET),
    "trainer/configs/llama-416m.yaml": (f"{_SMALL} --model.mlp_width=32 {_BATCH}", _PRESET),
    "trainer/configs/tuning/distil-logits.yaml": (f"{_SMALL} {_BATCH}", _PRESET),
    "trainer/configs/tuning/finetune-chat.yaml": (
        "--batch.micro_batch_size=16",
        "as many sequences as fit would take half of the memory that other tests need",
    ),
    "trainer/configs/tuning/dpo.yaml": ("--optimizer.warmup_steps=0", "forty pairs are one step"),
    "trainer.serve": ("--port=0", "another program may have the usual port"),
}


def commands() -> list[str]:
    return sorted({word for _, _, here, note in ROWS for word in re.findall(r"`([^`]+)`", f"{here} {note}")})


def module_of(command: str) -> str:
    """The program that a Python command runs: its module, or its file."""
    words = shlex.split(command)
    at = len(words) - 1 - words[::-1].index("-m") if "-m" in words else 0
    return words[at + 1]


def kind_of(command: str) -> str:
    """How a command is tried. Raises ValueError for one that no kind fits, and for one that two tables name."""
    tables = {"elsewhere": ELSEWHERE, "untyped": UNTYPED, "log": LOGGED, "named": NAMED, "alone": ALONE}
    named = [kind for kind, table in tables.items() if command in table]
    if len(named) > 1:
        raise ValueError(f"{command}: is in two tables")
    if named:
        return named[0]
    if command.startswith("/"):
        return "chat"
    if command in SPECIAL or (" " not in command and (ROOT / command).exists()):
        return "file"
    if command.startswith(HERE):
        return "here"
    if command.startswith(("sky launch", "make ")):
        return "cloud"
    if command.startswith(("python ", "torchrun ")):
        module = module_of(command)
        if module in ("trainer.train", "launch.node"):
            return "program" if "--help" in command else "training"
        if module in (*PROGRAMS, "cost_report.py"):
            return "program"
    raise ValueError(f"{command}: a new kind of command; say in tests/parity.py who types it")


def of_kind(kind: str) -> list[str]:
    """The commands of a kind; one that no kind fits is in none, and the test of the kinds names it."""
    found = []
    for command in commands():
        with contextlib.suppress(ValueError):
            found += [command] if kind_of(command) == kind else []
    return found


def added_to(command: str) -> list[str]:
    return [word for part, (flags, _) in ADDED.items() if part in command for word in flags.split()]
