"""Muon: momentum whose matrices are made orthogonal (Jordan et al. 2024, "Muon: An optimizer for hidden layers").

An update with all singular values near one moves a layer by the same amount in every direction that its gradient
has; in public runs of GPT-2 size it needs little more than half of AdamW's tokens for the same loss.
"""

import torch

# Quintic polynomial that drives singular values in (0, 1] to within about 0.7 to 1.2 in five rounds (Jordan et al.).
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrix: torch.Tensor, rounds: int) -> torch.Tensor:
    """About U V^T of the singular value decomposition of `matrix`, by Newton-Schulz rounds; in bfloat16 on a GPU.

    One matrix at a time: a batched product may round otherwise for another batch size, and which matrices a rank
    holds depends on the number of ranks.
    """
    a, b, c = _COEFFICIENTS
    x = matrix.to(torch.bfloat16) if matrix.is_cuda else matrix.float()
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.T
    x = x / (x.norm() + 1e-7)  # the Frobenius norm bounds the spectral one
    for _ in range(rounds):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if tall else x).to(matrix.dtype)


@torch.no_grad()
def update(
    weight: torch.Tensor,
    gradient: torch.Tensor,
    momentum: torch.Tensor,
    rate: float,
    decay: float,
    mu: float,
    rounds: int,
) -> None:
    """One step of one matrix (out, in), in place, with Nesterov momentum; `decay` is decoupled, as in AdamW.

    A tall matrix moves by more, so that its output changes as much as a square one's.
    """
    momentum.lerp_(gradient, 1 - mu)
    direction = orthogonalise(gradient.lerp(momentum, mu), rounds)
    weight.mul_(1 - rate * decay)
    weight.add_(direction, alpha=-rate * max(1.0, weight.shape[0] / weight.shape[1]) ** 0.5)
