"""core.xxh3: numpy gives the digits of the package xxhash."""

import numpy as np
import pytest
import xxhash

from core import xxh3
from core.errors import LauncherError

# Around one stripe (64 bytes), one block (1024) and one chunk (1 MiB): the ends have rules of their own.
LENGTHS = [241, 255, 256, 257, 1023, 1024, 1025, 1088, 2048, 2049, 5000, (1 << 20) - 1, 1 << 20, (1 << 20) + 65]


def data_of(length: int) -> bytes:
    return np.random.default_rng(length).bytes(length)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("pieces", [1, 7])
def test_numpy_gives_the_same_digits(length: int, pieces: int):
    data = data_of(length)
    digest = xxh3.NumpyXxh3()
    for piece in np.array_split(np.frombuffer(data, np.uint8), pieces):
        digest.update(piece)
    assert digest.hexdigest() == xxhash.xxh3_128_hexdigest(data)


def test_digits_can_be_asked_for_in_between():
    data = data_of(5000)
    digest = xxh3.NumpyXxh3()
    digest.update(data[:3000])
    assert digest.hexdigest() == xxhash.xxh3_128_hexdigest(data[:3000])
    digest.update(memoryview(data)[3000:])
    assert digest.hexdigest() == xxhash.xxh3_128_hexdigest(data)


def test_too_short_an_input_is_refused():
    digest = xxh3.NumpyXxh3()
    digest.update(b"x" * 240)
    with pytest.raises(LauncherError, match="checksum of 240 bytes needs the package xxhash"):
        digest.hexdigest()


def test_the_package_is_used_where_it_is_installed():
    assert xxh3.xxh3_128 is xxhash.xxh3_128
