"""AdamW over row blocks of the parameters, with its state on every rank or dealt out (ZeRO stage 1).

A unit is a block of rows (`trainer.checkpoint.pieces.deal`). With `shard` a rank keeps the moments of its own units
only, updates these rows and gives them to the others (Rajbhandari et al. 2020, "ZeRO", section 5.1: the optimizer's
memory divides by the number of ranks). AdamW works element by element, so that the result is the same to the bit
either way, and a checkpoint, which names rows, fits any number of ranks, sharded or not.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from core.schema import OptimizerConfig
from trainer.checkpoint.pieces import deal, key_of
from trainer.distributed import all_gather

MOMENTS = ("exp_avg", "exp_avg_sq")


class UnitOptimizer:
    """Decay for matrices and embeddings, none for biases and norms; fused on CUDA."""

    def __init__(self, model: nn.Module, config: OptimizerConfig, rank: int, world: int):
        self._parameters = dict(model.named_parameters())
        self._rank = rank
        self._world = world
        self._sharded = config.shard and world > 1
        self._units = deal({name: parameter.shape for name, parameter in self._parameters.items()}, world)
        self._owned = [unit for unit in self._units if unit.owner == rank]
        self._rows = {
            unit: nn.Parameter(self._parameters[unit.name].detach()[unit.start : unit.stop])
            for unit in (self._owned if self._sharded else self._units)
        }
        decayed = [rows for unit, rows in self._rows.items() if self._parameters[unit.name].dim() >= 2]
        others = [rows for unit, rows in self._rows.items() if self._parameters[unit.name].dim() < 2]
        on_gpu = next(model.parameters()).is_cuda
        self._adamw = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            fused=on_gpu,
            foreach=not on_gpu,
        )
        # The moments exist from the start: a restored one needs somewhere to go, and a checkpoint its layout.
        for rows in self._rows.values():
            state = self._adamw.state[rows]
            state["step"] = torch.zeros((), dtype=torch.float32, device=rows.device if on_gpu else "cpu")
            for moment in MOMENTS:
                state[moment] = torch.zeros_like(rows)
        if self._sharded:
            loads = [0] * world
            for unit in self._units:
                loads[unit.owner] += self._parameters[unit.name][unit.start : unit.stop].numel()
            self._everyones = torch.zeros(world, max(loads), device=next(model.parameters()).device)

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Update all parameters from their `.grad` with learning rate `rate`."""
        for group in self._adamw.param_groups:
            group["lr"] = rate
        for unit, rows in self._rows.items():
            rows.grad = self._parameters[unit.name].grad[unit.start : unit.stop]
        self._adamw.step()
        if self._sharded:
            self._share()

    def set_step(self, step: int) -> None:
        """Tell the bias correction how many steps were done."""
        for rows in self._rows.values():
            self._adamw.state[rows]["step"].fill_(step)

    def state_bytes(self) -> int:
        """Memory of the moments on this rank."""
        return sum(self._adamw.state[rows][m].nbytes for rows in self._rows.values() for m in MOMENTS)

    # --- for checkpoints: names are `model.`, `exp_avg.` or `exp_avg_sq.` before the parameter's ---

    def layout(self) -> Mapping[str, tuple[int, torch.dtype]]:
        """Rows and dtype of every named tensor of a checkpoint."""
        return {
            f"{prefix}.{name}": (parameter.shape[0], parameter.dtype)
            for prefix in ("model", *MOMENTS)
            for name, parameter in self._parameters.items()
        }

    def blocks(self) -> Iterator[tuple[str, torch.Tensor]]:
        """This rank's share of a checkpoint: (key, rows)."""
        for unit in self._owned:
            rows = self._rows[unit]
            yield key_of(f"model.{unit.name}", unit.start, unit.stop), rows.detach()
            for moment in MOMENTS:
                yield key_of(f"{moment}.{unit.name}", unit.start, unit.stop), self._adamw.state[rows][moment]

    @torch.no_grad()
    def restore(self, name: str, start: int, values: torch.Tensor) -> None:
        """Take rows [start, start + len(values)) of a named tensor, as far as this rank holds them."""
        prefix, _, parameter = name.partition(".")
        if prefix == "model":
            self._parameters[parameter][start : start + len(values)].copy_(values)
            return
        for unit, rows in self._rows.items():
            low, high = max(unit.start, start), min(unit.stop, start + len(values))
            if unit.name == parameter and low < high:
                moment = self._adamw.state[rows][prefix]
                moment[low - unit.start : high - unit.start].copy_(values[low - start : high - start])

    def shape_of(self, name: str) -> torch.Size:
        """Shape of one row of a named tensor."""
        return self._parameters[name.partition(".")[2]].shape[1:]

    def _share(self) -> None:
        """Every rank's rows to every rank, in one exchange."""
        mine = self._everyones[self._rank].clone()
        position = 0
        for unit in self._owned:
            rows = self._rows[unit]
            mine[position : position + rows.numel()].copy_(rows.flatten())
            position += rows.numel()
        all_gather(self._everyones.view(-1), mine)
        positions = [0] * self._world
        for unit in self._units:
            target = self._parameters[unit.name][unit.start : unit.stop]
            begin = positions[unit.owner]
            positions[unit.owner] += target.numel()
            if unit.owner != self._rank:
                target.copy_(self._everyones[unit.owner, begin : begin + target.numel()].view_as(target))
