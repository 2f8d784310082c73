"""A model to learn from: one of ours, a public one that opens like ours, or whatever `transformers` can run."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from core.data.vocabulary import GPT2_VOCAB_SIZE
from core.errors import ConfigError
from trainer.weights.open import open_weights

FOREIGN = "transformers:"
PROBE = "The president's speech, of 1865, was short: 700 words — and\n\n\tno more."


@dataclass(frozen=True)
class Teacher:
    """`hidden(tokens_BT)` is what its output layer sees, (B, T, E); that layer is `head`, (V, E), and a soft cap."""

    name: str
    context: int
    head: torch.Tensor
    softcap: float
    model: nn.Module
    foreign: bool

    @torch.no_grad()
    def hidden(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        if not self.foreign:
            return self.model.hidden(tokens_BT)
        return self.model.base_model(input_ids=tokens_BT.long()).last_hidden_state


def open_teacher(name: str, encoding, device: torch.device) -> Teacher:
    """Raises ConfigError for a teacher of another vocabulary, CheckpointError for a damaged one."""
    if name.startswith(FOREIGN):
        return _open_foreign(name.removeprefix(FOREIGN), encoding, device)
    model = open_weights(name, device).model.requires_grad_(False)
    return Teacher(name, model.config.context, model.head, model.config.logit_softcap, model, False)


def _open_foreign(name: str, encoding, device: torch.device) -> Teacher:
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise ConfigError(f"distil.teacher is {FOREIGN}{name}, which needs: pip install transformers") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        # Only safetensors: a pickle may run code.
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"distil.teacher: {name} cannot be opened: {' '.join(str(error).split())[:300]}") from error
    ids = tokenizer.encode(PROBE, add_special_tokens=False)
    if ids != encoding.encode_ordinary(PROBE) or model.config.vocab_size < GPT2_VOCAB_SIZE:
        raise ConfigError(
            f"distil.teacher: {name} has another vocabulary than GPT-2's ({model.config.vocab_size} tokens, and a text "
            "comes to other ids), so that its distributions say nothing about our tokens; take a teacher with GPT-2's, "
            "or let it write text: python -m trainer.distil make"
        )
    model = model.to(device).eval().requires_grad_(False)
    _check_head(model, name, torch.tensor([ids], device=device))
    context: Any = getattr(model.config, "max_position_embeddings", None)
    head = model.get_output_embeddings().weight
    return Teacher(name, context or 1 << 30, head, 0.0, model, True)


@torch.no_grad()
def _check_head(model: nn.Module, name: str, tokens_BT: torch.Tensor) -> None:
    """Its logits must be the product that we make chunk by chunk: no bias, scale or cap."""
    layer = model.get_output_embeddings()
    whole = model(input_ids=tokens_BT).logits
    ours = model.base_model(input_ids=tokens_BT).last_hidden_state @ layer.weight.T if layer is not None else None
    if ours is None or not torch.allclose(ours, whole, rtol=1e-3, atol=1e-3):
        raise ConfigError(
            f"distil.teacher: the logits of {name} are not a plain product of its last layer, which is not supported; "
            "take another teacher, or let it write text: python -m trainer.distil make"
        )
