"""GPT-2's vocabulary, stored beside the shards, so that no later stage needs anybody's server for it."""

from core import storage
from core.data import vocabulary
from core.data.vocabulary import Vocabulary
from core.errors import ConfigError, ObjectNotFound


def store(vocab_url: str, data_url: str) -> str:
    """Put the vocabulary below `data_url` unless it is there; returns its URI. Raises ConfigError, DataError."""
    uri = storage.join(data_url, vocabulary.FILE_NAME)
    try:
        vocabulary.read(uri)
    except ObjectNotFound:
        storage.write_bytes(uri, _find(vocab_url).stored)
    return uri


def _find(vocab_url: str) -> Vocabulary:
    if vocab_url:
        return vocabulary.read(vocab_url)
    import tiktoken

    try:
        ranks = tiktoken.get_encoding("gpt2")._mergeable_ranks
    except Exception as error:  # whatever its HTTP library raises
        raise ConfigError(
            "tokenizer.vocab_url is empty and tiktoken could not download GPT-2's vocabulary "
            f"({type(error).__name__}); set it (or VOCAB_URL) to a copy of vocab.bpe"
        ) from error
    return vocabulary.parse(vocabulary.rank_file(ranks), "tiktoken's gpt2")
