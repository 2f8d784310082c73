"""Computes losses over a large vocabulary without the logits of a whole micro-batch in memory.

The output layer and the loss process the rows in chunks. Each chunk's gradient is computed immediately, in the forward
pass, while its logits are in memory. This takes the same three matrix products as the usual computation, but no (B T,
V) tensor in float32 ever exists (Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models"; Hsu et al.
2024, Liger Kernel). The losses of distillation and preference optimisation leave gradients to autograd, which computes
the logits of each chunk again in the backward pass (Chen et al. 2016).

Shapes: N rows (B T positions), D model width, E the teacher's width, V vocabulary rows, C rows of a chunk.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from core.data.vocabulary import GPT2_VOCAB_SIZE

# Rows of a chunk. With GPT-2's vocabulary, the float32 logits of a chunk take 26 MB on a CPU, which fits the CPU's
# cache. A GPU needs larger products, so on a GPU these logits take 800 MB.
CPU_CHUNK_ROWS = 128
GPU_CHUNK_ROWS = 4096
# If true, on a GPU the matrix product for the output layer's gradient adds its result directly to the sum over chunks.
# If false, each product is rounded to bfloat16, stored, and added to the sum in another pass. bench.gpu.toggles
# measures the difference.
SUM_IN_FLOAT32 = True


def soft_cap(logits: torch.Tensor, cap: float) -> torch.Tensor:
    """cap tanh(logits / cap) (Gemma Team 2024, "Gemma 2", section 2); unchanged if cap is 0."""
    return torch.tanh(logits / cap) * cap if cap else logits


def chunked_cross_entropy(
    x_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_N: torch.Tensor,
    softcap: float = 0.0,
    fused: bool = False,
    share: float | None = None,
) -> torch.Tensor:
    """Mean cross-entropy in nats (float32 scalar) of logits x_ND @ weight_VD.T against targets_N, soft-capped.

    Rows whose target is below 0 do not count. If no row counts, the loss is 0. `fused` compiles the operations on the
    logits into fewer kernels, because a GPU's memory bandwidth limits them. The logits then stay in the format of the
    product, without a float32 copy. If `share` is given, the backward pass gives the gradient of `share` times the
    loss, and ignores the incoming gradient. The factor is applied while the gradients of each chunk are computed. This
    saves a second pass over the gradients.
    """
    return _ChunkedCrossEntropy.apply(x_ND, weight_VD, targets_N.long(), softcap, fused, share)


def with_share(loss: torch.Tensor, share: float) -> torch.Tensor:
    """The same loss, with a backward pass that gives the gradient of share times the loss."""
    return _Share.apply(loss, share)


@torch.no_grad()
def token_scores(
    x_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor, softcap: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The cross-entropy of each row, and whether each target is the likeliest token.

    The cross-entropy is in nats, float32 (N,). It is 0 if the target is below 0. The second result is bool (N,).
    """
    losses_N = torch.zeros(len(targets_N), dtype=torch.float32, device=x_ND.device)
    likeliest_N = torch.zeros(len(targets_N), dtype=torch.bool, device=x_ND.device)
    dtype = _product_dtype(x_ND)
    with torch.autocast(x_ND.device.type, enabled=False):
        w_VD = weight_VD.to(dtype)
        for chunk in _chunks(x_ND):
            logits_CV = x_ND[chunk].to(dtype) @ w_VD.T
            targets_C = targets_N[chunk].long()
            losses_N[chunk] = _losses(logits_CV, targets_C, softcap)
            # On a CPU, this comparison takes a third of the time of argmax.
            likeliest_N[chunk] = logits_CV.gather(1, targets_C.clamp(min=0)[:, None])[:, 0] == logits_CV.amax(1)
    return losses_N, likeliest_N


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
    """Mean KL(teacher, student) and mean cross-entropy with the targets over all rows, in nats, (2,).

    `temperature` divides the logits of the divergence only. The divergence covers GPT-2's tokens and no padding rows.
    """

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


class _Share(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss: torch.Tensor, share: float):
        ctx.share = share
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        return grad * ctx.share, None


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        x_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        targets_N: torch.Tensor,
        softcap: float,
        fused: bool,
        share: float | None,
    ):
        kernel = _compiled() if fused else _loss_and_gradient
        training = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        dtype = _product_dtype(x_ND)
        with torch.autocast(x_ND.device.type, enabled=False):
            w_VD = weight_VD.to(dtype)
            total = torch.zeros((), dtype=torch.float32, device=x_ND.device)
            of_row = 1 / (targets_N >= 0).sum().clamp(min=1).float()
            of_gradient = of_row if share is None else of_row * share
            grad_x_ND = torch.empty_like(x_ND) if training else None
            grad_w_VD = torch.zeros_like(weight_VD) if training else None
            for chunk in _chunks(x_ND):
                x_CD = x_ND[chunk].to(dtype)
                logits_CV = x_CD @ w_VD.T
                if not training:
                    total += _losses(logits_CV, targets_N[chunk], softcap).sum()
                    continue
                loss, grad_CV = kernel(logits_CV, targets_N[chunk], of_gradient, softcap, fused)
                total += loss
                grad_x_ND[chunk] = grad_CV @ w_VD
                if dtype == grad_w_VD.dtype:
                    grad_w_VD.addmm_(grad_CV.T, x_CD)
                elif x_ND.is_cuda and SUM_IN_FLOAT32:
                    torch.addmm(grad_w_VD, grad_CV.T, x_CD, out_dtype=torch.float32, out=grad_w_VD)
                else:
                    grad_w_VD += grad_CV.T @ x_CD
        if training:
            ctx.save_for_backward(grad_x_ND, grad_w_VD)
        ctx.is_scaled = share is not None
        return total * of_row

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        grad_x_ND, grad_w_VD = ctx.saved_tensors
        if not ctx.is_scaled:
            grad_x_ND, grad_w_VD = grad_x_ND * grad, grad_w_VD * grad
        return grad_x_ND, grad_w_VD, None, None, None, None


def _losses(logits_CV: torch.Tensor, targets_C: torch.Tensor, softcap: float) -> torch.Tensor:
    z_CV = soft_cap(logits_CV.float(), softcap)
    of_target_C = z_CV.gather(1, targets_C.clamp(min=0)[:, None])[:, 0]
    return torch.where(targets_C >= 0, z_CV.logsumexp(1) - of_target_C, 0.0)


def _loss_and_gradient(
    logits_CV: torch.Tensor, targets_C: torch.Tensor, share: torch.Tensor, softcap: float, fused: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of the losses, and d (share x loss) / d logits = share (softmax - one-hot), in the dtype of the logits.

    If the operations are not compiled, each of them is a pass over memory. In that case, the function computes one
    exponential per logit for both the loss and the gradient, and reuses the memory of `logits_CV` where possible.
    """
    z_CV = soft_cap(logits_CV.float(), softcap)
    counts_C1 = (targets_C >= 0)[:, None]
    targets_C1 = targets_C.clamp(min=0)[:, None]
    of_target_C1 = z_CV.gather(1, targets_C1)
    share_C1 = counts_C1 * share
    if fused:
        lse_C1 = z_CV.logsumexp(1, keepdim=True)
        columns_V = torch.arange(z_CV.shape[1], device=z_CV.device)
        grad_CV = ((z_CV - lse_C1).exp() - (columns_V == targets_C1).float()) * share_C1
    else:
        max_C1 = z_CV.amax(1, keepdim=True)
        grad_CV = (z_CV - max_C1 if softcap else z_CV.sub_(max_C1)).exp_()
        sum_C1 = grad_CV.sum(1, keepdim=True)
        lse_C1 = max_C1 + sum_C1.log()
        grad_CV.mul_(share_C1 / sum_C1).scatter_add_(1, targets_C1, -share_C1)
    loss = torch.where(counts_C1, lse_C1 - of_target_C1, 0.0).sum()
    if softcap:
        grad_CV = grad_CV * (1 - (z_CV / softcap).square())  # the derivative of the soft cap
    return loss, grad_CV.to(logits_CV.dtype)


@functools.cache
def _compiled():
    return torch.compile(_loss_and_gradient, dynamic=False)


def _chunks(x_ND: torch.Tensor) -> list[slice]:
    rows = GPU_CHUNK_ROWS if x_ND.is_cuda else CPU_CHUNK_ROWS
    return [slice(first, first + rows) for first in range(0, len(x_ND), rows)]


def _product_dtype(x: torch.Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _each_chunk(function: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> list[torch.Tensor]:
    rows = GPU_CHUNK_ROWS if tensors[0].is_cuda else CPU_CHUNK_ROWS
    return [
        checkpoint(function, *chunk, use_reentrant=False) if torch.is_grad_enabled() else function(*chunk)
        for chunk in zip(*(tensor.split(rows) for tensor in tensors), strict=True)
    ]
