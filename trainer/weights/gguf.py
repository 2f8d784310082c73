"""Writes one GGUF file for llama.cpp and compatible programs, with the `gguf` library (pip install gguf).

These programs support GPT-2 and Llama only. In rotary positions, they rotate pairs of adjacent dimensions (2i, 2i+1).
Our models rotate dimensions that are half a head apart, so the rows of a Llama's queries and keys are reordered.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from core.data.vocabulary import GPT2_END_OF_TEXT, Vocabulary
from core.errors import ConfigError
from core.settings.model import ModelConfig
from trainer.weights import huggingface
from trainer.weights.tokenizer import END_OF_TEXT, merges_of, shown

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def write(
    path: Path,
    config: ModelConfig,
    tensors: huggingface.Tensors,
    vocabulary: Vocabulary,
    dtype: str,
    name: str,
    chat_template: str,
) -> None:
    """Write the file. Raises ConfigError if GGUF's readers do not support the model, or if the library is missing."""
    kind = huggingface.kind_of(config)
    if kind == huggingface.OWN:
        raise ConfigError(
            f"{name}: GGUF's readers support GPT-2 and Llama, this model is neither (see its settings); "
            "export with --format=huggingface"
        )
    try:
        import gguf
    except ImportError as error:
        raise ConfigError("GGUF needs its library: pip install gguf, or `pip install -e '.[hub]'`") from error
    writer = gguf.GGUFWriter(path, kind)
    writer.add_name(name)
    writer.add_context_length(config.context)
    writer.add_embedding_length(config.width)
    writer.add_block_count(config.layers)
    writer.add_feed_forward_length(config.hidden)
    writer.add_head_count(config.heads)
    types = {"float32": "ALL_F32", "float16": "MOSTLY_F16", "bfloat16": "MOSTLY_BF16"}
    writer.add_file_type(gguf.LlamaFileType[types[dtype]])
    if kind == "gpt2":
        writer.add_layer_norm_eps(config.norm_eps)
    else:
        writer.add_layer_norm_rms_eps(config.norm_eps)
        writer.add_head_count_kv(config.heads)
        writer.add_rope_dimension_count(config.head_width)
        writer.add_rope_freq_base(config.rope_base)
        writer.add_vocab_size(huggingface.GPT2_VOCAB_SIZE)
    _add_vocabulary(writer, gguf, vocabulary, chat_template)
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH[kind.upper()], config.layers)
    for hub_name, values in huggingface.to_hub(config, tensors).items():
        if kind == "gpt2" and hub_name.endswith(huggingface.TRANSPOSED):
            values = values.T  # GGUF stores linear layers as (out, in), as PyTorch does
        if kind == "llama" and hub_name.endswith(("q_proj.weight", "k_proj.weight", "q_proj.bias", "k_proj.bias")):
            values = _interleaved(values, config.heads)
        stem, _, what = hub_name.rpartition(".")
        _add_tensor(writer, gguf, f"{known.get_name(stem)}.{what}", values, dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_vocabulary(writer: Any, gguf: Any, vocabulary: Vocabulary, chat_template: str) -> None:
    tokens = [shown(token) for token, _ in sorted(vocabulary.ranks.items(), key=lambda item: item[1])]
    plain, control = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*tokens, END_OF_TEXT])
    writer.add_token_types([*(plain for _ in tokens), control])
    writer.add_token_merges(merges_of(vocabulary))
    for add in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_unk_token_id):
        add(GPT2_END_OF_TEXT)
    writer.add_add_bos_token(False)
    if chat_template:
        writer.add_chat_template(chat_template)


def _add_tensor(writer: Any, gguf: Any, name: str, values: torch.Tensor, dtype: str) -> None:
    """Adds a tensor. Vectors stay in float32, as llama.cpp requires."""
    dtype = dtype if values.dim() > 1 else "float32"
    values = values.to(DTYPES[dtype]).contiguous()
    if dtype == "bfloat16":
        words = values.view(torch.int16).numpy().view(np.uint8)
        writer.add_tensor(name, words, raw_shape=words.shape, raw_dtype=gguf.GGMLQuantizationType.BF16)
    else:
        writer.add_tensor(name, values.numpy())


def _interleaved(values: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorders the rows of each head from (half, pair) to (pair, half)."""
    halves = values.reshape(heads, 2, -1, *values.shape[1:])
    return halves.transpose(1, 2).reshape(values.shape)
