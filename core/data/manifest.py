"""Reads and writes the manifest of a dataset: its shards, their content and their source.

DATA_URL/manifest.json is written last: its presence means that every shard is stored. It contains no times or host
names, so that the same source, seed and settings give the same bytes. docs/formats.md documents its fields.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from core import storage, untrusted
from core.data.shard import DTYPES, HEADER_BYTES
from core.errors import DataError, ObjectNotFound
from core.secrets import without_keys

NAME = "manifest.json"
FORMAT = "token-shards"
VERSION = 1
SUFFIX = ".bin"  # ending of a shard's name; the cache removes only files with this ending
# A damaged manifest can be deleted: the records beside the shards hold its whole content, so preparation writes it
# again without reading the source.
_AGAIN = "delete it, and run the command that prepared the data again"


@dataclass(frozen=True)
class ShardEntry:
    """A shard: path below the data URL, number of tokens, size and SHA-256 of the whole object."""

    name: str
    tokens: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Split:
    """The split `train` or `val`: its shards in order, and the numbers of tokens and documents in them."""

    tokens: int
    documents: int
    shards: tuple[ShardEntry, ...]


@dataclass(frozen=True)
class TokenizerInfo:
    """The vocabulary that the token ids refer to. `vocab_file` is a path below the data URL."""

    name: str
    vocab_size: int
    end_of_text: int
    vocab_file: str
    vocab_sha256: str


@dataclass(frozen=True)
class Manifest:
    """A complete dataset."""

    tokenizer: TokenizerInfo
    source: Mapping[str, Any]
    split_rule: Mapping[str, Any]
    splits: Mapping[str, Split]
    bits: int = 16
    stats: Mapping[str, Any] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the checksums of the vocabulary and of the shards in order.

        Equal data has equal fingerprints.
        """
        digest = hashlib.sha256(f"{self.tokenizer.vocab_sha256} {self.bits}".encode())
        for name in sorted(self.splits):
            for shard in self.splits[name].shards:
                digest.update(f"\n{name} {shard.tokens} {shard.sha256}".encode())
        return digest.hexdigest()

    def split(self, name: str, where: str) -> Split:
        """The split with this name. If it is missing or empty, raises DataError, which names `where`."""
        split = self.splits.get(name)
        if split is None or not split.tokens:
            raise DataError(
                f"{where}: the data set has no {name!r} tokens (it has {', '.join(sorted(self.splits)) or 'none'}); "
                f"prepare it {'with a larger data.val_fraction' if name == 'val' else 'from more documents'}"
            )
        return split

    def to_bytes(self) -> bytes:
        document = {"format": FORMAT, "version": VERSION, "fingerprint": self.fingerprint, **without_keys(asdict(self))}
        return (json.dumps(document, indent=1, sort_keys=True, default=dict) + "\n").encode()


def uri_of(data_url: str) -> str:
    return storage.join(data_url, NAME)


def exists(data_url: str) -> bool:
    return storage.exists(uri_of(data_url))


def write(data_url: str, manifest: Manifest) -> None:
    storage.write_bytes(uri_of(data_url), manifest.to_bytes())


def read(data_url: str) -> Manifest:
    """Reads and checks a manifest. Raises DataError if it is missing, incomplete or of another format."""
    uri = uri_of(data_url)
    try:
        document = untrusted.read_object(uri)
    except ObjectNotFound as error:
        raise DataError(
            f"{uri}: there is no manifest; prepare the data first (python -m data_prep.prepare), or correct data.url"
        ) from error
    except ValueError as error:
        raise DataError(f"{uri}: not valid JSON ({error}); {_AGAIN}") from error
    if document.get("format") != FORMAT:
        raise DataError(
            f"{uri}: format is {document.get('format')!r}, not {FORMAT!r}; it is not a manifest of a dataset"
        )
    if document.get("version") != VERSION:
        raise DataError(
            f"{uri}: manifest version {document.get('version')!r} is not {VERSION}; "
            "use the release that wrote it, or delete the set and prepare it again"
        )
    try:
        splits = {
            name: Split(_count(split["tokens"]), _count(split["documents"]), tuple(map(_shard, split["shards"])))
            for name, split in document["splits"].items()
        }
        manifest = Manifest(
            _tokenizer(document["tokenizer"]),
            _mapping(document["source"]),
            _mapping(document["split_rule"]),
            splits,
            document["bits"],
            _mapping(document["stats"]),
        )
        stated = document["fingerprint"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{uri}: incomplete manifest ({type(error).__name__}: {error}); {_AGAIN}") from error
    _check(manifest, stated, uri)
    return manifest


def _shard(entry: Mapping[str, Any]) -> ShardEntry:
    shard = ShardEntry(**entry)
    return ShardEntry(_text(shard.name), _count(shard.tokens), _count(shard.bytes), _text(shard.sha256))


def _tokenizer(entry: Mapping[str, Any]) -> TokenizerInfo:
    found = TokenizerInfo(**entry)
    texts = [_text(each) for each in (found.name, found.vocab_file, found.vocab_sha256)]
    return TokenizerInfo(texts[0], _count(found.vocab_size), _count(found.end_of_text), *texts[1:])


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"{value!r} is not a count")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not a text")
    return value


def _mapping(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{value!r} is not a JSON object")
    return value


def _check(manifest: Manifest, stated_fingerprint: str, uri: str) -> None:
    if type(manifest.bits) is not int or manifest.bits not in DTYPES:
        raise DataError(f"{uri}: bits is {manifest.bits!r}, must be 16 or 32")
    for name, split in manifest.splits.items():
        if split.tokens != sum(shard.tokens for shard in split.shards):
            raise DataError(
                f"{uri}: split {name!r} says {split.tokens} tokens, "
                f"its shards add up to {sum(s.tokens for s in split.shards)}; delete the set and prepare it again"
            )
        for shard in split.shards:
            if shard.bytes != HEADER_BYTES + shard.tokens * manifest.bits // 8:
                raise DataError(
                    f"{uri}: shard {shard.name} says {shard.tokens} tokens in {shard.bytes} bytes, "
                    "which do not match; delete the set and prepare it again"
                )
            untrusted.check_name(shard.name, uri)
            if not shard.name.endswith(SUFFIX):
                raise DataError(
                    f"{uri}: shard {shard.name} does not end in {SUFFIX}; delete the set and prepare it again"
                )
    untrusted.check_name(manifest.tokenizer.vocab_file, uri)
    if manifest.fingerprint != stated_fingerprint:
        raise DataError(
            f"{uri}: fingerprint does not match its shards; "
            "the manifest was edited or mixed from two sets: delete the set and prepare it again"
        )
