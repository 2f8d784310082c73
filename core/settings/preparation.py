"""Every setting of data preparation and import, with its default, its meaning and what it may not be."""

import re
from dataclasses import dataclass
from typing import Literal

from core import urls
from core.settings.loader import require, section, setting
from core.stores import hub


@dataclass(frozen=True)
class SourceConfig:
    """Where documents come from."""

    dataset: str = setting(
        "",
        "a data set of the Hugging Face Hub by its name, such as HuggingFaceFW/fineweb-edu; with `name` and `split`",
        replaces=("url", "name", "split", "revision"),
    )
    name: str = setting("", "the data set's configuration (subset), such as sample-10BT. Empty: its default")
    split: str = setting("train", "the data set's split")
    url: str = setting(
        "",
        "files instead: one or a glob of .parquet, .jsonl, .json, .csv, .tsv (.gz, .zst), .txt, .arrow or .tar "
        "(local, https://, s3://, gs://, az://, hf://)",
        env="SOURCE_URL",
        check=urls.mistake_in_source,
        replaces=("dataset", "name", "split", "revision"),
    )
    revision: str = setting(
        "",
        "commit or tag of the data set, or of an hf:// address that names none (@...); other sources have none. "
        "Empty: the newest, pinned when prep first starts",
    )
    text_column: str | None = setting(
        None, "column with the document's text, or with its conversation; none: text, content, messages, conversations"
    )
    id_column: str | None = setting(
        None,
        "column with the document's unique id; the split hashes it. Empty: the hash of the text takes its place; "
        "none: the column id if there is one, else as empty",
    )
    text_documents: Literal["file", "blocks"] = setting(
        "file", "documents of .txt files: each file, or each of its blocks of lines between blank ones"
    )
    max_bad_share: float = setting(
        0.01, "share of rows without text, id or valid UTF-8 at which prep stops; below it they are counted"
    )

    @property
    def place(self) -> str:
        """What the source is called in messages."""
        return self.url or "/".join(filter(None, (self.dataset, self.name, self.split)))

    def __post_init__(self):
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
            f"is {self.dataset!r}, which is no name on the Hub; write OWNER/NAME, or name files by source.url",
        )
        require(self.text_column != "", "text_column", "is empty; name the column with the text, or leave it out")
        require(bool(self.split), "split", "is empty; name one, such as train")
        require(0 <= self.max_bad_share <= 1, "max_bad_share", f"is {self.max_bad_share}, must be between 0 and 1")


@dataclass(frozen=True)
class FilterConfig:
    """Which documents are left out. A filter that is off needs no column."""

    min_score: float | None = setting(None, "least value of score_column (FineWeb-Edu: 3 to 5); none: no filter")
    score_column: str = setting("score", "column that min_score reads")
    languages: tuple[str, ...] = setting((), "values of language_column to keep, such as en,de; empty: all")
    language_column: str = setting("language", "column that languages reads")
    min_tokens: int = setting(1, "shorter documents are dropped (counted without the end-of-text token)")
    max_tokens: int = setting(0, "longer documents are dropped; 0: no limit")
    drop_duplicates: bool = setting(
        False, "keep only the first of documents with the same text; reads the source twice"
    )

    def __post_init__(self):
        require(self.min_tokens >= 1, "min_tokens", f"is {self.min_tokens}, must be at least 1")
        require(
            self.max_tokens == 0 or self.max_tokens >= self.min_tokens,
            "max_tokens",
            f"is {self.max_tokens}, must be 0 (no limit) or at least min_tokens = {self.min_tokens}",
        )


@dataclass(frozen=True)
class PrepDataConfig:
    """Where shards go and how they are cut."""

    url: str = setting(
        "",
        "folder for shards and manifest (local, s3://, gs://, az://)",
        env="DATA_URL",
        identity=False,
        check=urls.mistake,
    )
    shard_tokens: int = setting(1 << 25, "tokens per shard (the last of each part has fewer); 2 bytes each")
    part_bytes: int = setting(
        256 << 20, "source bytes per part, the unit of work and of resuming; a part ends its last shard early"
    )
    val_fraction: float = setting(0.002, "largest share of documents for validation, by hash of their id")
    val_tokens: int = setting(
        0, "validation size: the documents with the lowest hashes until this is reached; 0: all of val_fraction"
    )
    shuffle: bool = setting(True, "shuffle documents within a shard, and shards")
    seed: int = setting(1337, "seed of the split and the shuffle")

    def __post_init__(self):
        require(bool(self.url), "url", "is empty; set it, --data.url=... or DATA_URL")
        require(0 < self.shard_tokens < 2**31, "shard_tokens", f"is {self.shard_tokens}, must be 1 to 2147483647")
        require(self.part_bytes > 0, "part_bytes", f"is {self.part_bytes}, must be above 0")
        require(0 <= self.val_fraction < 1, "val_fraction", f"is {self.val_fraction}, must be at least 0 and below 1")
        require(self.val_tokens >= 0, "val_tokens", f"is {self.val_tokens}, must not be below 0")
        require(
            not self.val_tokens or self.val_fraction > 0,
            "val_tokens",
            f"is {self.val_tokens}, but val_fraction is 0: no document could go there",
        )


@dataclass(frozen=True)
class TokenizerConfig:
    """How text becomes ids."""

    name: Literal["gpt2"] = setting("gpt2", "vocabulary")
    engine: Literal["auto", "gigatoken", "tiktoken"] = setting(
        "auto",
        "encoder: gigatoken (fast), tiktoken (reference), or auto: the fast one where it has a wheel",
        identity=False,
    )
    vocab_url: str = setting(
        "",
        "vocab.bpe or rank file of GPT-2; empty: tiktoken's own download",
        identity=False,
        env="VOCAB_URL",
        check=urls.mistake,
    )


@dataclass(frozen=True)
class PrepConfig:
    """`python -m data_prep.prepare`."""

    source: SourceConfig = section(SourceConfig)
    filter: FilterConfig = section(FilterConfig)
    data: PrepDataConfig = section(PrepDataConfig)
    tokenizer: TokenizerConfig = section(TokenizerConfig)
    workers: int = setting(0, "parallel workers; 0: one per core. Does not change the result", identity=False)
    num_nodes: int = setting(
        1, "machines that share the work; the result does not depend on it", identity=False, env="SKYPILOT_NUM_NODES"
    )
    node_rank: int = setting(0, "this machine, from 0", identity=False, env="SKYPILOT_NODE_RANK")
    phase: Literal["all", "encode", "finalize"] = setting(
        "all",
        "encode: only this node's parts; finalize: only the manifest, an error while parts are missing; "
        "all: both, where the node that finishes last writes the manifest",
        identity=False,
    )

    def __post_init__(self):
        require(self.workers >= 0, "workers", f"is {self.workers}, must be 0 (one per core) or more")
        require(self.num_nodes > 0, "num_nodes", f"is {self.num_nodes}, must be at least 1")
        require(
            0 <= self.node_rank < self.num_nodes,
            "node_rank",
            f"is {self.node_rank}, must be from 0 to num_nodes - 1 = {self.num_nodes - 1}",
        )


@dataclass(frozen=True)
class FetchSourceConfig:
    """Token shards that somebody else has made."""

    train_url: str = setting(
        "", "training shards: a file or glob of .bin or .npy (local, s3://, gs://, az://, hf://)", check=urls.mistake
    )
    val_url: str = setting("", "validation shards, likewise; empty: none", check=urls.mistake)
    revision: str = setting(
        "", "commit or tag of hf:// sources; empty: the newest, pinned when the import first starts"
    )

    def __post_init__(self):
        require(bool(self.train_url), "train_url", "is empty; give a file or glob")
        require(
            not self.revision or hub.is_address(self.train_url),
            "revision",
            f"is {self.revision!r}, but only an hf:// source has revisions",
        )


@dataclass(frozen=True)
class FetchDataConfig:
    """Where the imported shards go."""

    url: str = setting(
        "",
        "folder for shards and manifest (local, s3://, gs://, az://)",
        env="DATA_URL",
        identity=False,
        check=urls.mistake,
    )
    shard_tokens: int = setting(1 << 25, "tokens per shard (the last of each source file has fewer); 2 bytes each")

    def __post_init__(self):
        require(bool(self.url), "url", "is empty; set it, --data.url=... or DATA_URL")
        require(0 < self.shard_tokens < 2**31, "shard_tokens", f"is {self.shard_tokens}, must be 1 to 2147483647")


@dataclass(frozen=True)
class FetchConfig:
    """`python -m data_prep.fetch`."""

    source: FetchSourceConfig = section(FetchSourceConfig)
    data: FetchDataConfig = section(FetchDataConfig)
    tokenizer: TokenizerConfig = section(TokenizerConfig)
    workers: int = setting(4, "shards that are copied side by side", identity=False)

    def __post_init__(self):
        require(self.workers > 0, "workers", f"is {self.workers}, must be at least 1")
