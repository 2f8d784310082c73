"""Implements Muon: momentum with orthogonalised matrices (Jordan et al. 2024, "Muon: An optimizer for hidden layers").

Orthogonalisation brings all singular values of an update near one. Such an update moves a layer equally far in every
direction of its gradient. In public runs of GPT-2's size, Muon needs little more than half of AdamW's tokens for the
same loss.

Matrices of one shape are updated in batches, because a GPU would wait if each matrix needed a separate launch. A
batched product may round differently for another batch size. So the batches of a model are fixed (`batches`), and each
batch is computed on one rank. The bits of an update therefore do not depend on the number of ranks.

Shapes: N matrices of a batch, O rows (outputs), I columns (inputs).
"""

import functools
from collections.abc import Callable, Mapping, Sequence

import torch

# A quintic polynomial that moves singular values from (0, 1] to about 0.7 to 1.2 in five rounds (Jordan et al.).
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
# Most batches per shape: one for each GPU of a machine with 8 GPUs.
BATCHES = 8
# If true, the operations between the products are compiled when the blocks are. bench.gpu.toggles sets it to false.
COMPILES = True


def batches(shapes: Mapping[tuple[str, int], torch.Size]) -> list[list[tuple[str, int]]]:
    """Divides the matrices of each shape into at most BATCHES batches.

    A matrix is named by its parameter and first row.
    """
    of_shape: dict[torch.Size, list[tuple[str, int]]] = {}
    for matrix in sorted(shapes):
        of_shape.setdefault(shapes[matrix], []).append(matrix)
    found = []
    for matrices in of_shape.values():
        size = -(-len(matrices) // BATCHES)
        found += [matrices[first : first + size] for first in range(0, len(matrices), size)]
    return found


def orthogonalise(matrices: torch.Tensor, rounds: int) -> torch.Tensor:
    """Approximates U V^T of the singular value decomposition of each matrix, (..., O, I), by Newton-Schulz rounds.

    The products are in bfloat16 on a GPU, and in float32 on a CPU.
    """
    a, b, c = _COEFFICIENTS
    x = matrices.to(torch.bfloat16) if matrices.is_cuda else matrices.float()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    batch = x.reshape(-1, *x.shape[-2:])
    # Divide by an upper bound of the spectral norm.
    batch = batch / (torch.linalg.vector_norm(batch, dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(rounds):
        gram = batch @ batch.mT
        batch = torch.baddbmm(batch, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), batch, beta=a)
    x = batch.view(x.shape)
    return (x.mT if tall else x).to(matrices.dtype)


def _directions(
    gradient_NOI: torch.Tensor, momentum_NOI: torch.Tensor, found_inf: torch.Tensor, mu: float, rounds: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The new momentum, and the orthogonalised direction with Nesterov momentum.

    If `found_inf` is not 0, the result is the old momentum and 0.
    """
    moved_NOI = momentum_NOI.lerp(gradient_NOI, 1 - mu)
    direction_NOI = orthogonalise(gradient_NOI.lerp(moved_NOI, mu), rounds)
    stays = found_inf != 0
    return torch.where(stays, momentum_NOI, moved_NOI), torch.where(stays, 0.0, direction_NOI)


@functools.cache
def _compiled() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    return torch.compile(_directions, dynamic=False)


@torch.no_grad()
def update(
    weights: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor],
    momentum_NOI: torch.Tensor,
    found_inf: torch.Tensor,
    rate: float,
    decay: float,
    mu: float,
    rounds: int,
    fused: bool = False,
) -> None:
    """One step of a batch of N matrices (O, I), in place. `decay` is decoupled, as in AdamW.

    Nothing changes if `found_inf`, a scalar on the device, is not 0. A tall matrix takes a larger step, so that its
    output changes as much as a square matrix's output. `fused` compiles the operations between the products.
    """
    directions = _compiled() if fused and COMPILES else _directions
    moved_NOI, direction_NOI = directions(torch.stack(list(gradients)), momentum_NOI, found_inf, mu, rounds)
    momentum_NOI.copy_(moved_NOI)
    rows, columns = momentum_NOI.shape[1:]
    # If nothing is to change, the factor is 1 and the summand is -0. These change no bit.
    torch._foreach_mul_(weights, torch.where(found_inf != 0, 1.0, 1 - rate * decay))
    torch._foreach_add_(weights, direction_NOI.unbind(), alpha=-rate * max(1.0, rows / columns) ** 0.5)
