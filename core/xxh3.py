"""Computes XXH3-128, the checksum of checkpoints, with the package xxhash or, if it is not installed, with numpy.

    digest = xxh3.xxh3_128()
    digest.update(b"...")
    digest.hexdigest()

Both give the same result (https://github.com/Cyan4973/xxHash, doc/xxhash_spec.md, seed 0), but numpy takes longer. The
hash keeps eight running sums. A block of 1024 bytes contributes to these sums, and its contribution depends on that
block alone. So numpy computes the contributions of many blocks in one operation, and a sequential loop combines them.
"""

import numpy as np

from core.errors import LauncherError

STRIPE, BLOCK, CHUNK = 64, 1024, 1 << 20
# Shortest supported input in bytes. XXH3 has other algorithms for shorter inputs, which numpy's version does not have.
# Checkpoint files are always longer.
SHORTEST = 241
_MASK = (1 << 64) - 1
_P32 = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D)
_P64 = (0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5)
_SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221b8084674f743248e"
    "e03590e6813a264c3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8a8fa763fe39c343ff9dcbbc7c70b4f1d"
    "8a51e04bcdb45931c89f7ec9d9787364eac5ac8334d3ebc3c581a0fffa1363eb170ddd51b7f0da49d316552629d4689e2b16be587d47a1fc"
    "8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)


def _words(offset: int) -> np.ndarray:
    """Eight 64-bit words of the secret, starting at byte `offset`."""
    return np.frombuffer(_SECRET, "<u8", 8, offset)


_KEYS = np.stack([_words(8 * stripe) for stripe in range(BLOCK // STRIPE)])
_SHIFT, _FACTOR = np.uint64(47), np.uint64(_P32[0])
_SCRAMBLE, _LAST = _words(len(_SECRET) - 64), _words(len(_SECRET) - 71)


class NumpyXxh3:
    """A replacement of xxhash.xxh3_128() for inputs of at least SHORTEST bytes."""

    def __init__(self):
        self._sums = np.array([_P32[2], *_P64[:4], _P32[1], _P64[4], _P32[0]], np.uint64)
        self._rest = b""  # the last summed stripe, then at most one block of input that is not summed yet
        self._blocks = 0

    def update(self, data) -> None:
        view = memoryview(data).cast("B")
        for first in range(0, len(view), CHUNK):
            self._take(view[first : first + CHUNK])

    def hexdigest(self) -> str:
        before = STRIPE if self._blocks else 0
        length = self._blocks * BLOCK + len(self._rest) - before
        if length < SHORTEST:
            raise LauncherError(
                f"the checksum of {length} bytes needs the package xxhash, which is not installed (longer inputs do "
                "not need it); run `pip install xxhash`"
            )
        tail = self._rest[before:]
        stripes = (len(tail) - 1) // STRIPE
        whole = np.frombuffer(tail, "<u8", stripes * 8).reshape(1, stripes, 8)
        sums = self._sums + _stripe_sums(whole, _KEYS[:stripes])[0]
        last = np.frombuffer(self._rest[-STRIPE:], "<u8").reshape(1, 1, 8)
        sums = [int(each) for each in sums + _stripe_sums(last, _LAST[None])[0]]
        low = _merged(sums, 11, length * _P64[0] & _MASK)
        high = _merged(sums, len(_SECRET) - 75, ~(length * _P64[1]) & _MASK)
        return f"{high:016x}{low:016x}"

    def _take(self, part: memoryview) -> None:
        before = STRIPE if self._blocks else 0
        data = self._rest + part
        # Keep at least one byte in the buffer: `hexdigest` needs the end of the input.
        blocks = (len(data) - before - 1) // BLOCK
        if blocks < 1:
            self._rest = data
            return
        words = np.frombuffer(data, "<u8", blocks * BLOCK // 8, before).reshape(blocks, BLOCK // STRIPE, 8)
        sums = self._sums
        for block in _stripe_sums(words, _KEYS):
            sums += block
            sums ^= sums >> _SHIFT
            sums ^= _SCRAMBLE
            sums *= _FACTOR
        self._blocks += blocks
        self._rest = data[before + blocks * BLOCK - STRIPE :]


def _stripe_sums(words: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """What each block adds to the sums. Shapes: words (blocks, stripes, 8), keys (stripes, 8), result (blocks, 8)."""
    keyed = words ^ keys
    products = (keyed & np.uint64(0xFFFFFFFF)) * (keyed >> np.uint64(32))
    neighbours = words.reshape(*words.shape[:2], 4, 2)[..., ::-1].reshape(words.shape)
    return products.sum(1, dtype=np.uint64) + neighbours.sum(1, dtype=np.uint64)


def _merged(sums: list[int], offset: int, start: int) -> int:
    keys = [int(each) for each in _words(offset)]
    total = start
    for pair in range(0, 8, 2):
        product = (sums[pair] ^ keys[pair]) * (sums[pair + 1] ^ keys[pair + 1])
        total += (product ^ product >> 64) & _MASK
    total &= _MASK
    total ^= total >> 37
    total = total * 0x165667919E3779F9 & _MASK
    return total ^ total >> 32


try:
    from xxhash import xxh3_128
except ImportError:
    xxh3_128 = NumpyXxh3
