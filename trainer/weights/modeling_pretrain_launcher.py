"""A decoder-only transformer for `transformers`, as pretrain-launcher trains it; needs trust_remote_code=True.

    model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

Each export includes a copy of this file, which depends on torch and transformers alone. `config.choices` holds the
model's settings in pretrain-launcher; core/settings/model.py documents them and cites their sources. The model applies
no dropout.

Shapes: B sequences, T new positions, S positions in all, D model width, H heads, K head width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast


class PretrainLauncherConfig(PretrainedConfig):
    model_type = "pretrain_launcher"

    def __init__(self, choices: dict | None = None, **kwargs):
        self.choices = choices or {}
        super().__init__(**kwargs)


def norm(choices: dict) -> nn.Module:
    kind = nn.LayerNorm if choices["norm"] == "layernorm" else nn.RMSNorm
    return kind(choices["width"], eps=choices["norm_eps"])


class Attention(nn.Module):
    def __init__(self, choices: dict, index: int):
        super().__init__()
        self.choices = choices
        self.index = index
        width, bias = choices["width"], choices["bias"]
        self.c_attn = nn.Linear(width, 3 * width, bias=bias and choices["qkv_bias"])
        self.c_proj = nn.Linear(width, width, bias=bias)
        self.c_proj_2 = nn.Linear(width, width, bias=bias) if choices["extra_projection"] else None
        self.mix = nn.Parameter(torch.empty(2)) if choices["value_skip"] else None

    def forward(self, x_BTD, v0_BHTK, rotary, mask, past):
        choices = self.choices
        B, T, D = x_BTD.shape
        heads = choices["heads"]
        q_BHTK, k_BHTK, v_BHTK = self.c_attn(x_BTD).view(B, T, 3, heads, D // heads).permute(2, 0, 3, 1, 4)
        if self.mix is not None:
            v0_BHTK = v_BHTK if v0_BHTK is None else v0_BHTK
            v_BHTK = (self.mix[0] * v_BHTK + self.mix[1] * v0_BHTK).to(v_BHTK.dtype)
        if choices["qk_norm"]:
            eps = choices["norm_eps"]
            q_BHTK, k_BHTK = (F.rms_norm(each, each.shape[-1:], eps=eps) for each in (q_BHTK, k_BHTK))
        if rotary is not None:
            q_BHTK, k_BHTK = rotate(q_BHTK, rotary), rotate(k_BHTK, rotary)
        q_BHTK, k_BHTK = q_BHTK.to(v_BHTK.dtype), k_BHTK.to(v_BHTK.dtype)
        k_BHSK, v_BHSK = (k_BHTK, v_BHTK) if past is None else past.update(k_BHTK, v_BHTK, self.index)
        y_BHTK = F.scaled_dot_product_attention(
            q_BHTK,
            k_BHSK,
            v_BHSK,
            attn_mask=mask,
            is_causal=mask is None,
            scale=choices["attention_scale"] or None,
        )
        y_BTD = self.c_proj(y_BHTK.transpose(1, 2).reshape(B, T, D))
        return (y_BTD if self.c_proj_2 is None else self.c_proj_2(y_BTD)), v0_BHTK


class MLP(nn.Module):
    def __init__(self, choices: dict):
        super().__init__()
        self.kind = choices["mlp"]
        hidden = choices["mlp_width"] or 4 * choices["width"]
        self.c_fc = nn.Linear(choices["width"], (2 if self.kind == "swiglu" else 1) * hidden, bias=choices["bias"])
        self.c_proj = nn.Linear(hidden, choices["width"], bias=choices["bias"])

    def forward(self, x_BTD):
        h = self.c_fc(x_BTD)
        if self.kind == "gelu":
            h = F.gelu(h, approximate="tanh")
        elif self.kind == "relu2":
            h = F.relu(h).square()
        else:
            gate, value = h.chunk(2, dim=-1)
            h = F.silu(gate) * value
        return self.c_proj(h)


class Block(nn.Module):
    def __init__(self, choices: dict, index: int):
        super().__init__()
        self.ln_1 = norm(choices)
        self.attn = Attention(choices, index)
        self.ln_2 = norm(choices)
        self.mlp = MLP(choices)
        self.skip = nn.Parameter(torch.empty(2)) if choices["embedding_skip"] else None

    def forward(self, x_BTD, x0_BTD, v0_BHTK, rotary, mask, past):
        if self.skip is not None:
            x_BTD = self.skip[0] * x_BTD + self.skip[1] * x0_BTD
        y_BTD, v0_BHTK = self.attn(self.ln_1(x_BTD), v0_BHTK, rotary, mask, past)
        x_BTD = x_BTD + y_BTD
        return x_BTD + self.mlp(self.ln_2(x_BTD)), v0_BHTK


class PretrainLauncherForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = PretrainLauncherConfig

    def __init__(self, config: PretrainLauncherConfig):
        super().__init__(config)
        choices = config.choices
        self.wte = nn.Embedding(choices["padded_vocab_size"], choices["width"])
        learned = choices["position"] == "learned"
        self.wpe = nn.Embedding(choices["context"], choices["width"]) if learned else None
        self.ln_e = norm(choices) if choices["embedding_norm"] else None
        self.h = nn.ModuleList(Block(choices, index) for index in range(choices["layers"]))
        self.ln_f = norm(choices)
        head = nn.Linear(choices["width"], choices["padded_vocab_size"], bias=False)
        self.lm_head = None if choices["tie_embeddings"] else head
        self.post_init()

    def get_input_embeddings(self):
        return self.wte

    def _init_weights(self, module):
        """Does nothing: the file holds all weights."""

    def forward(self, input_ids, attention_mask=None, past_key_values=None, use_cache=None, labels=None, **_):
        """Computes logits of the new positions, and their loss against `labels` (shifted here; -100 is ignored).

        `attention_mask` (B, S) may exclude padding on the left. If `past_key_values` is given, the tokens follow the
        cached tokens.
        """
        choices = self.config.choices
        B, T = input_ids.shape
        past = DynamicCache() if use_cache and past_key_values is None else past_key_values
        before = 0 if past is None else past.get_seq_length()
        if before + T > (limit := choices["context"]):
            raise ValueError(f"{before + T} tokens, the model's context is {limit}")
        positions_BT = torch.arange(before, before + T, device=input_ids.device).expand(B, T)
        padded = attention_mask is not None and not bool(attention_mask.all())
        if padded:
            positions_BT = (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, before:]
        x_BTD = self.wte(input_ids)
        if self.wpe is not None:
            x_BTD = x_BTD + self.wpe(positions_BT)
        if self.ln_e is not None:
            x_BTD = self.ln_e(x_BTD)
        mask = self._mask(input_ids, attention_mask if padded else None, past, before)
        rotary = rotations(positions_BT, choices) if choices["position"] == "rope" else None
        x0_BTD, v0_BHTK = x_BTD, None
        for block in self.h:
            x_BTD, v0_BHTK = block(x_BTD, x0_BTD, v0_BHTK, rotary, mask, past)
        head_VD = self.wte.weight if self.lm_head is None else self.lm_head.weight
        logits_BTV = F.linear(self.ln_f(x_BTD), head_VD)
        if cap := choices["logit_softcap"]:
            logits_BTV = torch.tanh(logits_BTV / cap) * cap
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits_BTV, past_key_values=past)

    def _mask(self, input_ids, attention_mask, past, before):
        """Attention mask, (B, 1, T, S), or None for a causal mask without earlier positions."""
        document_mask = self.config.choices["document_mask"]
        if attention_mask is None and not document_mask and not before:
            return None
        B, T = input_ids.shape
        S = before + T
        seen = torch.ones(T, S, dtype=torch.bool, device=input_ids.device).tril(before).expand(B, 1, T, S)
        if document_mask:  # each document begins with the end-of-text token
            ends_BS = input_ids == self.config.eos_token_id
            if past is not None:
                if before:
                    ends_BS = torch.cat([past.ends_BS, ends_BS], 1)
                past.ends_BS = ends_BS
            document_BS = ends_BS.cumsum(1)
            seen = seen & (document_BS[:, None, before:, None] == document_BS[:, None, None, :])
        if attention_mask is not None:
            # A padding position attends to itself, so that no row of the softmax is empty.
            own = torch.eye(S, dtype=torch.bool, device=input_ids.device)[before:]
            seen = seen & attention_mask.bool()[:, None, None, :] | own
        return seen


def rotations(positions_BT, choices: dict):
    """cos and sin of rotary positions, (B, 1, T, K/2). Dimensions i and i + K/2 form a pair."""
    half = choices["width"] // choices["heads"] // 2
    turning = max(1, round(half * choices["rope_fraction"]))
    index = torch.arange(half, device=positions_BT.device, dtype=torch.float32)
    speeds = torch.where(index < turning, choices["rope_base"] ** (-index / turning), 0.0)
    angles = (positions_BT.float()[..., None] * speeds)[:, None]
    return angles.cos(), angles.sin()


def rotate(x_BHTK, rotary):
    cos, sin = rotary
    a, b = x_BHTK.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
