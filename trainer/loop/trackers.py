"""Copies the metrics of a run to TensorBoard, Weights & Biases or MLflow.

The journal in the run's folder remains the complete record, and a thread sends copies. If a tracker fails, the log
names it once, and the tracker gets no more metrics. A tracker never delays or stops a run. The destination is set by
TENSORBOARD_DIR, by WANDB_PROJECT and WANDB_API_KEY, or by MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME.
"""

import contextlib
import logging
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from core.settings.loader import flatten

log = logging.getLogger("train")

CLOSE_SECONDS = 20.0
WAITING_AT_MOST = 10_000
MLFLOW_TAG = "run_id_of_trainer"

Send = Callable[[int, Mapping[str, float]], None]


@dataclass(frozen=True)
class TrackedRun:
    """A run as the trackers know it. `id` is unique, `name` is shown. The new metrics begin after `step`."""

    id: str
    name: str
    step: int
    config: Mapping[str, Any]


def _tensorboard(run: TrackedRun) -> tuple[Send, Callable[[], None]]:
    from torch.utils.tensorboard import SummaryWriter

    folder = f"{re.sub(r'[^A-Za-z0-9_.-]', '_', run.name)}-{run.id}"
    # Steps after the restored checkpoint are repeated. `purge_step` hides their earlier values.
    home = os.path.expanduser(os.environ.get("TENSORBOARD_DIR", "runs"))
    writer = SummaryWriter(os.path.join(home, folder), purge_step=run.step + 1)
    writer.add_text(
        "config", "\n".join(f"    {key}: {value}" for key, value in flatten(run.config).items()), run.step + 1
    )

    def send(step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            writer.add_scalar(key, value, step)

    return send, writer.close


def _wandb(tracked: TrackedRun) -> tuple[Send, Callable[[], None]]:
    import wandb

    # All segments of a run have the same id, so W&B shows them as one run.
    project = os.environ.get("WANDB_PROJECT", "pretraining")
    run = wandb.init(project=project, id=tracked.id, name=tracked.name, resume="allow", config=dict(tracked.config))
    # Use our own `step` as the x axis. W&B's built-in step must increase, so the steps that a resumed run repeats would
    # be dropped.
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return lambda step, values: run.log({**values, "step": step}), run.finish


def _mlflow(run: TrackedRun) -> tuple[Send, Callable[[], None]]:
    import mlflow

    earlier = mlflow.search_runs(filter_string=f"tags.{MLFLOW_TAG} = '{run.id}'", output_format="list")
    if earlier:
        mlflow.start_run(run_id=earlier[0].info.run_id)
    else:
        mlflow.start_run(run_name=run.name, tags={MLFLOW_TAG: run.id})
        # MLflow refuses longer values, so they are cut.
        mlflow.log_params({key: str(value)[:500] for key, value in flatten(run.config).items()})
    return lambda step, values: mlflow.log_metrics(dict(values), step=step), mlflow.end_run


_KINDS = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow}


class Trackers:
    """Sends the metrics of a run to the trackers `kinds`. These are the same metrics that the journal stores."""

    def __init__(self, kinds: tuple[str, ...], run_url: str, config: Mapping[str, Any], run_id: str, step: int = 0):
        """`run_id` is from core.run.folder.id_of. `step` is the restored step, 0 for a new run."""
        self._kinds = kinds
        name = run_url.rstrip("/").rsplit("/", 1)[-1]
        self._run = TrackedRun(run_id, name, step, config)
        self._queue: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue(WAITING_AT_MOST)
        self._thread = threading.Thread(target=self._work, name="trackers", daemon=True)
        if kinds:
            self._thread.start()

    def add(self, kind: str, values: Mapping[str, Any]) -> None:
        """Send the numbers in `values` as `kind`/name at values["step"]; drop them if a tracker is far behind."""
        numbers = {
            f"{kind}/{key.replace('.', '/')}": float(value)
            for key, value in flatten(values).items()
            if isinstance(value, int | float) and key != "step"
        }
        if self._kinds and numbers:
            with contextlib.suppress(queue.Full):
                self._queue.put_nowait((values["step"], numbers))

    def close(self) -> None:
        """Send the metrics that still wait, for at most CLOSE_SECONDS."""
        if not self._kinds:
            return
        until = time.monotonic() + CLOSE_SECONDS
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=CLOSE_SECONDS)
        self._thread.join(max(0.0, until - time.monotonic()))
        if self._thread.is_alive():
            log.warning(
                "train.trackers: %s has not taken the last metrics within %g s and may lack them; the run's folder has "
                "all metrics",
                " or ".join(self._kinds),
                CLOSE_SECONDS,
            )

    def _work(self) -> None:
        open_ones = {}
        for kind in self._kinds:
            with self._tolerating(kind):
                open_ones[kind] = _KINDS[kind](self._run)
        while (item := self._queue.get()) is not None:
            for kind in list(open_ones):
                with self._tolerating(kind, open_ones):
                    open_ones[kind][0](*item)
        for kind in list(open_ones):
            with self._tolerating(kind, open_ones):
                open_ones[kind][1]()

    @contextlib.contextmanager
    def _tolerating(self, kind: str, open_ones: dict | None = None):
        try:
            yield
        except ImportError:
            log.warning("train.trackers: %s is not installed and gets no metrics: pip install %s", kind, kind)
        except Exception as error:
            log.warning("train.trackers: %s fails and gets no more metrics (%s: %s)", kind, type(error).__name__, error)
            if open_ones is not None:
                open_ones.pop(kind, None)
