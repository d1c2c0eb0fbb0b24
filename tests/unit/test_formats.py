"""What texts are read from: every format gives the same documents, and a damaged file is named."""

import gzip
import json
import sys
from pathlib import Path

import pytest

from nestlm.data.sources.auto import source_from_path
from nestlm.data.sources.hub import HubDataset
from nestlm.data.sources.shards import Shards
from nestlm.data.sources.stdlib import Stdlib
from nestlm.data.sources.text import TextFolder
from nestlm.errors import DataError

TEXTS = [f"document {number} of several ☕\nwith\u2028odd breaks " + "and more " * number for number in range(300)]
LINES = "".join(json.dumps({"id": number, "text": text}) + "\n" for number, text in enumerate(TEXTS)).encode()


def write(folder: Path, ending: str) -> Path:
    """All texts in one file; of more than one frame where it is packed with zstandard."""
    path = folder / f"texts{ending}"
    if ending == ".jsonl":
        path.write_bytes(LINES)
    elif ending == ".jsonl.gz":
        path.write_bytes(gzip.compress(LINES, mtime=0))
    elif ending == ".jsonl.zst":
        zstandard = pytest.importorskip("zstandard")
        middle = len(LINES) // 2
        pack = zstandard.ZstdCompressor().compress
        path.write_bytes(pack(LINES[:middle]) + pack(LINES[middle:]))
    else:
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        table = pyarrow.table({"id": list(range(len(TEXTS))), "text": TEXTS})
        parquet.write_table(table, path, row_group_size=100)
    return path


ENDINGS = [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"]


@pytest.mark.parametrize("ending", ENDINGS)
def test_each_format_gives_the_same_documents(ending, tmp_path):
    path = write(tmp_path, ending)
    for place in (tmp_path, path):
        documents = list(TextFolder(str(place)).documents())
        assert [text for _, text in documents] == TEXTS
        assert [name for name, _ in documents] == [f"texts{ending}:{number}" for number in range(1, 301)]
    with pytest.raises(DataError, match=r"text_key"):
        list(TextFolder(str(path), text_key="body").documents())
    with pytest.raises(DataError, match="id is 0"):
        list(TextFolder(str(path), text_key="id").documents())


@pytest.mark.parametrize("ending", ENDINGS[1:])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9, 0.999])
def test_a_file_that_is_cut_short_is_named(ending, share, tmp_path):
    path = write(tmp_path, ending)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(DataError, match=rf"cannot read .*texts{ending}"):
        list(TextFolder(str(tmp_path)).documents())


@pytest.mark.parametrize("ending", ENDINGS[1:])
def test_a_file_of_something_else_is_named(ending, tmp_path):
    (tmp_path / f"texts{ending}").write_bytes(b"something else, and enough of it to look at twice")
    with pytest.raises(DataError, match=rf"cannot read .*texts{ending}"):
        list(TextFolder(str(tmp_path)).documents())


def test_packed_text_files_are_documents(tmp_path):
    (tmp_path / "one.txt.gz").write_bytes(gzip.compress(b"one\r\ntwo"))
    (tmp_path / "two.md").write_text("three")
    assert list(TextFolder(str(tmp_path)).documents()) == [("one.txt.gz", "one\ntwo"), ("two.md", "three")]


@pytest.mark.parametrize(("ending", "package"), [(".jsonl.zst", "zstandard"), (".parquet", "pyarrow")])
def test_a_package_that_is_missing_is_named_with_its_extra(ending, package, tmp_path, monkeypatch):
    (tmp_path / f"texts{ending}").write_bytes(b"")
    for name in [package, *(name for name in sys.modules if name.startswith(f"{package}."))]:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "meta_path", [Hidden(package), *sys.meta_path])
    with pytest.raises(DataError, match=rf"package {package}, which is not installed; pip install 'nestlm\[data\]'"):
        list(TextFolder(str(tmp_path)).documents())


class Hidden:
    """Makes a package look absent."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == self.package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=self.package)


def test_a_local_folder_of_the_hubs_library(tmp_path, monkeypatch):
    """Without a network."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(LINES)
    for name in (str(folder), f"{folder}::train"):
        documents = list(HubDataset(name).documents())
        assert [text for _, text in documents] == TEXTS
        assert len({name for name, _ in documents}) == len(TEXTS)
    with pytest.raises(DataError, match=r"no column 'body'; it has id, text"):
        list(HubDataset(str(folder), text_key="body").documents())
    with pytest.raises(DataError, match="cannot load hf:"):
        list(HubDataset(f"{folder}::absent").documents())


def test_the_source_is_what_the_path_is(tmp_path):
    assert source_from_path(None) == Stdlib()
    assert source_from_path("hf:owner/name:en") == HubDataset("owner/name:en")
    assert source_from_path(str(tmp_path)) == TextFolder(str(tmp_path))
    (tmp_path / "journal.json").write_text("{}")
    assert source_from_path(str(tmp_path)) == Shards(str(tmp_path)), "one that is not finished is no text"
