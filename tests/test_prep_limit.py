"""A preparation of only so many tokens: which parts it takes, how it grows, and its cap in dollars."""

from pathlib import Path

import pytest

from clouds import providers
from core.data import manifest
from core.errors import ConfigError, DataError
from core.run.reader import spent_usd_at_most
from core.task import read_task
from costs.forecast import Assumptions, forecast_of
from data_prep import plan
from tests.corpus import documents, prepare_config, prepare_set, stored, write_parquet
from tests.test_prep_record import report_of, start

LIMIT = 9000


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    texts = documents(800)
    return write_parquet(tmp_path_factory.mktemp("source"), [texts[first::4] for first in range(4)])


def limited(source: str, url: Path, vocab: Path, tokens: int = LIMIT, *flags: str) -> int:
    """The finished parts of a preparation."""
    prepare_set(source, str(url), vocab, f"--data.train_tokens={tokens}", *flags)
    return len(plan.done_parts(str(url)))


def test_as_many_parts_are_read_as_hold_the_tokens_and_the_result_is_the_same_on_any_number_of_workers(
    source: str, tmp_path: Path, vocab_bpe: Path
):
    prepare_set(source, str(tmp_path / "whole"), vocab_bpe)
    whole = manifest.read(str(tmp_path / "whole"))
    count = len(plan.read(str(tmp_path / "whole")).parts)
    assert count > 6
    few = limited(source, tmp_path / "one", vocab_bpe)
    made = manifest.read(str(tmp_path / "one"))
    assert few < count
    assert LIMIT <= made.splits["train"].tokens < whole.splits["train"].tokens
    assert made.splits["val"].tokens > 0
    # Without its last part it would be too small: the shards of a part bear its name.
    by_part: dict[str, int] = {}
    for shard in made.splits["train"].shards:
        by_part[shard.name.rpartition("-")[0]] = by_part.get(shard.name.rpartition("-")[0], 0) + shard.tokens
    by_part.pop("train/rest", None)
    assert sum(by_part.values()) - max(by_part.values()) < LIMIT
    limited(source, tmp_path / "many", vocab_bpe, LIMIT, "--workers=3")
    assert manifest.read(str(tmp_path / "many")).fingerprint == made.fingerprint


def test_two_nodes_give_the_set_of_one(source: str, tmp_path: Path, vocab_bpe: Path):
    limited(source, tmp_path / "one", vocab_bpe)
    for rank in (0, 1):
        limited(source, tmp_path / "two", vocab_bpe, LIMIT, "--num_nodes=2", f"--node_rank={rank}")
    assert manifest.read(str(tmp_path / "two")).fingerprint == manifest.read(str(tmp_path / "one")).fingerprint


def test_a_limit_above_the_source_takes_all_of_it(source: str, tmp_path: Path, vocab_bpe: Path):
    limited(source, tmp_path / "all", vocab_bpe, 10**9)
    prepare_set(source, str(tmp_path / "whole"), vocab_bpe)
    assert manifest.read(str(tmp_path / "all")).fingerprint == manifest.read(str(tmp_path / "whole")).fingerprint


def test_a_finished_set_is_not_grown_under_the_runs_that_read_it(source: str, tmp_path: Path, vocab_bpe: Path):
    limited(source, tmp_path / "set", vocab_bpe)
    before = stored(str(tmp_path / "set"))
    with pytest.raises(DataError, match=r"data.train_tokens is 9000 there and 12000 here.*choose another data.url"):
        limited(source, tmp_path / "set", vocab_bpe, 12_000)
    assert stored(str(tmp_path / "set")) == before


def test_an_estimate_counts_the_tokens_that_are_prepared():
    given = {"BUCKET": "b", "PREP_ARGS": "--data.train_tokens=2000000000"}
    whole, part = (
        forecast_of(read_task("sky/prep-data.yaml", settings), providers.snapshot(), Assumptions(), None)
        for settings in ({"BUCKET": "b"}, given)
    )
    assert (whole.tokens, part.tokens) == (1e10, 2e9)
    assert part.rows[0].usd < whole.rows[0].usd


def test_a_limit_and_a_comparison_of_all_documents_exclude_each_other(source: str, tmp_path: Path, vocab_bpe: Path):
    with pytest.raises(ConfigError, match=r"train_tokens.* is 5, but filter.drop_duplicates compares all documents"):
        prepare_config(source, str(tmp_path), vocab_bpe, "--data.train_tokens=5", "--filter.drop_duplicates=true")


def test_the_cap_ends_a_preparation_and_what_is_finished_stays(tmp_path: Path, vocab_bpe: Path):
    source = write_parquet(tmp_path / "source", [documents(200)] * 2)
    run, flags = f"{tmp_path}/run", ("--data.part_bytes=2000", "--workers=1")
    # Each second costs a dollar, and the machine's end takes 1,000 of them.
    spent = {"USD_PER_HOUR": "3600", "MAX_USD": "900"}
    done = start(source, f"{tmp_path}/set", vocab_bpe, run, "--shutdown_reserve_seconds=1000", *flags, **spent)
    errors = done.communicate()[1]
    assert done.returncode == 34, errors
    assert "has cost nearly the $900 of max_usd; finished parts are kept" in errors
    assert report_of(run).segments[0].end == "stopped by its cap"
    assert not manifest.exists(f"{tmp_path}/set")
    assert 0 < spent_usd_at_most(run) < 900
    done = start(source, f"{tmp_path}/set", vocab_bpe, run, *flags, USD_PER_HOUR="3600", MAX_USD="1e6")
    assert done.communicate()[1].count("Traceback") == 0
    assert done.returncode == 0
    assert manifest.exists(f"{tmp_path}/set")
