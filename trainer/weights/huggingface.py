"""Converts models to and from Hugging Face's `transformers`: config.json and names of tensors.

A GPT-2 becomes a GPT2LMHeadModel, a Llama a LlamaForCausalLM. Any other model keeps our names and needs the modelling
file that its export includes (modeling_pretrain_launcher.py). Both directions only rename, transpose, split and join
tensors, so that import and export are exact inverses.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import torch

from core.data.vocabulary import GPT2_END_OF_TEXT, GPT2_VOCAB_SIZE
from core.errors import CheckpointError, ConfigError
from core.settings.loader import from_dict, to_dict
from core.settings.model import ModelConfig

OWN = "pretrain_launcher"  # model_type of a model that is neither a GPT-2 nor a Llama
OWN_CLASS = "PretrainLauncherForCausalLM"
OWN_MODULE = f"modeling_{OWN}"
CLASSES = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", OWN: OWN_CLASS}
# GPT-2's Conv1D layers store their weights as (in, out).
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
_GELU_TANH = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")
_LLAMA_NAMES = {
    "ln_1.weight": "input_layernorm.weight",
    "ln_2.weight": "post_attention_layernorm.weight",
    "attn.c_proj.weight": "self_attn.o_proj.weight",
    "attn.c_proj.bias": "self_attn.o_proj.bias",
    "mlp.c_proj.weight": "mlp.down_proj.weight",
    "mlp.c_proj.bias": "mlp.down_proj.bias",
}
_LLAMA_PARTS = {
    "attn.c_attn": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.c_fc": ("mlp.gate_proj", "mlp.up_proj"),
}
_LLAMA_ENDS = {
    "wte.weight": "model.embed_tokens.weight",
    "ln_f.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}

WRAPPERS = ("_orig_mod.", "module.")

Tensors = Mapping[str, torch.Tensor]


def kind_of(config: ModelConfig) -> str:
    """The model_type in `transformers` that fits this model: gpt2, llama, or OWN."""
    plain = ModelConfig()
    sizes = {
        "layers",
        "heads",
        "width",
        "context",
        "padded_vocab_size",
        "norm_eps",
        "mlp_width",
        "tie_embeddings",
        "dropout",
        "init",
    }
    unusual = {
        field.name
        for field in dataclasses.fields(config)
        if field.name not in sizes and getattr(config, field.name) != getattr(plain, field.name)
    }
    if not unusual:
        return "gpt2"
    llama = config.norm == "rmsnorm" and config.position == "rope" and config.mlp == "swiglu" and not config.dropout
    same_biases = config.qkv_bias or not config.bias
    if llama and same_biases and unusual <= {"norm", "position", "mlp", "bias", "qkv_bias", "rope_base"}:
        return "llama"
    return OWN


def document_of(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """Content of config.json. The vocabulary is GPT-2's, without padding rows."""
    kind = kind_of(config)
    common = {
        "architectures": [CLASSES[kind]],
        "model_type": kind,
        "vocab_size": GPT2_VOCAB_SIZE,
        "bos_token_id": GPT2_END_OF_TEXT,
        "eos_token_id": GPT2_END_OF_TEXT,
        "tie_word_embeddings": config.tie_embeddings,
        "dtype": dtype,
    }
    if kind == "gpt2":
        return common | {
            "n_positions": config.context,
            "n_embd": config.width,
            "n_layer": config.layers,
            "n_head": config.heads,
            "n_inner": config.hidden,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": config.norm_eps,
            "resid_pdrop": config.dropout,
            "embd_pdrop": config.dropout,
            "attn_pdrop": config.dropout,
        }
    if kind == "llama":
        return common | {
            "max_position_embeddings": config.context,
            "hidden_size": config.width,
            "intermediate_size": config.hidden,
            "num_hidden_layers": config.layers,
            "num_attention_heads": config.heads,
            "num_key_value_heads": config.heads,
            "hidden_act": "silu",
            "rms_norm_eps": config.norm_eps,
            "rope_theta": config.rope_base,
            "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
            "attention_bias": config.bias,
            "mlp_bias": config.bias,
        }
    return common | {
        "auto_map": {
            "AutoConfig": f"{OWN_MODULE}.PretrainLauncherConfig",
            "AutoModelForCausalLM": f"{OWN_MODULE}.{OWN_CLASS}",
        },
        "max_position_embeddings": config.context,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "choices": to_dict(dataclasses.replace(config, padded_vocab_size=GPT2_VOCAB_SIZE)),
    }


def config_of(document: Mapping[str, Any], where: str) -> ModelConfig:
    """Settings of the model that a config.json describes. Raises CheckpointError for an unsupported model."""
    kind = document.get("model_type")
    readers = {"gpt2": _gpt2_config, "llama": _llama_config, OWN: _own_config}
    if kind not in readers:
        raise CheckpointError(f"{where}: model_type is {kind!r}; only {', '.join(readers)} can be read")
    try:
        config = readers[kind](document, where)
    except KeyError as error:
        raise CheckpointError(f"{where}: has no {error.args[0]!r}; config.json is incomplete") from error
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from error
    if config.padded_vocab_size < GPT2_VOCAB_SIZE:
        raise CheckpointError(
            f"{where}: vocab_size is {config.padded_vocab_size}, GPT-2's vocabulary has {GPT2_VOCAB_SIZE}: "
            "models of other vocabularies cannot be read"
        )
    return config


def _gpt2_config(document: Mapping[str, Any], where: str) -> ModelConfig:
    _check(document, where, "activation_function", _GELU_TANH, _GELU_TANH[0])
    _check(document, where, "scale_attn_weights", (True,), True)
    _check(document, where, "scale_attn_by_inverse_layer_idx", (False,), False)
    _check(document, where, "add_cross_attention", (False,), False)
    return ModelConfig(
        layers=document["n_layer"],
        heads=document["n_head"],
        width=document["n_embd"],
        context=document["n_positions"],
        padded_vocab_size=document["vocab_size"],
        norm_eps=document.get("layer_norm_epsilon", 1e-5),
        mlp_width=_mlp_width(document.get("n_inner"), document["n_embd"]),
        tie_embeddings=document.get("tie_word_embeddings", True),
    )


def _llama_config(document: Mapping[str, Any], where: str) -> ModelConfig:
    heads = document["num_attention_heads"]
    bias = document.get("attention_bias", False)
    rope = document.get("rope_parameters") or document.get("rope_scaling") or {}
    _check(document, where, "hidden_act", ("silu",), "silu")
    _check(document, where, "num_key_value_heads", (heads,), heads)
    _check(document, where, "mlp_bias", (bias,), bias)
    _check(document, where, "head_dim", (None, document["hidden_size"] // heads), None)
    _check(rope, where, "rope_type", ("default",), "default")
    return ModelConfig(
        layers=document["num_hidden_layers"],
        heads=heads,
        width=document["hidden_size"],
        context=document["max_position_embeddings"],
        padded_vocab_size=document["vocab_size"],
        norm="rmsnorm",
        norm_eps=document.get("rms_norm_eps", 1e-6),
        position="rope",
        rope_base=float(rope.get("rope_theta") or document.get("rope_theta", 10000.0)),
        mlp="swiglu",
        mlp_width=_mlp_width(document["intermediate_size"], document["hidden_size"]),
        bias=bias,
        tie_embeddings=document.get("tie_word_embeddings", False),
    )


def _own_config(document: Mapping[str, Any], where: str) -> ModelConfig:
    return from_dict(ModelConfig, document["choices"], where)


def _mlp_width(stated: int | None, width: int) -> int:
    """Value of the setting mlp_width. The default 0 means 4 times the model's width."""
    return 0 if stated in (None, 4 * width) else stated


def _check(document: Mapping[str, Any], where: str, key: str, possible: tuple, default: Any) -> None:
    value = document.get(key, default)
    if value not in possible:
        wanted = " or ".join(json.dumps(each) for each in possible)
        raise CheckpointError(f"{where}: {key} is {json.dumps(value)}; only {wanted} can be read")


# --- tensors ---------------------------------------------------------------------------------------------------


def to_hub(config: ModelConfig, tensors: Tensors) -> dict[str, torch.Tensor]:
    """Our weights by `transformers`' names, without the rows that pad the vocabulary."""
    kind = kind_of(config)
    found = {}
    for name, values in tensors.items():
        if name in ("wte.weight", "lm_head.weight"):
            values = values[:GPT2_VOCAB_SIZE]
        if kind == "gpt2":
            transposed = values.T if name.endswith(TRANSPOSED) else values
            found[name if name == "lm_head.weight" else f"transformer.{name}"] = transposed.contiguous()
        elif kind == "llama":
            found |= {new: part.contiguous() for new, part in _llama_parts(name, values)}
        else:
            found[name] = values.contiguous()
    return found


def from_hub(kind: str, config: ModelConfig, tensors: Tensors, where: str) -> dict[str, torch.Tensor]:
    """`transformers`' weights by our names. `kind` and `config` come from the config.json of the same folder.

    Raises CheckpointError if a Llama lacks a tensor. The caller compares names and shapes with those of the model.
    """
    tensors = _without_wrappers(tensors, where)
    if kind == "gpt2":
        found = {}
        for name, values in _tied_once(config, tensors, "transformer.wte.weight", "wte.weight").items():
            name = name.removeprefix("transformer.")
            if name.endswith((".attn.bias", ".attn.masked_bias")):
                continue  # old files hold the causal mask
            found[name] = values.T.contiguous() if name.endswith(TRANSPOSED) else values
        return found
    if kind == "llama":
        return _from_llama(config, tensors, where)
    return dict(tensors)


def _without_wrappers(tensors: Tensors, where: str) -> dict[str, torch.Tensor]:
    """The tensors without the prefixes that torch.compile and DistributedDataParallel put before their names."""
    found: dict[str, torch.Tensor] = {}
    for name, values in tensors.items():
        plain = name
        while plain.startswith(WRAPPERS):
            plain = plain.partition(".")[2]
        if plain in found:
            raise CheckpointError(
                f"{where}: holds {plain} twice, once as {name}; save the model again without wrappers"
            )
        found[plain] = values
    return found


def _tied_once(config: ModelConfig, tensors: Tensors, *embeddings: str) -> dict[str, torch.Tensor]:
    """The tensors, with a tied embedding under one name only.

    Some files store a tied embedding under two names, or only under the head's name.
    """
    left = dict(tensors)
    if config.tie_embeddings and "lm_head.weight" in left:
        head = left.pop("lm_head.weight")
        if not left.keys() & set(embeddings):
            left[embeddings[0]] = head
    return left


def _llama_parts(name: str, values: torch.Tensor):
    if name in _LLAMA_ENDS:
        yield _LLAMA_ENDS[name], values
        return
    _, layer, rest = name.split(".", 2)
    prefix = f"model.layers.{layer}"
    if rest in _LLAMA_NAMES:
        yield f"{prefix}.{_LLAMA_NAMES[rest]}", values
        return
    layer_name, _, what = rest.rpartition(".")
    parts = _LLAMA_PARTS[layer_name]
    for part, piece in zip(parts, values.chunk(len(parts)), strict=True):
        yield f"{prefix}.{part}.{what}", piece


def _from_llama(config: ModelConfig, tensors: Tensors, where: str) -> dict[str, torch.Tensor]:
    left = {name: values for name, values in tensors.items() if not name.endswith("rotary_emb.inv_freq")}
    if not any(name.startswith("model.") for name in left):  # saved from LlamaModel, without a head
        left = {name if name == "lm_head.weight" else f"model.{name}": values for name, values in left.items()}
    left = _tied_once(config, left, _LLAMA_ENDS["wte.weight"])
    found = {}
    try:
        for ours, theirs in _LLAMA_ENDS.items():
            if ours != "lm_head.weight" or not config.tie_embeddings:
                found[ours] = left.pop(theirs)
        for layer in range(config.layers):
            prefix = f"model.layers.{layer}"
            for ours, theirs in _LLAMA_NAMES.items():
                if config.bias or not ours.endswith("bias"):
                    found[f"h.{layer}.{ours}"] = left.pop(f"{prefix}.{theirs}")
            for ours, parts in _LLAMA_PARTS.items():
                for what in ("weight", "bias") if config.bias else ("weight",):
                    pieces = [left.pop(f"{prefix}.{part}.{what}") for part in parts]
                    found[f"h.{layer}.{ours}.{what}"] = torch.cat(pieces)
    except KeyError as error:
        raise CheckpointError(f"{where}: lacks the tensor {error.args[0]}") from error
    return found | left  # `left` holds tensors that match no weight of the model; the caller reports them
