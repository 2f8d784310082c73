"""Text samples during training, at fixed prompts and a fixed seed, so that steps can be compared."""

import torch

from core.vocabulary import GPT2_END_OF_TEXT, GPT2_VOCAB_SIZE
from trainer.precision import autocast

TOP_K = 50


@torch.no_grad()
def sample(model: torch.nn.Module, encoding, prompt: str, new_tokens: int, seed: int, device: torch.device) -> str:
    """Continue `prompt` (top-k 50 at temperature 1, as in build-nanogpt) until the end of a document at most."""
    generator = torch.Generator().manual_seed(seed)
    tokens = [GPT2_END_OF_TEXT, *encoding.encode_ordinary(prompt)]
    context = model.config.context
    model.eval()
    for _ in range(new_tokens):
        window = torch.tensor([tokens[-context:]], device=device)
        with autocast(device), torch.compiler.set_stance("force_eager"):  # its length changes with every token
            logits = model(window)[0, -1, :GPT2_VOCAB_SIZE].float().cpu()
        best, ids = logits.topk(TOP_K)
        chosen = int(ids[torch.multinomial(best.softmax(0), 1, generator=generator)])
        if chosen == GPT2_END_OF_TEXT:
            break
        tokens.append(chosen)
    model.train()
    return encoding.decode(tokens[1:])
