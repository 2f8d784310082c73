"""The short form of tests/chaos.py."""

import pytest

from tests import chaos, corpus


@pytest.mark.slow
def test_kills_leave_no_trace(s3, tmp_path_factory, vocab_bpe):
    s3.make_bucket("chaos-short")
    source = corpus.write_parquet(tmp_path_factory.mktemp("source"), [corpus.speeches(16)])
    corpus.prepare_set(source, "s3://chaos-short/set", vocab_bpe)
    happened = chaos.chaos("s3://chaos-short/set", "s3://chaos-short", kills=2, steps=80, seed=4)
    assert happened["kills of everything"] + happened["kills of one rank"] >= 1
