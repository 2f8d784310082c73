"""AdamW and Muon over row blocks of the parameters, with their state on every rank or dealt out (ZeRO stage 1).

A unit is a block of rows (`trainer.checkpoint.blocks.deal`). With `shard` a rank keeps the state of its own units
only, updates these rows and gives them to the others (Rajbhandari et al. 2020, "ZeRO", section 5.1: the optimizer's
memory divides by the number of ranks). AdamW works element by element, so that the result is the same to the bit
either way, and a checkpoint, which names rows, fits any number of ranks, sharded or not.

Muon's unit is a whole matrix (queries, keys and values apart), and its work is always dealt: no rank repeats what
another one does.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from core.settings.training import OptimizerConfig
from trainer.checkpoint.blocks import Unit, deal, key_of
from trainer.distributed.process_group import all_gather
from trainer.model.gpt import GPT
from trainer.optim import muon

ADAMW_STATE = ("exp_avg", "exp_avg_sq")
MUON_STATE = ("momentum",)


class UnitOptimizer:
    """Of what requires a gradient. Decay for matrices and embeddings, none for biases and norms; fused on CUDA."""

    def __init__(self, model: GPT, config: OptimizerConfig, rank: int, world: int):
        self._config = config
        self._parameters = {name: each for name, each in model.named_parameters() if each.requires_grad}
        self._rank = rank
        self._world = world
        self._matrices = _matrices(model) if config.name == "muon" else {}
        shapes = {name: parameter.shape for name, parameter in self._parameters.items()}
        self._units = deal(shapes, world, whole=self._matrices)
        self._owned = [unit for unit in self._units if unit.owner == rank]
        self._dealt = [unit for unit in self._units if world > 1 and (config.zero or unit.name in self._matrices)]
        dealt = set(self._dealt)
        self._rows = {
            unit: nn.Parameter(self._parameters[unit.name].detach()[unit.start : unit.stop])
            for unit in self._units
            if unit.owner == rank or unit not in dealt
        }
        on_gpu = next(model.parameters()).is_cuda
        self._adamw = torch.optim.AdamW(
            self._groups(),
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            fused=on_gpu,
            foreach=not on_gpu,
        )
        # The state exists from the start: a restored one needs somewhere to go, and a checkpoint its layout.
        self._state: dict[Unit, dict[str, torch.Tensor]] = {}
        for unit, rows in self._rows.items():
            self._state[unit] = {name: torch.zeros_like(rows) for name in self._state_names(unit.name)}
            if unit.name not in self._matrices:
                step = torch.zeros((), dtype=torch.float32, device=rows.device if on_gpu else "cpu")
                self._adamw.state[rows] = {"step": step, **self._state[unit]}
        if self._dealt:
            loads = [0] * world
            for unit in self._dealt:
                loads[unit.owner] += self._parameters[unit.name][unit.start : unit.stop].numel()
            self._everyones = torch.zeros(world, max(loads), device=next(model.parameters()).device)

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """Update all parameters from their `.grad`, at `factor` of the peak learning rates."""
        config = self._config
        for group in self._adamw.param_groups:
            group["lr"] = group["peak"] * factor
        for unit, rows in self._rows.items():
            gradient = self._parameters[unit.name].grad[unit.start : unit.stop]
            if unit.name not in self._matrices:
                rows.grad = gradient
                continue
            momentum = self._state[unit]["momentum"]
            rate, decay = config.muon_lr * factor, config.muon_weight_decay
            muon.update(rows, gradient, momentum, rate, decay, config.muon_momentum, config.muon_ns_steps)
        self._adamw.step()
        if self._dealt:
            self._share()

    def set_step(self, step: int) -> None:
        """Tell the bias correction how many steps were done."""
        for state in self._adamw.state.values():
            state["step"].fill_(step)

    def state_bytes(self) -> int:
        """Memory of the optimizer's state on this rank."""
        return sum(tensor.nbytes for state in self._state.values() for tensor in state.values())

    # --- for checkpoints: names are `model.`, `exp_avg.`, `exp_avg_sq.` or `momentum.` before the parameter's ---

    def layout(self) -> Mapping[str, tuple[int, torch.dtype]]:
        """Rows and dtype of every named tensor of a checkpoint."""
        return {
            f"{prefix}.{name}": (parameter.shape[0], parameter.dtype)
            for name, parameter in self._parameters.items()
            for prefix in ("model", *self._state_names(name))
        }

    def blocks(self) -> Iterator[tuple[str, torch.Tensor]]:
        """This rank's share of a checkpoint: (key, rows)."""
        for unit in self._owned:
            yield key_of(f"model.{unit.name}", unit.start, unit.stop), self._rows[unit].detach()
            for name, values in self._state[unit].items():
                yield key_of(f"{name}.{unit.name}", unit.start, unit.stop), values

    @torch.no_grad()
    def restore(self, name: str, start: int, values: torch.Tensor) -> None:
        """Take rows [start, start + len(values)) of a named tensor, as far as this rank holds them."""
        prefix, _, parameter = name.partition(".")
        if prefix == "model":
            self._parameters[parameter][start : start + len(values)].copy_(values)
            return
        for unit, state in self._state.items():
            low, high = max(unit.start, start), min(unit.stop, start + len(values))
            if unit.name == parameter and low < high:
                state[prefix][low - unit.start : high - unit.start].copy_(values[low - start : high - start])

    def shape_of(self, name: str) -> torch.Size:
        """Shape of one row of a named tensor."""
        return self._parameters[name.partition(".")[2]].shape[1:]

    def _state_names(self, parameter: str) -> tuple[str, ...]:
        return MUON_STATE if parameter in self._matrices else ADAMW_STATE

    def _groups(self) -> list[dict]:
        """AdamW's parameter groups: by peak rate, and decayed or not."""
        config = self._config
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for unit, rows in self._rows.items():
            if unit.name in self._matrices:
                continue
            decay = config.weight_decay if self._parameters[unit.name].dim() >= 2 else 0.0
            groups.setdefault((self._peak(unit.name), decay), []).append(rows)
        # AdamW refuses to be without parameters, as a rank that owns matrices only would leave it.
        return [
            {"params": rows, "peak": peak, "lr": peak, "weight_decay": decay} for (peak, decay), rows in groups.items()
        ] or [{"params": [], "peak": config.lr, "lr": config.lr}]

    def _peak(self, name: str) -> float:
        config = self._config
        if name.startswith(("wte", "wpe")):
            return config.embedding_lr or config.lr
        if name.startswith("lm_head"):
            return config.head_lr or config.lr
        return (config.scalar_lr or config.lr) if self._parameters[name].dim() < 2 else config.lr

    def _share(self) -> None:
        """The rows of every dealt unit to every rank, in one exchange."""
        mine = self._everyones[self._rank].clone()
        position = 0
        for unit in self._dealt:
            if unit.owner == self._rank:
                rows = self._rows[unit]
                mine[position : position + rows.numel()].copy_(rows.flatten())
                position += rows.numel()
        all_gather(self._everyones.view(-1), mine)
        positions = [0] * self._world
        for unit in self._dealt:
            target = self._parameters[unit.name][unit.start : unit.stop]
            begin = positions[unit.owner]
            positions[unit.owner] += target.numel()
            if unit.owner != self._rank:
                target.copy_(self._everyones[unit.owner, begin : begin + target.numel()].view_as(target))


def _matrices(model: GPT) -> dict[str, int]:
    """The blocks' matrices, and the rows of each one: those stored together are apart for Muon."""
    rows = {}
    for name, parameter in model.named_parameters():
        if name.startswith("h.") and parameter.dim() == 2:
            together = {"attn.c_attn": 3, "mlp.c_fc": 2 if model.config.mlp == "swiglu" else 1}
            parts = next((count for part, count in together.items() if part in name), 1)
            rows[name] = parameter.shape[0] // parts
    return rows
