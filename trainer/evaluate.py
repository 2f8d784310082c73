"""Evaluates trained and public models.

    python -m trainer.evaluate s3://bucket/runs/first --tasks=perplexity,hellaswag --compare=gpt2,s3://bucket/runs/second
    torchrun --nproc-per-node=8 -m trainer.evaluate s3://bucket/runs/first/checkpoints/step-00001000

A model is a run (its newest checkpoint), a checkpoint, a folder in Hugging Face's format, gpt2 ... gpt2-xl or
hf:OWNER/NAME. The default is RUN_URL. The dataset is the one that the first run was trained on. The program writes
results and a ledger below RUN_URL/evaluations/ (docs/formats.md) and prints a table. Stored results are not measured
again, and an interrupted evaluation continues where it stopped. The scores do not depend on the number of ranks.
"""

from core import stop
from core.run.folder import RunFolder

if __name__ == "__main__":
    stop.listen()  # called before the imports that take seconds

import logging
import os
import time
from collections.abc import Mapping, Sequence

from core.console import run_entry, set_up_logging
from core.errors import CapReached
from core.exit_codes import CAPPED, FAILED, OK, tell_launcher
from core.settings import evaluation, loader
from core.settings.evaluation import EvaluateConfig

log = logging.getLogger("evaluate")


def main(arguments: list[str]) -> int:
    is_main = os.environ.get("RANK", "0") == "0"
    set_up_logging(speaks=is_main)
    if {"-h", "--help"} & set(arguments):
        print(loader.help_text(EvaluateConfig, evaluation.USAGE))
        return OK
    targets, settings = evaluation.parse(arguments, os.environ)
    # Importing torch takes seconds. Errors in the settings are reported before the import.
    from trainer.distributed import process_group

    try:
        ranks = process_group.start(settings.device, "device")
        run(list(dict.fromkeys([*targets, *settings.compare])), settings, ranks)
        return OK
    except CapReached as reached:
        log.warning("%s", reached)
        tell_launcher(CAPPED)
        # torchrun kills the other ranks when one exits, so wait until they have stored their results.
        process_group.meet(ranks, "cap")
        return CAPPED
    except process_group.PeerFailed:
        return FAILED
    finally:
        process_group.stop()


def run(targets: Sequence[str], settings: EvaluateConfig, ranks) -> None:
    """Measures all targets, one after another. All ranks must call it."""
    import torch

    from core.cores import usable_cores
    from trainer.distributed.process_group import on_all
    from trainer.evals import comparison, suite
    from trainer.evals.progress import EvaluationLog
    from trainer.model import precision
    from trainer.weights.open import open_weights

    if ranks.device.type == "cpu":
        torch.set_num_threads(settings.cpu_threads or max(1, usable_cores() // ranks.local_world))
    numbers = precision.resolve(settings.precision, ranks.device)
    trained = on_all(lambda: open_weights(targets[0], ranks.device), ranks)
    own = RunFolder(trained.run_url).evaluations if trained.run_url else None
    home = settings.results or own or "evaluations"
    comparison.check(settings.out)
    data = suite.EvaluationData(settings.data_url or trained.data_url or "", ranks)
    tasks = suite.measurements(settings, data, ranks, numbers, home)
    columns: dict[str, dict[str, Mapping]] = {}
    with EvaluationLog(own or home, settings, ranks) as evaluation_log:
        for target in targets:
            if trained is None:
                with evaluation_log.phase("restore"):
                    trained = on_all(lambda target=target: open_weights(target, ranks.device), ranks)
            name = unique_name(trained.name, columns)
            columns[name] = {}
            folder = suite.results_folder(trained, home)
            for task in tasks:
                columns[name][task.name] = measured(task, trained, folder, settings, ranks, evaluation_log)
            trained = None  # frees its memory for the next model
    if ranks.is_main:
        show(columns, [task.name for task in tasks])
        for file in settings.out:
            comparison.write(columns, file)
            log.info("%s: the scores of %d models", file, len(columns))


def measured(task, trained, folder: str, settings: EvaluateConfig, ranks, evaluation_log) -> Mapping[str, float]:
    """The scores of one task, read from storage or measured and stored."""
    import torch

    from core import storage
    from core.run.machine import program_versions
    from trainer.distributed.process_group import on_main
    from trainer.evals import suite
    from trainer.evals.progress import PartialResults

    key = suite.result_key(task.name, task.identity)
    stored = None if settings.rerun else on_main(lambda: suite.find_result(folder, key), ranks)
    if stored:
        log.info("%s: %s was measured before (--rerun repeats it)", trained.name, task.name)
        return stored["scores"]
    evaluation_log.check_cap()
    started = time.monotonic()
    place = storage.join(folder, "partial", key)
    with evaluation_log.phase("eval"), PartialResults(place, ranks, evaluation_log.check_cap) as partial:
        found = task.compute(trained, partial)
    document = {
        "task": task.name,
        "model": trained.name,
        "run_url": trained.run_url,
        "step": trained.step,
        "identity": task.identity,
        **found,
        "time": time.time(),
        "seconds": time.monotonic() - started,
        "device": torch.cuda.get_device_name() if ranks.device.type == "cuda" else "cpu",
        "ranks": ranks.world,
        "program": program_versions(("torch", "numpy", "lm-eval")),
    }
    uri = on_main(lambda: suite.store_result(folder, key, document), ranks)
    partial.discard()
    log.info("%s: %s in %.0f s, %s", trained.name, task.name, document["seconds"], uri)
    return found["scores"]


def unique_name(name: str, taken: Mapping[str, object]) -> str:
    """A heading for the table: the last part of the model's URL, or the whole URL if the last part is taken."""
    short = name.rstrip("/").rpartition("/")[2]
    return short if short not in taken else name


def show(columns: Mapping[str, Mapping[str, Mapping[str, float]]], tasks: Sequence[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("task", "metric")
    for name in columns:
        table.add_column(name, justify="right", overflow="fold")
    for task in tasks:
        metrics = dict.fromkeys(metric for scores in columns.values() for metric in scores[task])
        for metric in metrics:
            if not metric.endswith("_stderr"):
                table.add_row(task, metric, *(_cell(scores[task], metric) for scores in columns.values()))
        table.add_section()
    Console().print(table)


def _cell(scores: Mapping[str, float], metric: str) -> str:
    value = scores.get(metric)
    if value is None:
        return "?"
    if isinstance(value, int):
        return f"{value:,}"
    error = scores.get(f"{metric}_stderr")
    share = "accuracy" in metric
    shown = f"{100 * value:.2f}" if share else f"{value:,.4f}"
    if error is not None:
        shown += f" ± {100 * error:.2f}" if share else f" ± {error:.4f}"
    return f"{shown} %" if share else shown


if __name__ == "__main__":
    run_entry(main)
