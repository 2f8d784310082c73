"""Estimates how fast a machine trains a model: from published MFU, or from a finished run of this project.

tokens/s = MFU x peak FLOP/s / FLOPs per token, with the FLOPs of core.settings.model. Most of the published runs are
GPT-2-class models of 124M to 1.6B parameters on one node. Figures marked † are not stated in the sources. They were
computed from the tokens/s or ms/step that the sources state.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from clouds.base import Offer
from core.gpus import peak_flops
from core.run.model import Run
from core.run.phases import OVERHEAD_PHASES, PREPARATION_PHASES
from costs.units import flops_per_token


@dataclass(frozen=True)
class MfuRange:
    """A range of the MFU, the share of peak FLOP/s. `kind` is measured, sourced or assumed."""

    low: float
    expected: float
    high: float
    kind: str
    source: str


_PUBLISHED = {
    "A100": MfuRange(
        0.36,
        0.51,
        0.60,
        "sourced",
        "a 416M model on 8xA100-40 35.9 %; modded-nanogpt track 3 on 8xA100-80 51 %†; llm.c 124M 300 ms/step 60 %†",
    ),
    "H100": MfuRange(
        0.33, 0.41, 0.50, "sourced", "torchtitan 8B 33-39 %; llm.c 124M 140 ms/step 41 %†; llm.c 1558M about 50 %"
    ),
    "GH200": MfuRange(
        0.25, 0.33, 0.41, "sourced", "a 270M model without flash attention 25 %†; modded-nanogpt on 4xGH200 33 %†; H100"
    ),
}
ASSUMED = MfuRange(0.25, 0.35, 0.45, "assumed", "no published run known for this GPU")
# Accelerators whose names in SkyPilot's catalog differ from the keys of _PUBLISHED.
_DEVICE = {"A100-80GB": "A100", "A10G": "A10G", "H100-SXM": "H100"}


# FLOP/s of one vCPU in float32. Other processors may be slower or faster by _CPU_FACTOR.
CPU_FLOPS_PER_VCPU = 33e9
_CPU_FACTOR = 2.0
_CPU_SOURCE = (
    "speed of a CPU: 33 GFLOP/s per vCPU, which the debug preset had on 2 vCPUs of an AMD EPYC (README, demo); assumed "
    "for other CPUs, within a factor of 2"
)


@dataclass(frozen=True)
class Throughput:
    """Tokens per second of all machines of a task. `kind` is measured, sourced or assumed; `source` explains it."""

    low: float
    expected: float
    high: float
    kind: str
    source: str

    def times(self, factor: float) -> "Throughput":
        return replace(self, low=self.low * factor, expected=self.expected * factor, high=self.high * factor)


@dataclass(frozen=True)
class Measured:
    """Throughput and overhead of a run of this project, measured on the run's last machine that trained.

    `provision_seconds` is the time from the request for the machine to its boot. `shutdown_seconds` is the time from
    the end of the program to the end of the machine. Both are None if they are unknown.
    """

    run: str
    instance_type: str | None
    gpu: str | None
    gpus: int
    tokens_per_second: float
    flops_per_token: float | None
    ready_seconds: float
    overhead_share: float
    ended_at: float = 0.0
    provision_seconds: float | None = None
    shutdown_seconds: float | None = None


def nearest(own: Iterable[Measured], offer: Offer, nodes: int, flops: float | None) -> Measured | None:
    """The newest measurement on the offer's instance type whose number of GPUs and FLOPs per token differ least."""
    gpus = offer.accelerators * nodes

    def distance(each: Measured) -> tuple[bool, float, float]:
        return each.gpus != gpus, abs((each.flops_per_token or 0.0) - (flops or 0.0)), -each.ended_at

    return min((each for each in own if each.instance_type == offer.instance_type), key=distance, default=None)


def without(own: Iterable[Measured], names: Iterable[str]) -> list[Measured]:
    """The measurements without those fields, which an assumption replaces. Other names are ignored."""
    dropped = {"provision_seconds", "shutdown_seconds"}.intersection(names)
    return [replace(each, **dict.fromkeys(dropped)) for each in own]


def rate_of(offer: Offer, nodes: int, flops: float | None, measured: Measured | None) -> Throughput | None:
    """Throughput of `nodes` machines on a model with `flops` per token.

    A measured speed is preferred to a published one. If neither exists, the speed is assumed. None if the model's FLOPs
    or the machine's peak FLOP/s are not known.
    """
    gpus = offer.accelerators * nodes
    if measured and offer.instance_type == measured.instance_type:
        scale = measured.flops_per_token / flops if flops and measured.flops_per_token else 1.0
        if gpus and measured.gpus:
            scale *= gpus / measured.gpus
        rate = measured.tokens_per_second * scale
        return Throughput(
            rate * 0.9, rate, rate * 1.1, "measured", f"speed of {offer.instance_type}: measured in {measured.run}"
        )
    if not flops:
        return None
    if not offer.accelerator:
        rate = CPU_FLOPS_PER_VCPU * (offer.vcpus or 0.0) * nodes / flops
        return Throughput(rate / _CPU_FACTOR, rate, rate * _CPU_FACTOR, "assumed", _CPU_SOURCE) if rate else None
    peak = peak_flops(offer.accelerator)
    if peak is None:
        return None
    speed = _PUBLISHED.get(_DEVICE.get(offer.accelerator, offer.accelerator), ASSUMED)
    full = peak * gpus / flops
    said = (
        f"speed of {offer.accelerator}: MFU {speed.expected:.0%} ({speed.low:.0%} to {speed.high:.0%}), {speed.source}"
    )
    return Throughput(speed.low * full, speed.expected * full, speed.high * full, speed.kind, said)


def measure(run: Run) -> Measured | None:
    """Throughput and overhead of the newest segment that trained, or None if no segment did."""
    for segment in reversed(run.segments):
        seconds, count = sum(segment.steps.train), len(segment.steps.number)
        tokens = _tokens_of(segment.records("train"))
        if not seconds or not count or tokens is None:
            continue
        spent = segment.phase_seconds()
        trained = spent.get("train", 0.0)
        others = sum(spent.get(phase, 0.0) for phase in OVERHEAD_PHASES)
        return Measured(
            run=run.url,
            instance_type=segment.machine.instance_type,
            gpu=segment.machine.gpu,
            gpus=segment.gpus,
            tokens_per_second=tokens * count / seconds,
            flops_per_token=flops_per_token(run.config),
            ready_seconds=sum(spent.get(phase, 0.0) for phase in PREPARATION_PHASES),
            overhead_share=others / trained if trained else 0.0,
            ended_at=segment.ended_at or 0.0,
        )
    return None


def _tokens_of(records: Sequence[Mapping[str, Any]]) -> float | None:
    """Tokens per step. None if there are no metrics."""
    known = [record for record in records if record["tokens"] and record["step"]]
    return known[-1]["tokens"] / known[-1]["step"] if known else None
