"""Declares the settings of evaluation (`python -m trainer.evaluate --help`). Imports no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from core import urls
from core.errors import ConfigError
from core.settings import loader
from core.settings.loader import Bounded, SettingError, require, setting
from core.settings.run import shutdown_reserve

LM_EVAL = "lm-eval:"
OWN_TASKS = ("perplexity", "hellaswag")
OUT_SUFFIXES = (".json", ".svg", ".png")
USAGE = "python -m trainer.evaluate [RUN_OR_CHECKPOINT ...] [CONFIG.yaml] [--setting=value ...]"


@dataclass(frozen=True)
class EvaluateConfig(Bounded):
    """Settings of `python -m trainer.evaluate`."""

    tasks: tuple[str, ...] = setting(
        OWN_TASKS, "measurements: perplexity, hellaswag, or lm-eval:NAME for a task of lm-evaluation-harness"
    )
    compare: tuple[str, ...] = setting(
        (),
        "more models, separated by commas: runs, checkpoints, folders, gpt2, hf:OWNER/NAME",
        check=urls.mistake_in_model,
    )
    out: tuple[str, ...] = setting(
        (),
        "local files for the scores of all models side by side: .json for the numbers, .svg or .png for a chart",
        check=urls.mistake_in_folder,
    )
    rerun: bool = setting(False, "repeat measurements whose results are stored already; the older results are kept")
    data_url: str = setting(
        "",
        "dataset with validation tokens, HellaSwag and training shards; empty: the dataset of the first run",
        env="DATA_URL",
        check=urls.mistake,
    )
    results: str = setting(
        "",
        "folder for results of models that belong to no run; empty: the first run's folder, else ./evaluations",
        check=urls.mistake,
    )
    tokens: int = setting(0, "perplexity: use this number of validation tokens, starting at the first; 0: all", ge=0)
    per_document: bool = setting(
        False, "perplexity: score each document separately with rolling windows, as the harness's wikitext task does"
    )
    limit: int = setting(
        0, "number of items of HellaSwag and of each harness task, starting at the first; 0: all", ge=0
    )
    hellaswag_style: Literal["harness", "llm.c"] = setting(
        "harness", "llm.c: format texts and normalise by tokens as llm.c does (GPT-2 124M then scores 29.5 %)"
    )
    contamination: bool = setting(
        False, "search all training shards for HellaSwag's items; report a second score without the items found"
    )
    contamination_tokens: int = setting(
        13, "consecutive tokens that an item must share with the training text to count as found", ge=2
    )
    num_fewshot: int = setting(
        -1, "solved examples before each question of the harness's tasks; -1: the task's default"
    )
    lm_eval_tasks: str = setting(
        "", "local folder with YAML files of additional tasks for the harness", check=urls.mistake_in_folder
    )
    apply_chat_template: bool = setting(
        False, "harness tasks: format prompts with the chat template that the model was fine-tuned with"
    )
    max_usd: float = setting(
        0.0,
        "hard cap in dollars for all evaluations in this folder together; results up to the cap are stored; 0: no cap",
        env="MAX_USD",
        ge=0,
    )
    shutdown_reserve_seconds: float = shutdown_reserve(identity=True)
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "device for all computation")
    precision: Literal["auto", "fp32", "bf16"] = setting("auto", "auto: bf16 on a GPU, fp32 on a CPU")
    cpu_threads: int = setting(0, "threads per rank on a CPU; 0: cores / ranks", ge=0)

    def __post_init__(self):
        super().__post_init__()
        for file in self.out:
            require(file.endswith(OUT_SUFFIXES), "out", f"is {file!r}, must end in {', '.join(OUT_SUFFIXES)}")
        for task in self.tasks:
            if task not in OWN_TASKS and not (task.startswith(LM_EVAL) and task != LM_EVAL):
                near = ", ".join((*OWN_TASKS, f"{LM_EVAL}NAME"))
                raise SettingError("tasks", f"{task!r} is not a task; choose from {near}")


def parse(arguments: Sequence[str], environment: Mapping[str, str]) -> tuple[list[str], EvaluateConfig]:
    """The models and the settings of a command line of `trainer.evaluate`. If it names no model, RUN_URL is the model.

    The launcher calls this function too, to find wrong settings before the launch. Raises ConfigError.
    """
    models = [each for each in arguments if not each.startswith("--") and not each.endswith((".yaml", ".yml"))]
    settings = loader.load(EvaluateConfig, [each for each in arguments if each not in models], environment)
    models = models or [url for url in [environment.get("RUN_URL")] if url]
    if not models:
        raise ConfigError(f"no model given; {USAGE}, or set RUN_URL")
    for model in models:
        urls.check_model(model)
    return models, settings
