"""Every kind of source file, at every kind of place: the ids are tiktoken's, and what is wrong is one sentence."""

import csv
import functools
import gc
import http.server
import io
import json
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from core import storage
from core.data import manifest
from core.errors import DataError, ObjectNotFound, StorageError
from data_prep.sources import blocks, kinds, streamed, web
from data_prep.sources.files import Part, SourceFile
from tests.corpus import both_splits, documents, documents_of, encoded, prepare_set, stored, table

# The last are texts that a parser could spoil: quotes, commas, line ends, tabs, numbers, words for "absent".
TEXTS = [*documents(60), 'say "hi", then\nleave', "a\tb", "007", "NA", "null", " padded ", "<|endoftext|>"]


def rows(texts: list[str]) -> list[dict[str, str]]:
    return [{"id": f"k{number}", "text": text} for number, text in enumerate(texts)]


def as_csv(texts: list[str], sep: str = ",") -> bytes:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, ["id", "text"], delimiter=sep)
    writer.writeheader()
    writer.writerows(rows(texts))
    return stream.getvalue().encode()


def as_arrow(texts: list[str], new: Callable = pa.ipc.new_stream) -> bytes:
    stream = io.BytesIO()
    data = pa.Table.from_pylist(rows(texts))
    with new(stream, data.schema) as writer:
        writer.write_table(data, max_chunksize=7)
    return stream.getvalue()


def as_tar(texts: list[str]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for row in rows(texts):
            for suffix, data in (("json", b'{"n": 1}'), ("txt", row["text"].encode())):
                entry = tarfile.TarInfo(f"{row['id']}.{suffix}")
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
    return stream.getvalue()


def as_lines(texts: list[str]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows(texts)).encode()


def as_parquet(texts: list[str]) -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows(texts)), stream)
    return stream.getvalue()


def packed(kind: str, write: Callable[[list[str]], bytes]) -> Callable[[list[str]], bytes]:
    return lambda texts: pa.compress(write(texts), kind, asbytes=True)


FORMATS = {
    "csv": as_csv,
    "csv.gz": packed("gzip", as_csv),
    "csv.zst": packed("zstd", as_csv),
    "tsv": functools.partial(as_csv, sep="\t"),
    "CSV": as_csv,
    "arrow": as_arrow,
    "file.arrow": functools.partial(as_arrow, new=pa.ipc.new_file),
    "tar": as_tar,
    "jsonl": as_lines,
    "ndjson": as_lines,
    "jsonl.zst": packed("zstd", as_lines),
    "json": as_lines,
    "array.json": lambda texts: json.dumps(rows(texts), indent=1).encode(),
    "parquet": as_parquet,
}


def write(folder: Path, name: str, texts: list[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    suffix = name.partition(".")[2]
    (folder / name).write_bytes(FORMATS[suffix](texts))
    return folder / name


@pytest.mark.parametrize("suffix", FORMATS)
def test_the_ids_are_tiktokens_whatever_the_kind(suffix: str, tmp_path: Path, vocab_bpe: Path):
    write(tmp_path / "source", f"a.{suffix}", TEXTS[:30])
    write(tmp_path / "source", f"b.{suffix}", TEXTS[30:])
    prepare_set(str(tmp_path / "source/*"), str(tmp_path / "set"), vocab_bpe)
    assert both_splits(str(tmp_path / "set")) == encoded(TEXTS, vocab_bpe)
    assert manifest.read(str(tmp_path / "set")).splits["val"].documents > 0


@pytest.mark.parametrize("suffix", ["csv", "arrow", "file.arrow", "tar", "jsonl", "array.json"])
def test_kinds_with_the_same_rows_give_the_same_split(suffix: str, tmp_path: Path, vocab_bpe: Path):
    """The id is found, so that the split follows it: in a tar, it is the key of the sample."""
    for name in (f"a.{suffix}", "a.parquet"):
        prepare_set(str(write(tmp_path / "source", name, TEXTS)), str(tmp_path / name), vocab_bpe)
    assert documents_of(str(tmp_path / f"a.{suffix}"), "val") == documents_of(str(tmp_path / "a.parquet"), "val")
    assert manifest.read(str(tmp_path / f"a.{suffix}")).split_rule["hashed"] in ("id", "__key__")


def test_files_in_a_bucket_are_streamed_by_our_storage(bucket: str, tmp_path: Path, vocab_bpe: Path):
    for suffix in ("csv", "file.arrow", "tar"):
        storage.write_file(f"{bucket}/source/a.{suffix}", write(tmp_path / "source", f"a.{suffix}", TEXTS))
        prepare_set(f"{bucket}/source/a.{suffix}", f"{bucket}/set-{suffix}", vocab_bpe)
        assert both_splits(f"{bucket}/set-{suffix}") == encoded(TEXTS, vocab_bpe)


def test_numbers_and_gaps_of_csv(tmp_path: Path, vocab_bpe: Path):
    (tmp_path / "a.csv").write_text("text,score\ngood,4.5\nworse,1\nunknown,\nodd,nan\n,5\n")
    flags = ("--filter.min_score=3", "--data.val_fraction=0")
    prepare_set(str(tmp_path / "a.csv"), str(tmp_path / "set"), vocab_bpe, *flags)
    assert both_splits(str(tmp_path / "set")) == encoded(["good"], vocab_bpe)
    assert manifest.read(str(tmp_path / "set")).stats["dropped"] == {"empty": 1, "low_score": 3}


def test_a_file_of_many_blocks(tmp_path: Path, vocab_bpe: Path, monkeypatch: pytest.MonkeyPatch):
    """With jumps in the middle of a block and beyond it, as for the footer of an Arrow file."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1000)
    for suffix in ("csv", "csv.gz", "file.arrow", "arrow", "tar", "jsonl", "jsonl.zst"):
        prepare_set(str(write(tmp_path, f"a.{suffix}", TEXTS)), str(tmp_path / suffix), vocab_bpe)
        assert both_splits(str(tmp_path / suffix)) == encoded(TEXTS, vocab_bpe), suffix


def test_source_bytes_count_once(tmp_path: Path):
    """`datasets` opens Arrow files and archives twice, for their columns first."""
    for suffix in ("csv", "arrow", "file.arrow", "tar", "csv.gz"):
        path = write(tmp_path, f"a.{suffix}", TEXTS)
        file = SourceFile(str(path), path.stat().st_size, "")
        counts: list[int] = []
        column = "txt" if suffix == "tar" else "text"
        found = kinds.kind_of(file).read(Part(0, file, 0, file.size), None, {column: "text"}, counts.append)
        assert sum(batch.num_rows for batch in found) == len(TEXTS)
        assert sum(counts) == file.size, suffix


@pytest.mark.parametrize("suffix", ["csv", "csv.gz", "arrow", "file.arrow", "tar"])
def test_no_fetching_goes_on_behind_a_reader(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What is left to the collector to end would wait for threads wherever the collector happens to run."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1000)
    path = write(tmp_path, f"a.{suffix}", TEXTS)
    file = SourceFile(str(path), path.stat().st_size, "")
    found = kinds.kind_of(file).read(Part(0, file, 0, file.size), None, {}, lambda count: None)
    gc.disable()
    try:
        streamed.schema_of.__wrapped__(file)
        next(found)
        found.close()
        assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("fetch")]
    finally:
        gc.enable()


# --- columns -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["text", "content", "Text", "body"])
def test_the_column_with_the_text_is_found(name: str, tmp_path: Path, vocab_bpe: Path):
    texts = documents(40)
    pq.write_table(pa.table({"n": list(range(40)), name: texts}), tmp_path / "a.parquet")
    prepare_set(str(tmp_path / "a.parquet"), str(tmp_path / "set"), vocab_bpe)
    assert both_splits(str(tmp_path / "set")) == encoded(texts, vocab_bpe)
    assert manifest.read(str(tmp_path / "set")).split_rule["hashed"] == "text"  # there are no ids


@pytest.mark.parametrize(("role", "content"), [("role", "content"), ("from", "value")])
@pytest.mark.parametrize("kind", ["parquet", "jsonl", "arrow"])
def test_conversations_become_text(kind: str, role: str, content: str, tmp_path: Path, vocab_bpe: Path):
    talks = [
        [{role: "user", content: f"question {number}"}, {role: "assistant", content: "yes\nno"}]
        for number in range(400)
    ]
    data = [{"messages": talk} for talk in talks] + [{"messages": []}]
    name = str(tmp_path / f"a.{kind}")
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(data), name)
    elif kind == "jsonl":
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in data))
    else:
        found = pa.Table.from_pylist(data)
        with pa.ipc.new_stream(name, found.schema) as writer:
            writer.write_table(found)
    prepare_set(name, str(tmp_path / "set"), vocab_bpe)
    expected = [f"user: question {number}\n\nassistant: yes\nno" for number in range(400)]
    assert both_splits(str(tmp_path / "set")) == encoded(expected, vocab_bpe)
    assert manifest.read(str(tmp_path / "set")).stats["dropped"] == {"bad": 1}


def test_a_plan_of_an_earlier_release_is_continued(tmp_path: Path, vocab_bpe: Path):
    """Columns that are found are stored as if they had been named, so that the plan is the same to the byte."""
    source = tmp_path / "a.parquet"
    pq.write_table(table(documents(50)), source)
    prepare_set(str(source), str(tmp_path / "found"), vocab_bpe)
    flags = ("--source.text_column=text", "--source.id_column=id")
    prepare_set(str(source), str(tmp_path / "named"), vocab_bpe, *flags)
    assert stored(str(tmp_path / "found")) == stored(str(tmp_path / "named"))
    settings = json.loads((tmp_path / "found/parts/plan.json").read_text())["settings"]
    assert {name for name in settings if name.startswith("source.")} == {
        "source.url",
        "source.revision",
        "source.text_column",
        "source.id_column",
    }


def test_the_message_lists_what_columns_there_are(tmp_path: Path, vocab_bpe: Path):
    (tmp_path / "a.csv").write_text("titel,body,n\na,b,1\n")
    with pytest.raises(DataError, match=r"has no column text, content or messages, only titel \(string\), body"):
        prepare_set(str(tmp_path / "a.csv"), str(tmp_path / "set"), vocab_bpe)
    (tmp_path / "a.jsonl").write_text('{"title": "a", "body": "b"}\n')
    with pytest.raises(DataError, match=r"has no column 'boddy', only title, body; did you mean body\?"):
        prepare_set(str(tmp_path / "a.jsonl"), str(tmp_path / "set"), vocab_bpe, "--source.text_column=boddy")
    assert not (tmp_path / "set").exists()


# --- plain text ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_blocks_between_blank_lines_are_documents(end: str, tmp_path: Path, vocab_bpe: Path):
    speeches = [f"SPEAKER {number}:{end}Line one,{end}  line two." for number in range(80)]
    text = f"{end} {end}" + f"{end}{end}  {end}".join(speeches) + end
    (tmp_path / "play.txt").write_bytes(text.encode())
    flags = ("--source.text_documents=blocks",)
    prepare_set(str(tmp_path / "play.txt"), str(tmp_path / "set"), vocab_bpe, *flags)
    assert both_splits(str(tmp_path / "set")) == encoded(speeches, vocab_bpe)
    assert manifest.read(str(tmp_path / "set")).splits["val"].documents > 0


def test_compressed_text_is_one_document(tmp_path: Path, vocab_bpe: Path):
    (tmp_path / "poem.txt.gz").write_bytes(pa.compress(b"Roses\n\nare red", "gzip", asbytes=True))
    prepare_set(str(tmp_path / "poem.txt.gz"), str(tmp_path / "set"), vocab_bpe, "--data.val_fraction=0")
    assert both_splits(str(tmp_path / "set")) == encoded(["Roses\n\nare red"], vocab_bpe)


def test_a_text_that_is_too_long_for_one_document(tmp_path: Path, vocab_bpe: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("data_prep.sources.text.LARGEST_DOCUMENT_BYTES", 10)
    (tmp_path / "a.txt").write_text("a long text\n\nin two blocks")
    with pytest.raises(DataError, match=r"a document of more than 10 bytes; set --source\.text_documents=blocks"):
        prepare_set(str(tmp_path / "a.txt"), str(tmp_path / "set"), vocab_bpe)


# --- what is wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.csv", b"text,n\na,1\nb,2,3\n", r"a\.csv: cannot be read as csv .*Expected 2 fields in line 3, saw 3"),
        ("a.csv", b"text\n\xff\xfe\n", r"a\.csv: cannot be read as csv .*can't decode"),
        ("a.arrow", b"no arrow file", r"a\.arrow: cannot be read as arrow"),
        ("a.tar", b"no archive" * 200, r"a\.tar: cannot be read as webdataset"),
        ("a.csv.gz", b"no gzip", r"a\.csv\.gz: cannot be decompressed .*copy it again"),
        ("a.json", b"[1, 2", r"a\.json: cannot be read as json"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(name: str, data: bytes, message: str, tmp_path: Path, vocab_bpe: Path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message) as caught:
        prepare_set(str(tmp_path / name), str(tmp_path / "set"), vocab_bpe)
    assert "\n" not in str(caught.value)


def test_a_json_document_that_is_too_long(tmp_path: Path, vocab_bpe: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("data_prep.sources.json_files.LARGEST_DOCUMENT_BYTES", 100)
    (tmp_path / "a.json").write_text(json.dumps(rows(documents(9))))
    with pytest.raises(DataError, match=r"more than 100; write it as JSON lines: jq -c '\.\[\]' FILE"):
        prepare_set(str(tmp_path / "a.json"), str(tmp_path / "set"), vocab_bpe)


def test_a_bucket_that_fails_in_the_middle_is_the_buckets_fault(
    tmp_path: Path, vocab_bpe: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1000)
    source = write(tmp_path, "a.csv", TEXTS)
    read = storage.read_range

    def fails(uri: str, start: int, end: int) -> bytes:
        if start == 2000:
            raise StorageError(f"{uri}: may not read")
        return read(uri, start, end)

    monkeypatch.setattr(storage, "read_range", fails)
    with pytest.raises(StorageError, match=r"a\.csv: may not read$"):
        prepare_set(str(source), str(tmp_path / "set"), vocab_bpe)


def test_a_later_file_without_rows_or_with_other_columns(tmp_path: Path, vocab_bpe: Path):
    write(tmp_path / "source", "a.csv", TEXTS)
    (tmp_path / "source/b.csv").write_text("id,text\n")
    prepare_set(str(tmp_path / "source/*.csv"), str(tmp_path / "set"), vocab_bpe)
    assert both_splits(str(tmp_path / "set")) == encoded(TEXTS, vocab_bpe)
    (tmp_path / "source/c.csv").write_text("id,words\n1,a\n")
    with pytest.raises(DataError, match=r"c\.csv: has no column 'text', only id, words"):
        prepare_set(str(tmp_path / "source/*.csv"), str(tmp_path / "other"), vocab_bpe)


# --- web servers ---------------------------------------------------------------------------------------------------


class _Files(http.server.SimpleHTTPRequestHandler):
    """Byte ranges of the files of a folder; below /whole/, none, as Python's own server; the first answer is 503."""

    ranges = 0

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.path = self.path.partition("?")[0]
        wanted = self.headers.get("Range")
        if self.path.startswith("/whole/"):
            self.path = self.path.removeprefix("/whole")
            super().do_GET()
        elif wanted and Path(self.translate_path(self.path)).is_file():
            _Files.ranges += 1
            if _Files.ranges == 1:
                self.send_error(503)
                return
            data = Path(self.translate_path(self.path)).read_bytes()
            start, _, end = wanted.removeprefix("bytes=").partition("-")
            piece = data[int(start) : int(end) + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{int(start) + len(piece) - 1}/{len(data)}")
            self.send_header("Content-Length", str(len(piece)))
            self.end_headers()
            self.wfile.write(piece)
        else:
            super().do_GET()


@pytest.fixture
def server(tmp_path: Path):
    (tmp_path / "web").mkdir()
    handler = functools.partial(_Files, directory=str(tmp_path / "web"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as found:
        threading.Thread(target=found.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{found.server_port}"
        found.shutdown()


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet", "tar"])
def test_files_on_a_web_server(suffix: str, server: str, tmp_path: Path, vocab_bpe: Path):
    write(tmp_path / "web", f"a.{suffix}", TEXTS)
    prepare_set(f"{server}/a.{suffix}?download=true", str(tmp_path / "set"), vocab_bpe)
    assert both_splits(str(tmp_path / "set")) == encoded(TEXTS, vocab_bpe)


def test_a_text_on_a_web_server(server: str, tmp_path: Path, vocab_bpe: Path):
    """As Tiny Shakespeare is published."""
    (tmp_path / "web/input.txt").write_text("\n\n".join(documents(80)))
    prepare_set(f"{server}/input.txt", str(tmp_path / "set"), vocab_bpe, "--source.text_documents=blocks")
    assert both_splits(str(tmp_path / "set")) == encoded(documents(80), vocab_bpe)


def test_a_web_server_without_ranges(server: str, tmp_path: Path, vocab_bpe: Path, monkeypatch: pytest.MonkeyPatch):
    write(tmp_path / "web", "a.csv", TEXTS)
    prepare_set(f"{server}/whole/a.csv", str(tmp_path / "set"), vocab_bpe)
    assert both_splits(str(tmp_path / "set")) == encoded(TEXTS, vocab_bpe)
    write(tmp_path / "web", "b.csv", TEXTS)
    monkeypatch.setattr(web, "WHOLE_BYTES", 100)
    with pytest.raises(StorageError, match=r"sends no byte ranges; download it \(curl -LO http"):
        prepare_set(f"{server}/whole/b.csv", str(tmp_path / "other"), vocab_bpe)


def test_what_a_web_server_does_not_have(server: str, tmp_path: Path, vocab_bpe: Path):
    with pytest.raises(ObjectNotFound, match=r"/none\.csv: not found; check the URL"):
        prepare_set(f"{server}/none.csv", str(tmp_path / "set"), vocab_bpe)
    with pytest.raises(DataError, match=r"web servers cannot list files, so a wildcard does not work"):
        prepare_set(f"{server}/*.csv", str(tmp_path / "set"), vocab_bpe)
