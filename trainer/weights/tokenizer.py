"""Writes GPT-2's byte pairs as tokenizer files of `transformers`: vocab.json, merges.txt, tokenizer.json.

All of them are computed from the ranks of the tokens, so an export needs no download.
"""

import functools
import json
from typing import Any

from core.data.vocabulary import GPT2_END_OF_TEXT, Vocabulary

END_OF_TEXT = "<|endoftext|>"


def files(vocabulary: Vocabulary, context: int, chat_template: str = "") -> dict[str, bytes]:
    """Content of each tokenizer file by name. `context` is the model's maximum length in tokens."""
    ids = {shown(token): rank for token, rank in sorted(vocabulary.ranks.items(), key=lambda item: item[1])}
    ids[END_OF_TEXT] = GPT2_END_OF_TEXT
    merges = merges_of(vocabulary)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": GPT2_END_OF_TEXT,
                "content": END_OF_TEXT,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
        ],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": byte_level | {"trim_offsets": False},
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": ids,
            "merges": merges,
        },
    }
    settings: dict[str, Any] = {
        "tokenizer_class": "GPT2Tokenizer",
        "add_prefix_space": False,
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "unk_token": END_OF_TEXT,
        "model_max_length": context,
    }
    if chat_template:
        settings["chat_template"] = chat_template
    return {
        "vocab.json": _json(ids),
        "merges.txt": "\n".join(["#version: 0.2", *merges, ""]).encode(),
        "tokenizer.json": _json(document),
        "tokenizer_config.json": _json(settings),
        "special_tokens_map.json": _json(dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)),
    }


@functools.lru_cache(maxsize=1)
def merges_of(vocabulary: Vocabulary) -> list[str]:
    """Lines of merges.txt in order of rank. The result is cached, because this takes a second."""
    return [" ".join(map(shown, pair)) for pair in recover_merges(vocabulary.ranks)]


def recover_merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Recovers the pair that was merged into each token, in order of rank. Single bytes have no pair.

    If the bytes of a token are merged only by merges of lower rank, two parts remain. These two parts are its pair.
    """
    found = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) == 1:
            continue
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            candidates = [(ranks.get(parts[index] + parts[index + 1], rank), index) for index in range(len(parts) - 1)]
            best, index = min(candidates)
            assert best < rank, token
            parts[index : index + 2] = [parts[index] + parts[index + 1]]
        found.append((parts[0], parts[1]))
    return found


def stand_ins() -> dict[int, str]:
    """The printable character that represents each byte (openai/gpt-2, encoder.py, bytes_to_unicode)."""
    found = {byte: chr(byte) for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "}
    for byte in range(256):
        if byte not in found:
            found[byte] = chr(256 + sum(other >= 256 for other in map(ord, found.values())))
    return found


_STAND_INS = stand_ins()


def shown(token: bytes) -> str:
    """A token as the tokenizer files spell it."""
    return "".join(_STAND_INS[byte] for byte in token)


def _json(value: Any) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=None if len(value) > 100 else 1) + "\n").encode()
