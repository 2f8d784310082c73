"""Updates the weights: AdamW and Muon over row blocks of the parameters, at a scheduled learning rate.

A block is a range of rows (`trainer.checkpoint.blocks.assign_blocks`), and each block has a rank that owns it. With
optimizer.zero a rank keeps the state of its own blocks only, updates their rows and sends them to the other ranks
(Rajbhandari et al. 2020, "ZeRO", section 5.1: the memory of the optimizer divides by the number of ranks). AdamW works
element by element, so both ways give the same bits. A checkpoint names its rows, so any number of ranks can load it,
with or without optimizer.zero.

A Muon block is a whole matrix; queries, keys and values are separate matrices. Only its owner updates it, even without
optimizer.zero, because an update is expensive.
"""

import math
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from core.settings.training import OptimizerConfig
from trainer.checkpoint.blocks import Block, assign_blocks, key_of
from trainer.distributed.process_group import all_gather
from trainer.model.gpt import GPT
from trainer.optim import muon

ADAMW_STATE = ("exp_avg", "exp_avg_sq")
MUON_STATE = ("momentum",)


class BlockOptimizer:
    """Updates the parameters that require a gradient. Weight decay covers matrices and embeddings only."""

    def __init__(self, model: GPT, config: OptimizerConfig, rank: int, world: int):
        self._config = config
        self._parameters = {name: each for name, each in model.named_parameters() if each.requires_grad}
        self._rank = rank
        self._world = world
        self._matrices = _matrices(model) if config.name == "muon" else {}
        shapes = {name: parameter.shape for name, parameter in self._parameters.items()}
        self._blocks = assign_blocks(shapes, world, rows_of=self._matrices)
        self._owned = [block for block in self._blocks if block.owner == rank]
        self._exchanged = [
            block for block in self._blocks if world > 1 and (config.zero or block.name in self._matrices)
        ]
        exchanged = set(self._exchanged)
        self._rows = {
            block: nn.Parameter(self._parameters[block.name].detach()[block.start : block.stop])
            for block in self._blocks
            if block.owner == rank or block not in exchanged
        }
        on_gpu = next(model.parameters()).is_cuda
        self._adamw = torch.optim.AdamW(
            self._groups(),
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            fused=on_gpu,
            foreach=not on_gpu,
        )
        # The state is allocated now: `restore` copies into it, and a checkpoint needs its layout.
        self._state: dict[Block, dict[str, torch.Tensor]] = {}
        for block, rows in self._rows.items():
            self._state[block] = {name: torch.zeros_like(rows) for name in self._state_names(block.name)}
            if block.name not in self._matrices:
                step = torch.zeros((), dtype=torch.float32, device=rows.device if on_gpu else "cpu")
                self._adamw.state[rows] = {"step": step, **self._state[block]}
        if self._exchanged:
            loads = [0] * world
            for block in self._exchanged:
                loads[block.owner] += self._parameters[block.name][block.start : block.stop].numel()
            self._everyones = torch.zeros(world, max(loads), device=next(model.parameters()).device)

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """Update all parameters from their `.grad`, at `factor` of the peak learning rates."""
        config = self._config
        for group in self._adamw.param_groups:
            group["lr"] = group["peak"] * factor
        for block, rows in self._rows.items():
            gradient = self._parameters[block.name].grad[block.start : block.stop]
            if block.name not in self._matrices:
                rows.grad = gradient
                continue
            momentum = self._state[block]["momentum"]
            rate, decay = config.muon_lr * factor, config.muon_weight_decay
            muon.update(rows, gradient, momentum, rate, decay, config.muon_momentum, config.muon_ns_steps)
        self._adamw.step()
        if self._exchanged:
            self._exchange()

    def set_step(self, step: int) -> None:
        """Set the number of steps that are already done, for the bias correction."""
        for state in self._adamw.state.values():
            state["step"].fill_(step)

    # --- for checkpoints: tensors are named `model.NAME`, `exp_avg.NAME`, `exp_avg_sq.NAME` or `momentum.NAME` ---

    def layout(self) -> Mapping[str, tuple[int, torch.dtype]]:
        """Number of rows and dtype of every named tensor of a checkpoint."""
        return {
            f"{prefix}.{name}": (parameter.shape[0], parameter.dtype)
            for name, parameter in self._parameters.items()
            for prefix in ("model", *self._state_names(name))
        }

    def blocks(self) -> Iterator[tuple[str, torch.Tensor]]:
        """This rank's share of a checkpoint: (key, rows)."""
        for block in self._owned:
            yield key_of(f"model.{block.name}", block.start, block.stop), self._rows[block].detach()
            for name, values in self._state[block].items():
                yield key_of(f"{name}.{block.name}", block.start, block.stop), values

    @torch.no_grad()
    def restore(self, name: str, start: int, values: torch.Tensor) -> None:
        """Copy rows [start, start + len(values)) of a named tensor, except those whose state another rank holds."""
        prefix, _, parameter = name.partition(".")
        if prefix == "model":
            self._parameters[parameter][start : start + len(values)].copy_(values)
            return
        for block, state in self._state.items():
            low, high = max(block.start, start), min(block.stop, start + len(values))
            if block.name == parameter and low < high:
                state[prefix][low - block.start : high - block.start].copy_(values[low - start : high - start])

    def shape_of(self, name: str) -> torch.Size:
        """Shape of one row of a named tensor."""
        return self._parameters[name.partition(".")[2]].shape[1:]

    def _state_names(self, parameter: str) -> tuple[str, ...]:
        return MUON_STATE if parameter in self._matrices else ADAMW_STATE

    def _groups(self) -> list[dict]:
        """AdamW's parameter groups, one for each pair of peak learning rate and weight decay."""
        config = self._config
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for block, rows in self._rows.items():
            if block.name in self._matrices:
                continue
            decay = config.weight_decay if self._parameters[block.name].dim() >= 2 else 0.0
            groups.setdefault((self._peak(block.name), decay), []).append(rows)
        # AdamW requires a group. A rank that owns only matrices has no parameters for it.
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

    def _exchange(self) -> None:
        """Send the updated rows of each exchanged block from its owner to all ranks, in one collective."""
        mine = self._everyones[self._rank].clone()
        position = 0
        for block in self._exchanged:
            if block.owner == self._rank:
                rows = self._rows[block]
                mine[position : position + rows.numel()].copy_(rows.flatten())
                position += rows.numel()
        all_gather(self._everyones.view(-1), mine)
        positions = [0] * self._world
        for block in self._exchanged:
            target = self._parameters[block.name][block.start : block.stop]
            begin = positions[block.owner]
            positions[block.owner] += target.numel()
            if block.owner != self._rank:
                target.copy_(self._everyones[block.owner, begin : begin + target.numel()].view_as(target))


def _matrices(model: GPT) -> dict[str, int]:
    """Muon's parameters by name, with the number of rows of one matrix: a parameter may hold several matrices."""
    rows = {}
    for name, parameter in model.named_parameters():
        if name.startswith("h.") and parameter.dim() == 2:
            together = {"attn.c_attn": 3, "mlp.c_fc": 2 if model.config.mlp == "swiglu" else 1}
            parts = next((count for part, count in together.items() if part in name), 1)
            rows[name] = parameter.shape[0] // parts
    return rows


def rate_factor(step: int, steps: int, config: OptimizerConfig) -> float:
    """The learning rate at optimizer step `step` (1 to `steps`), as a share of the peak rate.

    The rate rises linearly during the warm-up, stays at its peak, and falls to `min_lr_ratio` over the last
    `cooldown_fraction` of the steps. The cosine schedule reaches it at the last step (Loshchilov & Hutter 2017; with a
    fraction of 1 it is the schedule of Brown et al. 2020, appendix B). The linear schedule would reach it one step
    later (warm-up, stable, decay: Hu et al. 2024, "MiniCPM", section 4; Hägele et al. 2024).
    """
    if step <= config.warmup_steps:
        return step / config.warmup_steps
    begin = max(config.warmup_steps, steps - round(config.cooldown_fraction * steps))
    fallen = max(0, step - begin)
    if config.schedule == "cosine":
        left = 0.5 * (1 + math.cos(math.pi * min(1.0, fallen / max(1, steps - begin))))
    else:
        left = 1 - fallen / (steps - begin + 1)  # above 0 at the last step: a rate of 0 would waste it
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * left
