"""Cross-entropy of a large vocabulary without the logits of a whole micro-batch in memory.

The output layer and the loss go through the rows in chunks, and each chunk's gradient is taken at once, while its
logits are at hand: the same three matrix products as the plain way, but no (B T, V) tensor in float32 ever exists
(Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models"; Hsu et al. 2024, Liger Kernel).

Shapes: N rows (B T positions), D model width, V vocabulary rows, C rows of a chunk.
"""

import torch

# 26 MB of float32 logits stay in a CPU's cache; a GPU wants larger products, 800 MB at the GPT-2 vocabulary.
CPU_CHUNK_ROWS = 128
GPU_CHUNK_ROWS = 4096


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        rows = x_ND.shape[0]
        chunk = GPU_CHUNK_ROWS if x_ND.is_cuda else CPU_CHUNK_ROWS
        training = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        dtype = (
            torch.get_autocast_dtype(x_ND.device.type) if torch.is_autocast_enabled(x_ND.device.type) else x_ND.dtype
        )
        with torch.autocast(x_ND.device.type, enabled=False):
            w_VD = weight_VD.to(dtype)
            total = torch.zeros((), dtype=torch.float32, device=x_ND.device)
            grad_x_ND = torch.empty_like(x_ND) if training else None
            grad_w_VD = torch.zeros_like(weight_VD) if training else None
            for first in range(0, rows, chunk):
                x_CD = x_ND[first : first + chunk].to(dtype)
                targets_C1 = targets_N[first : first + chunk, None]
                logits_CV = (x_CD @ w_VD.T).float()
                lse_C1 = logits_CV.logsumexp(1, keepdim=True)
                total += (lse_C1 - logits_CV.gather(1, targets_C1)).sum()
                if training:
                    # d loss / d logits = (softmax - one-hot) / N, in the memory of the logits.
                    logits_CV.sub_(lse_C1).exp_()
                    logits_CV.scatter_add_(1, targets_C1, torch.full_like(lse_C1, -1.0))
                    grad_CV = logits_CV.mul_(1 / rows).to(dtype)
                    grad_x_ND[first : first + chunk] = grad_CV @ w_VD
                    if dtype == grad_w_VD.dtype:
                        grad_w_VD.addmm_(grad_CV.T, x_CD)
                    else:
                        grad_w_VD += grad_CV.T @ x_CD
        if training:
            ctx.save_for_backward(grad_x_ND, grad_w_VD)
        return total / rows

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        grad_x_ND, grad_w_VD = ctx.saved_tensors
        return grad_x_ND * grad, grad_w_VD * grad, None


def chunked_cross_entropy(x_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats (float32 scalar) of logits x_ND @ weight_VD.T against targets_N."""
    return _ChunkedCrossEntropy.apply(x_ND, weight_VD, targets_N.long())
