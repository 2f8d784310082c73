"""Computes perplexity and bits per byte on the validation tokens.

`of_stream` reads the tokens as training does: one stream, cut into windows of the model's context. Each token except
the first is predicted once, including end-of-text tokens. `of_documents` scores each document separately, after one
end-of-text token, with rolling windows as in lm-evaluation-harness's loglikelihood_rolling (its wikitext task).

Bits per byte are the sum of all losses, divided by ln 2 and by the bytes of the predicted tokens' text. An end-of-text
token has no bytes. Models with different vocabularies can be compared by bits per byte, but not by perplexity.
"""

import math
import re
from collections.abc import Iterator

import numpy as np

from core import storage
from core.data.manifest import Manifest
from core.data.shard import DTYPES, HEADER_BYTES, check_size, parse_header
from core.data.vocabulary import GPT2_END_OF_TEXT
from core.errors import DataError
from trainer.distributed.process_group import Ranks
from trainer.evals.likelihood import ScoringRequest, likelihoods
from trainer.evals.progress import PartialResults
from trainer.model.gpt import GPT


def read_tokens(data_url: str, manifest: Manifest, tokens: int) -> np.ndarray:
    """The first `tokens` validation tokens in the manifest's order. If `tokens` is 0, these are all validation tokens.

    Raises DataError.
    """
    parts = []
    wanted = tokens or manifest.split("val", data_url).tokens
    for shard in manifest.split("val", data_url).shards:
        if wanted <= 0:
            break
        part = read_shard(storage.join(data_url, shard.name), manifest)[:wanted]
        parts.append(part)
        wanted -= len(part)
    return np.concatenate(parts)


def read_shard(uri: str, manifest: Manifest) -> np.ndarray:
    """All tokens of a shard. Raises DataError for a truncated shard or for ids beyond the vocabulary."""
    data = storage.read_bytes(uri)
    header = parse_header(data, uri)
    check_size(header, len(data), uri)
    tokens = np.frombuffer(data, DTYPES[manifest.bits], offset=HEADER_BYTES)
    if tokens.max() >= manifest.tokenizer.vocab_size:
        raise DataError(
            f"{uri}: holds token {tokens.max()}, the vocabulary has {manifest.tokenizer.vocab_size}; "
            "the shard is damaged: run python -m data_prep.verify on the data"
        )
    return tokens


def of_stream(
    model: GPT, tokens: np.ndarray, encoding, ranks: Ranks, precision: str, partial: PartialResults
) -> dict[str, float]:
    """Scores of the tokens as one stream."""
    length = model.config.context
    firsts = range(0, len(tokens) - 1, length)
    requests = [ScoringRequest(tokens[first : first + 1], tokens[first + 1 : first + length + 1]) for first in firsts]
    found = likelihoods(model, requests, ranks, precision, partial, title="perplexity")
    total = math.fsum(each.total for each in found)
    count = len(tokens) - 1
    size = int(token_bytes(encoding)[tokens[1:]].sum())
    return {"tokens": count, "bytes": size, **_scores(total, count, size)}


def of_documents(
    model: GPT, tokens: np.ndarray, encoding, ranks: Ranks, precision: str, partial: PartialResults
) -> dict[str, float]:
    """Scores of the documents. `word_perplexity` counts words by white space, as the harness does."""
    documents = list(split_documents(tokens))
    requests = [request for document in documents for request in rolling(document, model.config.context)]
    found = likelihoods(model, requests, ranks, precision, partial, title="perplexity")
    total = math.fsum(each.total for each in found)
    count = sum(map(len, documents))
    sizes = token_bytes(encoding)
    size = int(sum(sizes[document].sum() for document in documents))
    words = sum(len(re.split(r"\s+", encoding.decode(document.tolist()))) for document in documents)
    scores = _scores(total, count, size) | {"word_perplexity": math.exp(-total / words)}
    return {"documents": len(documents), "tokens": count, "words": words, "bytes": size, **scores}


def rolling(document: np.ndarray, context: int) -> Iterator[ScoringRequest]:
    """Windows of a document that together predict each token once.

    All windows except the first have as much context as fits.
    """
    with_start = np.concatenate([[GPT2_END_OF_TEXT], document])
    for first in range(0, len(document), context):
        last = min(first + context, len(document))
        # `document[first]` is the first token to predict. `with_start` is shifted by one, so `with_start[first]` is the
        # token before it.
        begin = max(0, last - context)
        yield ScoringRequest(with_start[begin : first + 1], document[first:last])


def split_documents(tokens: np.ndarray) -> Iterator[np.ndarray]:
    """The documents between end-of-text tokens. The last document may be cut off at the end of `tokens`."""
    for piece in np.split(tokens, np.flatnonzero(tokens == GPT2_END_OF_TEXT)):
        document = piece[1:] if len(piece) and piece[0] == GPT2_END_OF_TEXT else piece
        if len(document):
            yield document


def token_bytes(encoding) -> np.ndarray:
    """The number of bytes of each token's text, by token id."""
    sizes = np.zeros(encoding.n_vocab, np.int64)
    for token in range(encoding.n_vocab):
        if token != GPT2_END_OF_TEXT:
            sizes[token] = len(encoding.decode_single_token_bytes(token))
    return sizes


def _scores(total: float, tokens: int, size: int) -> dict[str, float]:
    return {
        "loss": -total / tokens,
        "perplexity": math.exp(-total / tokens),
        "byte_perplexity": math.exp(-total / size),
        "bits_per_byte": -total / size / math.log(2),
    }
