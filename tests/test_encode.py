"""Both engines give tiktoken's ids, on real text and on text that is made to break tokenizers."""

import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.data import vocabulary
from core.data.vocabulary import Vocabulary
from core.errors import ConfigError, DataError
from data_prep.encode import CHECK_BYTES, Check, GigatokenEngine, TiktokenEngine, open_engine
from tests.corpus import speeches

SPACES = "\u00a0\u1680\u2000\u2001\u2009\u200a\u2028\u2029\u202f\u205f\u3000"
CODE = "def f(x):\n\treturn {k: v for k, v in x.items() if k != '__init__'}\n"
HOSTILE = {
    "empty": ["", "a", "", "", "b", ""],
    "null bytes": ["\0", "a\0b", "\0" * 1000, "\0\n\0 \0"],
    "end of text": ["<|endoftext|>", "a<|endoftext|>b", "<|endoftext|>" * 2, "<|endoftext", " <|endoftext|> "],
    "spaces": [*(" " * n for n in (1, 2, 3, 31, 32, 33, 255, 4096)), "a" + " " * 1000 + "b", "  a  b   "],
    "tabs and newlines": ["\t" * 5000, "\n" * 5000, "\r\n" * 3000, "\t\n \r\x0b\x0c\x1c\x1f\x85", "a\n\n\n  b\t\t c\n"],
    "unicode spaces": [SPACES, "a\u00a0b\u2003 c", "\ufeff\u200b x"],
    "digits": ["1" * 10_000, "3.14159 2,718 1e-9", "٣٤٥ ⅷ ① ²³ ௧௨ 𝟙𝟚𝟛", "0x" + "f" * 999],
    "contractions": ["don't DON'T it's IT'S we'll I've you're he'd 'tis ''s 's's 'll", "’s ’t"],
    "emoji": ["👩‍👩‍👧‍👦🏳️‍🌈👍🏿🇩🇪🇯🇵1️⃣#️⃣", "👨🏽‍💻" * 500, "🏴󠁧󠁢󠁳󠁣󠁴󠁿"],
    "combining": ["e\u0301" * 999, "Z̸̡̢a̷l̶g̵o̴", "한국어 한국어 中文 日本語 ไทย हिन्दी العربية עברית"],
    "replacement": ["\ufffd", "a\ufffd\ufffdb", "\ufffe\uffff"],
    "code": [CODE * 50, "#include <a.h>\n\n\n\tint\tmain(){}\n", '<div class="a">&nbsp;</div>'],
    "a megabyte": [
        "word " * 210_000,
        " " * 10**6,
        "\n" * 10**6,
        "7" * 10**6,
        "ab" * 500_000,
        "a" * 300_000,
        "👍" * 250_000,
    ],
}
# Planes 0 to 3, 14 and 16: all that has characters, and private ones.
PLANES = [range(low, low + 0x1000) for low in (*range(0, 0x40000, 0x1000), 0xE0000, 0x10F000)]


@pytest.fixture(scope="module")
def words(vocab_bpe: Path) -> Vocabulary:
    return vocabulary.read(str(vocab_bpe))


@pytest.fixture(scope="module")
def fast(words: Vocabulary) -> GigatokenEngine:
    return GigatokenEngine(words)


@pytest.fixture(scope="module")
def reference(words: Vocabulary):
    return words.encoding()


def check_identical(engine, reference, texts: list[str]) -> None:
    ids, offsets = engine.encode(pa.array(texts, pa.large_string()))
    assert ids.dtype == np.uint16
    assert len(offsets) == len(texts) + 1
    assert offsets[-1] == len(ids)
    for number, text in enumerate(texts):
        found = ids[offsets[number] : offsets[number + 1]].tolist()
        assert found == reference.encode_ordinary(text), f"document {number}: {text[:40]!r}"


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_text(kind: str, fast: GigatokenEngine, reference):
    check_identical(fast, reference, HOSTILE[kind])


def test_every_plane_of_unicode(fast: GigatokenEngine, reference):
    blocks = ["".join(chr(code) for code in plane if not 0xD800 <= code < 0xE000) for plane in PLANES]
    check_identical(fast, reference, [text for block in blocks for text in (block, " ".join(block))])


def test_reference_engine_is_encode_ordinary(words: Vocabulary, reference):
    check_identical(TiktokenEngine(words), reference, [text for kind in HOSTILE for text in HOSTILE[kind][:3]])


LONG_WORDS = {
    "one letter": "a" * 600,
    "two bytes per letter": "é" * 300,
    "letters": "".join("etaoinshrdlucmfw"[number * number % 97 % 16] for number in range(600)),
    "digits": "".join(str(number * number % 97) for number in range(300)),
    "signs": "-=." * 200,
}


@pytest.mark.parametrize("kind", LONG_WORDS)
def test_a_long_word_is_merged_as_the_definition_says(kind: str, fast, reference, words: Vocabulary):
    """Both engines merge words of a hundred bytes and more by another algorithm, which takes no quadratic time."""
    word = LONG_WORDS[kind]
    check_identical(fast, reference, [word])
    assert reference.encode_ordinary(word) == merged(word.encode(), words.ranks)


def merged(word: bytes, ranks: dict[bytes, int]) -> list[int]:
    """Byte-pair encoding as it is defined: merge the leftmost pair of the lowest rank until there is none."""
    tokens = [bytes([byte]) for byte in word]
    while True:
        pairs = [ranks.get(left + right, len(ranks)) for left, right in pairwise(tokens)]
        lowest = min(pairs, default=len(ranks))
        if lowest == len(ranks):
            return [ranks[token] for token in tokens]
        at = pairs.index(lowest)
        tokens[at : at + 2] = [tokens[at] + tokens[at + 1]]


def test_our_tiktoken_has_openais_pattern_and_ranks(reference):
    assert reference.encode_ordinary("Hello world, it's 2026!") == [15496, 995, 11, 340, 338, 1160, 2075, 0]
    assert reference.eot_token == 50256


def test_text_never_becomes_the_end_of_text_token(fast: GigatokenEngine):
    ids, _ = fast.encode(pa.array(HOSTILE["end of text"], pa.large_string()))
    assert 50256 not in ids


@settings(max_examples=300, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=60), max_size=8))
def test_any_text(fast: GigatokenEngine, reference, texts: list[str]):
    check_identical(fast, reference, texts)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=" \t\n\r\u00a0\u2003'sStTlLvVeErRdDmM1٣é\u0301👍<|>\0.-", max_size=80))
def test_any_mixture_of_what_the_pattern_looks_at(fast: GigatokenEngine, reference, text: str):
    check_identical(fast, reference, [text])


def test_real_text(fast: GigatokenEngine, reference):
    check_identical(fast, reference, speeches(40))


def test_slices_and_long_batches_keep_their_offsets(fast: GigatokenEngine, reference):
    texts = [f"document {i} " * (i % 7) for i in range(500)]
    array = pa.array(texts, pa.large_string())
    ids, offsets = fast.encode(array.slice(123, 200))
    for number, text in enumerate(texts[123:323]):
        assert ids[offsets[number] : offsets[number + 1]].tolist() == reference.encode_ordinary(text)


def test_a_full_cache_is_dropped_and_the_ids_stay(words: Vocabulary, reference, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("data_prep.encode.RENEW_RESIDENT_BYTES", 0)
    monkeypatch.setattr("data_prep.encode.RENEW_TEXT_BYTES", 1000)
    engine = GigatokenEngine(words)
    first = engine._tokenizer
    for _ in range(3):
        check_identical(engine, reference, speeches(1))
    assert engine._tokenizer is not first


def test_check_finds_a_wrong_token(words: Vocabulary, fast: GigatokenEngine):
    check = Check(words)
    texts = pa.array(speeches(3), pa.large_string())
    ids, offsets = fast.encode(texts)
    check.restart(1 << 30)
    check.compare(texts, ids, offsets, "a.parquet")
    wrong = ids.copy()
    wrong[offsets[1] + 5] ^= 1
    check.restart(1 << 30)
    with pytest.raises(
        DataError, match=r"a\.parquet: the fast tokenizer and tiktoken disagree.*--tokenizer\.engine=tiktoken"
    ):
        check.compare(texts, wrong, offsets, "a.parquet")


def test_check_looks_at_a_bounded_sample(words: Vocabulary, fast: GigatokenEngine):
    check = Check(words)
    texts = pa.array(["x" * 1000] * (CHECK_BYTES // 1000 + 100), pa.large_string())
    ids, offsets = fast.encode(texts)
    ids[-1] ^= 1
    check.restart(1 << 30)
    check.compare(texts, ids, offsets, "a.parquet")


def test_without_a_wheel_tiktoken_takes_over_and_says_so(
    words: Vocabulary, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setitem(sys.modules, "gigatoken.gigatoken_rs", None)
    assert open_engine("auto", words).name == "tiktoken"
    assert "gigatoken has no wheel for this platform" in caplog.text
    with pytest.raises(ConfigError, match="pip install gigatoken"):
        open_engine("gigatoken", words)


@pytest.mark.slow
def test_a_hundred_megabytes_of_real_text(fast: GigatokenEngine, words: Vocabulary, tmp_path: Path):
    """Needs `apt-get download`; run by hand and before a new gigatoken is pinned."""
    corpus = pytest.importorskip("bench.corpus")
    reference = TiktokenEngine(words)
    texts: list[str] = []
    size = total = 0
    for text in corpus.code(tmp_path):
        texts.append(text)
        size += len(text)
        if size > 4_000_000:
            array = pa.array(texts, pa.large_string())
            for found, expected in zip(fast.encode(array), reference.encode(array), strict=True):
                assert np.array_equal(found, expected)
            total += array.nbytes
            texts, size = [], 0
            if total > 110_000_000:
                break
    assert total > 100_000_000
