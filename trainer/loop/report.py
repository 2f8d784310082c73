"""Reports each step: as a metric in the run's folder, in the log or on a live screen, and to trackers."""

import logging
import sys

import torch

from core.errors import ConfigError
from core.figures import duration, quantity
from core.gpus import peak_flops
from core.run.cap import SpendingCap
from core.run.folder import RunFolder, id_of
from core.run.segment import SegmentLog
from trainer.distributed.process_group import Ranks
from trainer.loop.outlook import Outlook
from trainer.loop.trackers import Trackers
from trainer.stages.stage import Stage

log = logging.getLogger("train")


class StepReporter:
    """Rank 0 reports; the instances of the other ranks do nothing."""

    def __init__(self, stage: Stage, ranks: Ranks, segment: SegmentLog, first_step: int = 0):
        settings = stage.settings
        self._stage = stage
        self._train = settings.train
        self._tokens_per_step = settings.batch.tokens_per_step
        self._ranks = ranks
        self._segment = segment
        peak = peak_flops(torch.cuda.get_device_name()) if ranks.device.type == "cuda" else None
        known = peak and stage.flops_per_token
        self._peak_flops = peak * ranks.world if known else None
        # When overfitting, all ranks compute the same micro-batch, so its tokens count once.
        copies = ranks.world // stage.share_world
        self._flops_per_step = stage.flops_per_token * self._tokens_per_step * copies if known else 0.0
        display = settings.train.display
        live = ranks.is_main and (display == "live" or (display == "auto" and sys.stderr.isatty()))
        self.outlook: Outlook | None = None
        self._screen = open_screen(display, stage.steps, segment.cap) if live else None
        kinds = settings.train.trackers if ranks.is_main else ()
        run_id = id_of(RunFolder(settings.run.url)) if kinds else ""
        self._trackers = Trackers(kinds, settings.run.url, stage.config, run_id, first_step)

    def step(self, step: int, loss: float, rate: float, norm: float, seconds: float, waited_seconds: float) -> None:
        """Report optimizer step `step`. It took `seconds`, including `waited_seconds` for data."""
        steps = self._stage.steps
        tokens_per_second = self._tokens_per_step / seconds
        mfu = self._flops_per_step / seconds / self._peak_flops if self._peak_flops else None
        values = {
            "step": step,
            "loss": loss,
            "lr": rate,
            "grad_norm": norm,
            "tokens": step * self._tokens_per_step,
            "step_seconds": seconds,
            "tokens_per_second": tokens_per_second,
            "mfu": mfu,
            "data_wait_seconds": waited_seconds,
        }
        self.metric("train", values)
        if self.outlook:
            self.outlook.add(step, loss)
        cap = self._segment.cap
        spent = cap.spent_usd() if cap else None
        if spent is not None:  # the run does not store this record, because reports compute it from the ledger
            self._trackers.add("cost", {"step": step, "usd_at_most": spent})
        end = self.outlook.view.loss.end if self.outlook and self.outlook.view else steps
        remaining = seconds * max(0, min(steps, end) - step)
        if self._screen:
            self._screen.step(values, spent, remaining)
        if step % self._train.log_every and step != steps:
            return
        view = self.outlook and self.outlook.refreshed(step)
        if view:
            self.metric("forecast", view.as_metric())
        memory = f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB" if self._ranks.device.type == "cuda" else "cpu"
        log.log(
            logging.DEBUG if self._screen else logging.INFO,
            "step %d/%d | loss %.4f | lr %.2e | grad norm %.3f | %s ms | %s tokens/s | MFU %s | %s | spent %s | "
            "remaining %s%s",
            step,
            steps,
            loss,
            rate,
            norm,
            f"{1000 * seconds:,.0f}",
            quantity(tokens_per_second),
            "?" if mfu is None else f"{100 * mfu:.1f} %",
            memory,
            "?" if spent is None else f"${spent:.2f}",
            duration(remaining),
            f" | expected: {self.outlook.view}" if self.outlook and self.outlook.view else "",
        )

    def metric(self, kind: str, values: dict) -> None:
        """Store `values`, one of which is the step, and send them to the screen and the trackers."""
        self._segment.metric(kind, values)
        if self.outlook and kind == "eval" and values["step"]:
            self.outlook.validated(values["step"], values["val_loss"])
        self._trackers.add(kind, values)
        if self._screen:
            self._screen.metric(kind, values)

    def close(self) -> None:
        if self._screen:
            self._screen.close()
        self._trackers.close()


def open_screen(display: str, steps: int, cap: SpendingCap | None):
    """The live screen. If the package rich is missing: None, or ConfigError if `display` is live."""
    try:
        from trainer.loop.screen import Screen
    except ImportError as error:
        if display == "live":
            raise ConfigError(
                "train.display is live, which needs the package rich; "
                "run `pip install rich`, or set train.display to lines"
            ) from error
        return None
    return Screen(steps, cap)
