"""Declares the settings of data preparation and import, with defaults, help and bounds."""

import re
from dataclasses import dataclass
from typing import Any, Literal

from core import urls
from core.settings.loader import Bounded, require, section, setting
from core.settings.run import shutdown_reserve
from core.stores import hub


def _cap() -> Any:
    """The field `max_usd` of programs that make a token set."""
    return setting(
        0.0,
        "hard cap in dollars for all preparations whose ledger is in RUN_URL; finished parts are kept; 0: no cap",
        identity=False,
        env="MAX_USD",
        ge=0,
    )


@dataclass(frozen=True)
class SourceConfig(Bounded):
    """The documents to prepare: a dataset on the Hub, or files."""

    dataset: str = setting(
        "",
        "dataset on the Hugging Face Hub, such as HuggingFaceFW/fineweb-edu; `name` and `split` choose a part of it",
        replaces=("url", "name", "split", "revision"),
    )
    name: str = setting("", "the dataset's configuration (subset), such as sample-10BT; empty: the default one")
    split: str = setting("train", "the dataset's split")
    url: str = setting(
        "",
        "files instead of a dataset: a path or glob of .parquet, .jsonl, .json, .csv, .tsv (.gz, .zst), .txt, .arrow "
        "or .tar (local, https://, s3://, gs://, az://, hf://)",
        env="SOURCE_URL",
        check=urls.mistake_in_source,
        replaces=("dataset", "name", "split", "revision"),
    )
    revision: str = setting(
        "",
        "commit or tag of the dataset, or of an hf:// address without @REVISION; empty: the newest commit at "
        "the first start",
    )
    text_column: str | None = setting(
        None, "column with the document's text or conversation; none: text, content, messages or conversations"
    )
    id_column: str | None = setting(
        None,
        "column with the document's unique id; the hash of the id decides the split. empty: use the hash of the "
        "text; none: the column id if it exists, else the hash of the text",
    )
    text_documents: Literal["file", "blocks"] = setting(
        "file", "documents of .txt files: whole files, or blocks of lines between blank lines"
    )
    max_bad_share: float = setting(
        0.01, "maximum fraction of rows without text, id or valid UTF-8; above it preparation fails", ge=0, le=1
    )

    @property
    def place(self) -> str:
        """Name of the source in messages."""
        return self.url or "/".join(filter(None, (self.dataset, self.name, self.split)))

    def __post_init__(self):
        super().__post_init__()
        require(
            bool(self.url or self.dataset),
            "url",
            "is empty, and so is dataset; name a data set (--source.dataset=HuggingFaceFW/fineweb-edu "
            "--source.name=sample-10BT) or files (--source.url=...)",
        )
        require(
            not (self.url and self.dataset),
            "url",
            f"is {self.url!r}, but dataset is {self.dataset!r}, too; give one of them",
        )
        require(
            bool(re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*|", self.dataset)),
            "dataset",
            f"is {self.dataset!r}, which is not a name on the Hub; write OWNER/NAME, or name files by source.url",
        )
        require(self.text_column != "", "text_column", "is empty; name the column with the text, or leave it out")
        require(bool(self.split), "split", "is empty; name one, such as train")


@dataclass(frozen=True)
class FilterConfig(Bounded):
    """Filters of documents. A filter that is off needs no column."""

    min_score: float | None = setting(None, "minimum of score_column (FineWeb-Edu: 3 to 5); none: no filter")
    score_column: str = setting("score", "column that min_score reads")
    languages: tuple[str, ...] = setting((), "values of language_column to keep, such as en,de; empty: all")
    language_column: str = setting("language", "column that languages reads")
    min_tokens: int = setting(1, "drop documents with fewer tokens, not counting the end-of-text token", ge=1)
    max_tokens: int = setting(0, "drop documents with more tokens; 0: no limit")
    drop_duplicates: bool = setting(
        False, "keep only the first of documents with the same text; reads the source twice"
    )

    def __post_init__(self):
        super().__post_init__()
        require(
            self.max_tokens == 0 or self.max_tokens >= self.min_tokens,
            "max_tokens",
            f"is {self.max_tokens}, must be 0 (no limit) or at least min_tokens = {self.min_tokens}",
        )


@dataclass(frozen=True)
class ShardsConfig(Bounded):
    """Location and size of the shards."""

    url: str = setting(
        "",
        "folder for shards and manifest (local, s3://, gs://, az://)",
        env="DATA_URL",
        identity=False,
        check=urls.mistake,
    )
    shard_tokens: int = setting(
        1 << 25, "tokens per shard, 2 bytes each; the last shard of each part or file has fewer", ge=1
    )

    def __post_init__(self):
        super().__post_init__()
        require(bool(self.url), "url", "is empty; set it with --data.url=... or with DATA_URL")
        require(self.shard_tokens < 2**31, "shard_tokens", f"is {self.shard_tokens}, must be at most 2147483647")


@dataclass(frozen=True)
class PrepDataConfig(ShardsConfig):
    """Location of the shards, the split and the shuffle."""

    part_bytes: int = setting(
        256 << 20, "source bytes per part, the unit of work and of resuming; the last shard of a part is shorter", gt=0
    )
    val_fraction: float = setting(
        0.002, "maximum fraction of documents for validation, chosen by a hash of their id", ge=0, lt=1
    )
    val_tokens: int = setting(
        0,
        "largest number of validation tokens; the documents with the lowest hashes are taken first; 0: all "
        "documents of val_fraction",
        ge=0,
    )
    train_tokens: int = setting(
        0,
        "number of training tokens to reach: parts of the source are read in an order drawn from the seed until "
        "they hold this many tokens; 0: the whole source",
        identity="unless default",
        ge=0,
    )
    shuffle: bool = setting(True, "shuffle the shards, and the documents within each shard")
    seed: int = setting(1337, "seed of the split and the shuffle")

    def __post_init__(self):
        super().__post_init__()
        require(
            not self.val_tokens or self.val_fraction > 0,
            "val_tokens",
            f"is {self.val_tokens}, but val_fraction is 0, which leaves no document for validation",
        )


@dataclass(frozen=True)
class TokenizerConfig:
    """The tokenizer."""

    name: Literal["gpt2"] = setting("gpt2", "vocabulary")
    engine: Literal["auto", "gigatoken", "tiktoken"] = setting(
        "auto",
        "encoder: gigatoken (fast), tiktoken (reference), or auto (gigatoken where it has a wheel)",
        identity=False,
    )
    vocab_url: str = setting(
        "",
        "vocab.bpe or rank file of GPT-2; empty: tiktoken downloads it",
        identity=False,
        env="VOCAB_URL",
        check=urls.mistake,
    )


EVALUATION_SETS = "sets to store beside the shards for evaluation: hellaswag, from the Hub, with a pinned checksum"


@dataclass(frozen=True)
class PrepConfig(Bounded):
    """Settings of `python -m data_prep.prepare`."""

    source: SourceConfig = section(SourceConfig)
    filter: FilterConfig = section(FilterConfig)
    data: PrepDataConfig = section(PrepDataConfig)
    tokenizer: TokenizerConfig = section(TokenizerConfig)
    evaluation_sets: tuple[Literal["hellaswag"], ...] = setting((), EVALUATION_SETS, identity=False)
    max_usd: float = _cap()
    shutdown_reserve_seconds: float = shutdown_reserve()
    workers: int = setting(0, "parallel workers; 0: one per core. Does not change the result", identity=False, ge=0)
    num_nodes: int = setting(
        1,
        "number of machines that share the work; does not change the result",
        identity=False,
        env="SKYPILOT_NUM_NODES",
        ge=1,
    )
    node_rank: int = setting(0, "number of this machine, from 0", identity=False, env="SKYPILOT_NODE_RANK")
    phase: Literal["all", "encode", "finalize"] = setting(
        "all",
        "encode: only this node's parts; finalize: only the manifest, an error if parts are missing; "
        "all: both, and the node that finishes last writes the manifest",
        identity=False,
    )

    def __post_init__(self):
        super().__post_init__()
        require(
            0 <= self.node_rank < self.num_nodes,
            "node_rank",
            f"is {self.node_rank}, must be from 0 to num_nodes - 1 = {self.num_nodes - 1}",
        )
        require(
            not (self.data.train_tokens and self.filter.drop_duplicates),
            "data.train_tokens",
            f"is {self.data.train_tokens}, but filter.drop_duplicates compares all documents; set one of them",
        )


@dataclass(frozen=True)
class FetchSourceConfig:
    """The token shards to import, which another program has made."""

    train_url: str = setting(
        "", "training shards: a file or glob of .bin or .npy (local, s3://, gs://, az://, hf://)", check=urls.mistake
    )
    val_url: str = setting("", "validation shards, in the form of train_url; empty: none", check=urls.mistake)
    revision: str = setting("", "commit or tag of hf:// sources; empty: the newest commit at the first start")

    def __post_init__(self):
        require(bool(self.train_url), "train_url", "is empty; give a file or glob")
        require(
            not self.revision or hub.is_address(self.train_url),
            "revision",
            f"is {self.revision!r}, but only an hf:// source has revisions",
        )


@dataclass(frozen=True)
class FetchConfig(Bounded):
    """Settings of `python -m data_prep.fetch`."""

    source: FetchSourceConfig = section(FetchSourceConfig)
    data: ShardsConfig = section(ShardsConfig)
    tokenizer: TokenizerConfig = section(TokenizerConfig)
    evaluation_sets: tuple[Literal["hellaswag"], ...] = setting((), EVALUATION_SETS, identity=False)
    max_usd: float = _cap()
    shutdown_reserve_seconds: float = shutdown_reserve()
    workers: int = setting(4, "number of shards that are copied in parallel", identity=False, ge=1)
