"""The shard header: what it says, who else can read it, and what is refused."""

import numpy as np
import pytest

from core.data.shard import HEADER_BYTES, check_size, header_bytes, parse_header, shard_bytes
from core.errors import DataError


@pytest.mark.parametrize("kind", ["<u2", "<u4"])
def test_round_trip(kind: str):
    tokens = np.arange(1000, dtype=kind)
    data = shard_bytes(tokens)
    header = parse_header(data, "x")
    assert (header.tokens, header.bits, header.file_bytes) == (1000, tokens.itemsize * 8, len(data))
    assert np.array_equal(np.frombuffer(data, header.dtype, offset=HEADER_BYTES), tokens)


def test_llmc_reads_it():
    """As llm.c's dataloader does: 256 int32, magic, version, count, then uint16."""
    data = shard_bytes(np.array([50256, 7, 8], dtype=np.uint16))
    fields = np.frombuffer(data[:1024], dtype=np.int32)
    assert fields[:3].tolist() == [20240520, 1, 3]
    assert np.frombuffer(data[1024:], dtype=np.uint16).tolist() == [50256, 7, 8]


def changed(**fields: int) -> bytes:
    header = np.frombuffer(header_bytes(10), "<i4").copy()
    for name, value in fields.items():
        header[["magic", "version", "tokens", "bits"].index(name)] = value
    return header.tobytes()


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (header_bytes(10)[:1000], "only 1000 bytes, a shard starts with a header of 1024"),
        (changed(magic=1), "magic number is 1, a token shard has 20240520"),
        (changed(version=2), "shard version 2 is not 1"),
        (changed(tokens=0), "header says 0 tokens of 16 bits"),
        (changed(tokens=-5), "header says -5 tokens"),
        (changed(bits=8), "header says 10 tokens of 8 bits"),
    ],
)
def test_foreign_headers_are_refused_by_name(data: bytes, problem: str):
    with pytest.raises(DataError, match=f"s3://b/x.bin: {problem}"):
        parse_header(data, "s3://b/x.bin")


def test_size_must_fit_the_header():
    header = parse_header(header_bytes(10), "x")
    check_size(header, 1044, "x")
    with pytest.raises(DataError, match="x: 1043 bytes, but its header promises 10 tokens, which take 1044"):
        check_size(header, 1043, "x")


@pytest.mark.parametrize("count", [0, 2**31])
def test_a_shard_holds_at_least_one_token_and_no_more_than_its_field(count: int):
    with pytest.raises(ValueError, match="a shard holds 1 to 2147483647 tokens"):
        header_bytes(count)
