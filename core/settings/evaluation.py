"""What evaluation may be told (`python -m trainer.evaluate --help`). Torch-free."""

from dataclasses import dataclass
from typing import Literal

from core import urls
from core.settings.loader import Bounded, SettingError, setting

LM_EVAL = "lm-eval:"
OWN_TASKS = ("perplexity", "hellaswag")


@dataclass(frozen=True)
class EvaluateConfig(Bounded):
    """`python -m trainer.evaluate`."""

    tasks: tuple[str, ...] = setting(
        OWN_TASKS, "what to measure: perplexity, hellaswag, lm-eval:NAME for a task of lm-evaluation-harness"
    )
    compare: tuple[str, ...] = setting(
        (), "more models, by commas: runs, checkpoints, folders, gpt2, hf:OWNER/NAME", check=urls.mistake_in_model
    )
    rerun: bool = setting(False, "measure anew what is stored already; the older result stays")
    data_url: str = setting(
        "",
        "validation tokens, HellaSwag and training shards; empty: those of the first run",
        env="DATA_URL",
        check=urls.mistake,
    )
    results: str = setting(
        "",
        "folder for results of models that are no run of ours; empty: the first run's, else ./evaluations",
        check=urls.mistake,
    )
    tokens: int = setting(0, "validation tokens of the perplexity, the first ones; 0: all", ge=0)
    per_document: bool = setting(
        False, "perplexity of each document on its own with as much context as fits, as the harness's wikitext"
    )
    limit: int = setting(0, "items of HellaSwag and of the harness's tasks, the first ones; 0: all", ge=0)
    hellaswag_style: Literal["harness", "llm.c"] = setting(
        "harness", "llm.c: its text and its division by tokens, to compare with its 29.5 % for GPT-2 124M"
    )
    contamination: bool = setting(
        False, "look for HellaSwag's items in the training shards, and score without those found; reads all shards"
    )
    contamination_tokens: int = setting(13, "tokens in a row that an item must share with the training text", ge=2)
    num_fewshot: int = setting(-1, "solved examples before each question of the harness's tasks; -1: as the task says")
    lm_eval_tasks: str = setting(
        "", "local folder with more tasks for the harness, as YAML files", check=urls.mistake_in_folder
    )
    max_usd: float = setting(
        0.0,
        "hard cap in dollars over all evaluations of this folder: stop before it, what is found is kept; 0: none",
        env="MAX_USD",
        ge=0,
    )
    shutdown_reserve_seconds: float = setting(
        120.0,
        "paid time between the end of this program and the machine's, kept in reserve under the cap",
        ge=0,
    )
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "where to compute")
    precision: Literal["auto", "fp32", "bf16"] = setting("auto", "auto: bf16 on a GPU, fp32 on a CPU")
    cpu_threads: int = setting(0, "threads per rank on a CPU; 0: cores divided by ranks", ge=0)

    def __post_init__(self):
        super().__post_init__()
        for task in self.tasks:
            if task not in OWN_TASKS and not (task.startswith(LM_EVAL) and task != LM_EVAL):
                near = ", ".join((*OWN_TASKS, f"{LM_EVAL}NAME"))
                raise SettingError("tasks", f"{task!r} is no task; there are {near}")
