"""Losses on the output layer that need more than cross-entropy, chunk by chunk, each chunk computed again backwards.

As in `trainer.model.loss` no (N, V) tensor of a whole micro-batch ever exists; here autograd takes the gradients, and
a chunk's logits are made a second time for them (Chen et al. 2016).

Shapes: N rows, D width, E the teacher's width, V vocabulary rows, C rows of a chunk.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from core.data.vocabulary import GPT2_VOCAB_SIZE
from trainer.model.loss import CPU_CHUNK_ROWS, GPU_CHUNK_ROWS, soft_cap


def token_log_probs(
    x_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor, softcap: float = 0.0
) -> torch.Tensor:
    """Log-probability of each target in nats, float32 (N,)."""

    def of_chunk(x_CD: torch.Tensor, targets_C: torch.Tensor) -> torch.Tensor:
        z_CV = soft_cap(F.linear(x_CD, weight_VD).float(), softcap)
        return z_CV.gather(1, targets_C[:, None].long())[:, 0] - z_CV.logsumexp(1)

    return torch.cat(_each_chunk(of_chunk, x_ND, targets_N))


def divergence_and_cross_entropy(
    x_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    softcap: float,
    teacher_NE: torch.Tensor,
    teacher_VE: torch.Tensor,
    teacher_softcap: float,
    targets_N: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """(2,): the means over all rows of KL(teacher, student), both softened by `temperature`, and of the cross-entropy
    with the targets, in nats. The divergence is over GPT-2's tokens, not over rows that pad a vocabulary."""

    def of_chunk(x_CD: torch.Tensor, y_CE: torch.Tensor, targets_C: torch.Tensor) -> torch.Tensor:
        z_CV = soft_cap(F.linear(x_CD, weight_VD).float(), softcap)
        cross_entropy = F.cross_entropy(z_CV, targets_C.long(), reduction="sum")
        with torch.no_grad():
            t_CV = soft_cap(F.linear(y_CE, teacher_VE).float(), teacher_softcap)
            t_CV = (t_CV[:, :GPT2_VOCAB_SIZE] / temperature).log_softmax(1)
        s_CV = (z_CV[:, :GPT2_VOCAB_SIZE] / temperature).log_softmax(1)
        divergence = F.kl_div(s_CV, t_CV, reduction="sum", log_target=True)
        return torch.stack([divergence, cross_entropy])

    return torch.stack(_each_chunk(of_chunk, x_ND, teacher_NE, targets_N)).sum(0) / len(targets_N)


def _each_chunk(function: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> list[torch.Tensor]:
    rows = GPU_CHUNK_ROWS if tensors[0].is_cuda else CPU_CHUNK_ROWS
    return [
        checkpoint(function, *chunk, use_reentrant=False) if torch.is_grad_enabled() else function(*chunk)
        for chunk in zip(*(tensor.split(rows) for tensor in tensors), strict=True)
    ]
