"""What a step is told as: one metric per step, one log line per interval or a live picture, a copy to trackers."""

import logging
import sys

import torch

from core.errors import ConfigError
from core.figures import duration, quantity
from core.gpus import peak_flops
from core.run.cap import SpendingCap
from core.settings.training import TrainingConfig
from trainer.distributed.process_group import Ranks
from trainer.loop.record import Record
from trainer.loop.trackers import Trackers
from trainer.stages.stage import Stage

log = logging.getLogger("train")


class Report:
    """Rank 0 writes; the other ranks' instances are silent."""

    def __init__(self, stage: Stage, ranks: Ranks, record: Record):
        self._settings = settings = stage.settings
        self._ranks = ranks
        self._record = record
        peak = peak_flops(torch.cuda.get_device_name()) if ranks.device.type == "cuda" else None
        known = peak and stage.flops_per_token
        self._peak_flops = peak * ranks.world if known else None
        copies = ranks.world // stage.share_world  # of each micro-batch, where all ranks compute the same one
        self._flops_per_step = stage.flops_per_token * settings.batch.tokens_per_step * copies if known else 0.0
        view = settings.train.display
        live = ranks.is_main and (view == "live" or (view == "auto" and sys.stderr.isatty()))
        self._screen = screen(settings, record.cap) if live else None
        self._trackers = Trackers(settings.train.trackers if ranks.is_main else (), settings.run.url, stage.config)

    def step(self, step: int, loss: float, rate: float, norm: float, seconds: float, waited_seconds: float) -> None:
        """Report optimizer step `step`, which took `seconds`, `waited_seconds` of them for data."""
        train = self._settings.train
        speed = self._settings.batch.tokens_per_step / seconds
        mfu = self._flops_per_step / seconds / self._peak_flops if self._peak_flops else None
        values = {
            "step": step,
            "loss": loss,
            "lr": rate,
            "grad_norm": norm,
            "tokens": step * self._settings.batch.tokens_per_step,
            "step_seconds": seconds,
            "tokens_per_second": speed,
            "mfu": mfu,
            "data_wait_seconds": waited_seconds,
        }
        self.metric("train", values)
        cap = self._record.cap
        spent = cap.spent_usd() if cap else None
        remaining = seconds * (train.steps - step)
        if self._screen:
            self._screen.step(values, spent, remaining)
        if step % train.log_every and step != train.steps:
            return
        memory = f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB" if self._ranks.device.type == "cuda" else "cpu"
        log.log(
            logging.DEBUG if self._screen else logging.INFO,
            "step %d/%d | loss %.4f | lr %.2e | grad norm %.3f | %s tokens/s | MFU %s | %s | spent %s | remaining %s",
            step,
            train.steps,
            loss,
            rate,
            norm,
            quantity(speed),
            "?" if mfu is None else f"{100 * mfu:.1f} %",
            memory,
            "?" if spent is None else f"${spent:.2f}",
            duration(remaining),
        )

    def metric(self, kind: str, values: dict) -> None:
        """Keep `values`, which have a step, and pass them on."""
        self._record.metric(kind, values)
        self._trackers.add(kind, values)
        if self._screen:
            self._screen.metric(kind, values)

    def close(self) -> None:
        if self._screen:
            self._screen.close()
        self._trackers.close()


def screen(settings: TrainingConfig, cap: SpendingCap | None):
    """The live picture; None without rich, unless the settings ask for it. Raises ConfigError."""
    try:
        from trainer.loop.screen import Screen
    except ImportError as error:
        if settings.train.display == "live":
            raise ConfigError(
                "train.display is live, which needs the package rich; "
                "run `pip install rich`, or set train.display to lines"
            ) from error
        return None
    return Screen(settings, cap)
