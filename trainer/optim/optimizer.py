"""Updates the weights: AdamW and Muon over row blocks of the parameters, at a scheduled learning rate.

A block is a range of rows (`trainer.checkpoint.blocks.assign_blocks`), and each block has a rank that owns it. If
optimizer.zero is set, a rank keeps the state of its own blocks only. It updates their rows and sends the rows to the
other ranks (Rajbhandari et al. 2020, "ZeRO", section 5.1). The memory of the optimizer's state per rank is then divided
by the number of ranks. AdamW works element by element, so optimizer.zero changes no bits. A checkpoint names its rows,
so any number of ranks can load it, with or without optimizer.zero.

A Muon block is a whole matrix. Queries, keys and values are separate matrices. Only the owner of a matrix updates it,
even if optimizer.zero is not set, because an update is expensive. The matrices of a batch (trainer.optim.muon) have one
owner.

No operation here waits for a GPU. AdamW takes one fused kernel per group, and Muon updates a batch of matrices at a
time, so the number of operations does not grow with the number of tensors.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from core.settings.training import OptimizerConfig
from trainer.checkpoint.blocks import Block, assign_blocks, key_of
from trainer.distributed.process_group import all_gather
from trainer.model.gpt import GPT
from trainer.optim import muon

ADAMW_STATE = ("exp_avg", "exp_avg_sq")
MUON_STATE = ("momentum",)


@dataclass
class AdamWGroup:
    """Rows with the same peak rate and the same weight decay. The lists hold one tensor per block."""

    peak: float
    decay: float
    blocks: list[Block]
    rows: list[torch.Tensor]
    means: list[torch.Tensor]
    squares: list[torch.Tensor]


@dataclass
class MuonBatch:
    """Matrices of one shape, and their momentum in one tensor (N, O, I)."""

    blocks: list[Block]
    rows: list[torch.Tensor]
    momentum_NOI: torch.Tensor


class BlockOptimizer:
    """Updates the parameters that require a gradient. Weight decay covers matrices and embeddings only."""

    def __init__(self, model: GPT, config: OptimizerConfig, rank: int, world: int):
        self._config = config
        self._model = model
        self._parameters = {name: each for name, each in model.named_parameters() if each.requires_grad}
        self._rank = rank
        self._world = world
        self._device = next(model.parameters()).device
        self._matrices = _matrices(model) if config.name == "muon" else {}
        shapes = {name: parameter.shape for name, parameter in self._parameters.items()}
        batches = muon.batches(
            {
                (name, start): torch.Size((rows, *shapes[name][1:]))
                for name, rows in self._matrices.items()
                for start in range(0, shapes[name][0], rows)
            }
        )
        self._blocks = assign_blocks(shapes, world, rows_of=self._matrices, together=batches)
        self._owned = [block for block in self._blocks if block.owner == rank]
        self._exchanged = [
            block for block in self._blocks if world > 1 and (config.zero or block.name in self._matrices)
        ]
        exchanged = set(self._exchanged)
        self._rows = {
            block: self._parameters[block.name].detach()[block.start : block.stop]
            for block in self._blocks
            if block.owner == rank or block not in exchanged
        }
        # The state is allocated here, because `restore` copies into it and a checkpoint needs its layout.
        self._state: dict[Block, dict[str, torch.Tensor]] = {}
        self._adamw = self._adamw_groups()
        self._muon = self._muon_batches(batches)
        self._steps_done = torch.zeros((), device=self._device)
        self._all_is_finite = torch.zeros((), device=self._device)
        if self._exchanged:
            self._prepare_exchange()

    @torch.no_grad()
    def step(self, factor: float, found_inf: torch.Tensor | None = None) -> None:
        """Update all parameters from their `.grad`, at `factor` of the peak learning rates.

        If `found_inf`, a float32 scalar on the device, is not 0, no weight and no state changes.
        """
        found_inf = self._all_is_finite if found_inf is None else found_inf
        self._steps_done += found_inf == 0
        for group in self._adamw:
            torch._fused_adamw_(
                group.rows,
                [self._gradient(block) for block in group.blocks],
                group.means,
                group.squares,
                [],
                [self._steps_done] * len(group.rows),
                lr=group.peak * factor,
                beta1=self._config.beta1,
                beta2=self._config.beta2,
                weight_decay=group.decay,
                eps=self._config.eps,
                amsgrad=False,
                maximize=False,
                found_inf=found_inf,
            )
        for batch in self._muon:
            muon.update(
                batch.rows,
                [self._gradient(block) for block in batch.blocks],
                batch.momentum_NOI,
                found_inf,
                self._config.muon_lr * factor,
                self._config.muon_weight_decay,
                self._config.muon_momentum,
                self._config.muon_ns_steps,
                fused=self._model.fused,
            )
        if self._exchanged:
            self._exchange()

    def set_step(self, step: int) -> None:
        """Set the number of steps that are already done, for the bias correction."""
        self._steps_done.fill_(step)

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
        """Copy `values` to the rows [start, start + len(values)) of a named tensor.

        Rows whose state another rank holds are left out.
        """
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

    def _gradient(self, block: Block) -> torch.Tensor:
        return self._parameters[block.name].grad[block.start : block.stop]

    def describe(self) -> str:
        """A text for the log: the numbers of parameters with and without weight decay, and the kernels in use."""
        counts = {True: [0, 0], False: [0, 0]}  # tensors, parameters
        for parameter in self._parameters.values():
            counts[parameter.dim() >= 2][0] += 1
            counts[parameter.dim() >= 2][1] += parameter.numel()
        (decayed, with_decay), (others, without) = counts[True], counts[False]
        matrices = f"Muon for {len(self._matrices)} matrices, " if self._matrices else ""
        return (
            f"optimizer: {matrices}fused AdamW on {self._device.type}; weight decay on {with_decay:,} parameters of "
            f"{decayed} tensors, none on {without:,} parameters of {others} tensors"
        )

    def _adamw_groups(self) -> list[AdamWGroup]:
        """Groups of rows that have the same peak rate and the same weight decay."""
        groups: dict[tuple[float, float], AdamWGroup] = {}
        for block, rows in self._rows.items():
            if block.name in self._matrices:
                continue
            decay = self._config.weight_decay if self._parameters[block.name].dim() >= 2 else 0.0
            key = (self._peak(block.name), decay)
            group = groups.setdefault(key, AdamWGroup(*key, [], [], [], []))
            mean, square = torch.zeros_like(rows), torch.zeros_like(rows)
            self._state[block] = dict(zip(ADAMW_STATE, (mean, square), strict=True))
            group.blocks.append(block)
            group.rows.append(rows)
            group.means.append(mean)
            group.squares.append(square)
        return list(groups.values())

    def _muon_batches(self, batches: list[list[tuple[str, int]]]) -> list[MuonBatch]:
        """This rank's batches."""
        mine = {(block.name, block.start): block for block in self._owned}
        found = []
        for batch in batches:
            blocks = [mine[each] for each in batch if each in mine]
            if not blocks:
                continue
            rows = [self._rows[block] for block in blocks]
            momentum_NOI = torch.zeros(len(rows), *rows[0].shape, dtype=rows[0].dtype, device=self._device)
            for block, momentum_OI in zip(blocks, momentum_NOI, strict=True):
                self._state[block] = dict(zip(MUON_STATE, [momentum_OI], strict=True))
            found.append(MuonBatch(blocks, rows, momentum_NOI))
        return found

    def _peak(self, name: str) -> float:
        config = self._config
        if name.startswith(("wte", "wpe")):
            return config.embedding_lr or config.lr
        if name.startswith("lm_head"):
            return config.head_lr or config.lr
        return (config.scalar_lr or config.lr) if self._parameters[name].dim() < 2 else config.lr

    def _prepare_exchange(self) -> None:
        """Allocate the memory of the exchange, and list the copies into it and out of it."""
        loads = [0] * self._world
        places = []
        for block in self._exchanged:
            count = self._parameters[block.name].detach()[block.start : block.stop].numel()
            places.append((block, loads[block.owner], count))
            loads[block.owner] += count
        self._everyones = torch.zeros(self._world, max(loads), device=self._device)
        self._mine = torch.zeros(max(loads), device=self._device)
        self._outgoing: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])  # targets and sources
        self._incoming: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        for block, begin, count in places:
            rows = self._parameters[block.name].detach()[block.start : block.stop]
            is_mine = block.owner == self._rank
            buffer = self._mine if is_mine else self._everyones[block.owner]
            targets, sources = self._outgoing if is_mine else self._incoming
            there = buffer[begin : begin + count].view_as(rows)
            targets.append(there if is_mine else rows)
            sources.append(rows if is_mine else there)

    def _exchange(self) -> None:
        """Send the updated rows of each exchanged block from its owner to all ranks, in one collective."""
        if self._outgoing[0]:
            torch._foreach_copy_(*self._outgoing)
        all_gather(self._everyones.view(-1), self._mine)
        if self._incoming[0]:
            torch._foreach_copy_(*self._incoming)


def _matrices(model: GPT) -> dict[str, int]:
    """The parameters that Muon updates. The result maps each name to the number of rows of one matrix.

    A parameter may hold several matrices.
    """
    rows = {}
    for name, parameter in model.named_parameters():
        if name.startswith("h.") and parameter.dim() == 2:
            together = {"attn.c_attn": 3, "mlp.c_fc": 2 if model.config.mlp == "swiglu" else 1}
            parts = next((count for part, count in together.items() if part in name), 1)
            rows[name] = parameter.shape[0] // parts
    return rows
