"""Folders of text: each file is read once or named as left out; hidden files are skipped."""

import bz2
import gzip
import json
import lzma
import os
from pathlib import Path

import pytest

from nestlm.data.preparation import prepare_source
from nestlm.data.sources.auto import source_from_path
from nestlm.data.sources.base import Document
from nestlm.data.sources.text import TextFolder
from nestlm.errors import DataError
from nestlm.utils import console

LINES = '{"text": "one\\nline"}\n{"text": "two"}\n'


@pytest.fixture(autouse=True)
def printed_again() -> None:
    console.print_once.cache_clear()


def texts(folder: Path, **options) -> dict[str, str]:
    return dict(TextFolder(str(folder), **options).documents())


def test_every_format_by_its_suffix_in_any_case(tmp_path, capsys):
    content = {
        "a.txt": b"\xef\xbb\xbfmarked",
        "B.TXT": b"capitals",
        "c.ndjson": LINES.encode(),
        "D.JSONL": b"\xef\xbb\xbf" + LINES.encode(),
        "e.json": json.dumps([{"text": "of an object"}, "alone"]).encode(),
        "f.json": json.dumps({"text": "the only one"}).encode(),
        "g.csv": b'\xef\xbb\xbfid,text\r\n1,"a ""quoted"", text\r\nof two lines"\r\n2,\r\n3\r\n4,last\r\n',
        "h.csv": ("text\n" + "long " * 60_000).encode(),
        "i.jsonl.xz": lzma.compress(LINES.encode()),
        "j.txt.bz2": bz2.compress(b"packed"),
        "K.CSV.GZ": gzip.compress(b"text\nin a table"),
        "empty.txt": b"",
    }
    for name, data in content.items():
        (tmp_path / name).write_bytes(data)
    both = {":1": "one\nline", ":2": "two"}
    assert texts(tmp_path) == {
        "a.txt": "marked",
        "B.TXT": "capitals",
        **{f"{name}{number}": text for name in ("c.ndjson", "D.JSONL", "i.jsonl.xz") for number, text in both.items()},
        "e.json:1": "of an object",
        "e.json:2": "alone",
        "f.json:1": "the only one",
        "g.csv:1": 'a "quoted", text\r\nof two lines',
        "g.csv:4": "last",
        "h.csv:1": "long " * 60_000,
        "j.txt.bz2": "packed",
        "K.CSV.GZ:1": "in a table",
    }
    assert capsys.readouterr().err == ""


def test_what_is_left_out_is_printed_once_in_one_line(tmp_path, capsys):
    (tmp_path / "good.txt").write_text("good")
    for name in ("page.html", "other.html", "archive.tar.gz", "LICENSE"):
        (tmp_path / name).write_text("text")
    (tmp_path / "settings.json").write_text('{"size": 3, "names": ["a"]}')
    (tmp_path / "numbers.csv").write_text("a,b\n1,2\n")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere.txt")
    (tmp_path / "loop.txt").symlink_to(tmp_path / "loop.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    for _ in range(2):
        assert texts(tmp_path) == {"good.txt": "good"}
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"data: left out of {tmp_path}: 2 .html, 1 .tar.gz, 1 without a suffix, gone.txt (a link to nowhere), "
        "loop.txt (a link to nowhere), numbers.csv (no column 'text'), pipe.txt (no file), "
        "settings.json (no 'text' in it)"
    )
    (tmp_path / "good.txt").unlink()
    for name in ("settings.json", "numbers.csv"):
        with pytest.raises(DataError, match=rf"{name}: no .*'text'.*; name the one with the text \(text_key\)"):
            texts(tmp_path / name)
        (tmp_path / name).unlink()
    with pytest.raises(DataError, match=r"holds no \.txt, .* file; put some text there; left out: 2 \.html"):
        texts(tmp_path)


def test_hidden_files_are_not_read_and_links_are_followed_once(tmp_path, capsys):
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    for folder in (root / ".git", root / "inner/.ipynb_checkpoints", elsewhere / ".hidden", root / ".blobs"):
        folder.mkdir(parents=True)
        (folder / "secret.txt").write_text("secret")
    (root / ".note.txt").write_text("secret")
    (root / "inner/a.txt").write_text("a")
    (elsewhere / "b.txt").write_text("b")
    (elsewhere / "up").symlink_to(root)
    (root / "again.txt").symlink_to(root / "inner/a.txt")
    (root / "books").symlink_to(elsewhere)
    (root / "same").symlink_to(elsewhere)
    (root / "inner/round").symlink_to(root / "inner")
    (root / "blob.txt").symlink_to(root / ".blobs/1f")
    (root / ".blobs/1f").write_text("of a download cache")
    (root / "late.txt").symlink_to(tmp_path / "z/late.txt")
    (tmp_path / "z").mkdir()
    (tmp_path / "z/late.txt").write_text("late")
    (root / "zlink").symlink_to(tmp_path / "z")
    assert texts(root) == {
        "inner/a.txt": "a",
        "books/b.txt": "b",
        "blob.txt": "of a download cache",
        "late.txt": "late",
    }
    assert capsys.readouterr().err == ""


def test_names_that_are_no_utf8(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(6):
        (folder / f"\udcff\udcfe{number}.txt").write_text(f"the cat and the hat {number}. " * 40)
    documents = texts(tmp_path / "texts")
    assert sorted(documents) == [f"\\xff\\xfe{number}.txt" for number in range(6)]
    (tmp_path / "out").mkdir()
    source = TextFolder(str(tmp_path / "texts"))
    manifest = prepare_source(source, tmp_path / "out", vocab_size=270, tokenizer_file=None, heldout_share=0.2)
    assert sum(split.documents for split in manifest.splits.values()) == 6
    (folder / "\udcff.txt").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"cannot read \\xff\.txt \('utf-8' codec") as found:
        texts(tmp_path / "texts")
    str(found.value).encode()


DAMAGES = {
    "a.txt": ("wide".encode("utf-16"), "a.txt .it begins as UTF-16 does.; wanted UTF-8"),
    "b.txt": ("wide".encode("utf-16-le"), "b.txt holds NUL characters, as binary files and UTF-16 do"),
    "c.md": (b"caf\xe9", "cannot read c.md"),
    "d.jsonl": (b"[" * 100_000, "d.jsonl line 1 is not"),
    "e.jsonl": (b'{"text": "\\ud800' + b"a" * 500 + b'"}', "e.jsonl line 1 .*surrogates not allowed"),
    "f.jsonl": (b'{"text": ["' + b"a" * 500 + b'"]}', "f.jsonl line 1 .*text is"),
    "g.json": (b"[" * 100_000, "g.json is no JSON"),
    "h.json": (b'[{"text": "a"}, {"txt": "b"}]', "h.json element 2 holds no text .no 'text'"),
    "i.json": (b"[1" + b"1" * 5000 + b"]", "i.json is no JSON"),
    "j.csv": (b'text\n"never closed', "j.csv line .* is no CSV"),
    "l.txt.bz2": (b"BZh9 damaged", "cannot read .*l.txt.bz2"),
    "m.txt.xz": (lzma.compress(b"text" * 999)[:40], "cannot read .*m.txt.xz"),
    "n.txt.xz": (b"no archive at all", "cannot read .*n.txt.xz"),
    "o.json.gz": (gzip.compress(b"[" + b"1," * 99 + b"2]")[:-12], "cannot read .*o.json.gz"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_files_are_named_in_one_short_line(name, tmp_path):
    content, message = DAMAGES[name]
    (tmp_path / name).write_bytes(content)
    for place in (tmp_path, tmp_path / name):
        with pytest.raises(DataError, match=message) as found:
            texts(place)
        assert len(str(found.value)) < 300 + len(str(tmp_path))
        assert "\n" not in str(found.value)


def test_damaged_and_odd_parquet_is_named(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    wrong = arrow.Array.from_buffers(
        arrow.string(), 2, [None, arrow.py_buffer(b"\0\0\0\0\2\0\0\0\4\0\0\0"), arrow.py_buffer(b"ab\xff\xfe")]
    )
    parquet.write_table(arrow.table({"text": wrong}), tmp_path / "bytes.parquet")
    parquet.write_table(arrow.table({"text": [["a" * 500]]}), tmp_path / "list.parquet")
    (tmp_path / "EMPTY.PARQUET").write_bytes(b"")
    for name in ("bytes.parquet", "list.parquet", "EMPTY.PARQUET"):
        with pytest.raises(DataError, match=name) as found:
            texts(tmp_path / name)
        assert len(str(found.value)) < 250
    parquet.write_table(
        arrow.table({"text": arrow.array(["a", None, "b"]).dictionary_encode()}), tmp_path / "c.parquet"
    )
    assert texts(tmp_path / "c.parquet") == {"c.parquet:1": "a", "c.parquet:3": "b"}


def as_named(path: str) -> list[Document]:
    """Read the documents of the source that `data.path=PATH` chooses."""
    source = source_from_path(path)
    assert isinstance(source, TextFolder)
    return list(source.documents())


def test_what_cannot_be_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner/a.txt").write_text("a")
    real = os.scandir

    def scandir(path):
        if Path(path).name == "inner":
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match=r"cannot read the folder .*inner \(Permission denied\)"):
        texts(tmp_path)
    for path in ("a" * 5000, str(tmp_path / "absent"), str(tmp_path / "nul\0")):
        with pytest.raises(DataError, match=r"data.path: .* wanted") as found:
            as_named(path)
        assert len(str(found.value)) < 300 + len(str(tmp_path))
