"""Text samples during training, at fixed prompts and a fixed seed, so that steps can be compared."""

from collections.abc import Callable

import torch

from trainer.inference.engine import Engine, GenerationRequest
from trainer.inference.sampling import Sampling
from trainer.loop.requests import Abandoned

TOP_K = 50


def sample(
    model: torch.nn.Module,
    encoding,
    prompt: str,
    new_tokens: int,
    seed: int,
    device: torch.device,
    is_leaving: Callable[[], bool] = lambda: False,
) -> str:
    """`prompt` continued (top-k 50 at temperature 1, as in build-nanogpt) until the end of a document at most.

    Of a prompt that leaves no room for the new tokens in the model's context, the beginning is cut off. Raises
    Abandoned once `is_leaving()`, which is asked after each token.
    """
    if not new_tokens:
        return prompt
    engine = Engine(model, encoding, device)
    tokens = engine.encode(prompt)[-max(1, engine.context - new_tokens) :]
    settings = Sampling(max_tokens=new_tokens, temperature=1.0, top_k=TOP_K, seed=seed)
    model.eval()
    with torch.compiler.set_stance("force_eager"):  # lengths vary, so that blocks would be compiled again and again
        text = prompt
        for piece in engine.stream([GenerationRequest(tokens, settings)]):
            if is_leaving():
                raise Abandoned
            text += piece.text
    model.train()
    return text
