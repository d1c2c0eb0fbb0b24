"""What litdata optimised, in a folder and as at a URL: order, resume, a killed run, damage. Without a network."""

import importlib.util
import json
import shutil
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from nestlm.config.compose import build, compose
from nestlm.data.sources.litdata import LitdataStream
from nestlm.errors import ConfigError, DataError
from plugins import NANO
from processes import kill_when
from streams import HELD_OUT, check_order_and_resume, hundred_texts, optimise

pytestmark = pytest.mark.skipif(importlib.util.find_spec("litdata") is None, reason="needs the package litdata")

TRAIN = Path(__file__).parents[2] / "train.py"


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    has_zstd = importlib.util.find_spec("zstd") is not None
    wanted = {
        "texts": hundred_texts(),
        "dictionaries": [{"text": "one", "number": 1}, {"text": "two", "number": 2}],
        "packed": ["one", "two"] * 10,
    }
    return optimise(wanted, tmp_path_factory.mktemp("litdata"), *["packed"] * has_zstd)


@pytest.fixture(scope="module")
def optimised(datasets: Path) -> Path:
    return datasets / "texts"


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The system's temporary folder, of this test only."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def stream(path: Path | str, **changes) -> LitdataStream:
    return LitdataStream(
        str(path), **{"heldout_documents": HELD_OUT, "cache_size": "25GB", "text_key": "text"} | changes
    )


@pytest.mark.parametrize("prefix", ["", "local:"])  # litdata's mock of a URL
def test_the_order_is_the_streams_and_a_resume_on_other_ranks_sees_each_token_once(
    prefix, optimised, tmp_path, temporary, monkeypatch
):
    monkeypatch.setenv("WORLD_SIZE", "3")  # ranks as litdata sees them: it would deal the items out
    monkeypatch.setenv("GLOBAL_RANK", "1")
    source = stream(f"{prefix}{optimised}")
    expected = [(number, text) for number, text in enumerate(hundred_texts()) if text.strip()]
    for start in (0, 1, 6, 7, 8, 69, 70, 98, 99, 100):
        assert list(source.numbered_texts(start)) == expected[start - (start > 70) :]
    check_order_and_resume(source, tmp_path)
    reading = source.numbered_texts(0)
    assert next(reading) == expected[0]
    reading.close()
    assert "PrepareChunksThread" not in {type(thread).__name__ for thread in threading.enumerate()}
    assert not list(temporary.iterdir()), "no chunk is left behind, also where reading ends early"


def test_a_killed_run_goes_on_at_its_token(run, optimised, tmp_path):
    settings = [
        "data=litdata", f"data.path=local:{optimised}", f"data.source.heldout_documents={HELD_OUT}", "budget=0.8",
        "router=uniform", "pretrain.steps=60", "checkpoint_seconds=0.01",
    ]  # fmt: skip
    whole, cache = run(*settings, cache=tmp_path / "other"), tmp_path / "cache"
    arguments = [sys.executable, str(TRAIN), *NANO, *settings, f"run_dir={tmp_path / 'killed'}", f"cache_dir={cache}"]
    kill_when(arguments, lambda: list(cache.glob("pretrain-*/checkpoints/*.ckpt")))
    assert not list(cache.glob("elastic-*"))
    again = run(*settings, name="again", cache=cache)
    assert (again / "results.csv").read_bytes() == (whole / "results.csv").read_bytes()
    with pytest.raises(DataError, match="no more than its 100 held-out documents"):
        run(*settings, "data.source.heldout_documents=100", name="short")
    with pytest.raises(ConfigError, match=r"data\.num_workers: got 2, wanted none"):
        build(compose([*NANO, *settings, "+data.num_workers=2"]))


def test_a_dataset_that_changed_is_another_one(optimised, datasets, tmp_path):
    copied = Path(shutil.copytree(optimised, tmp_path / "copied"))
    assert stream(copied).identity() == stream(optimised).identity() == stream(f"local:{optimised}").identity()
    assert stream(datasets / "dictionaries").identity() != stream(optimised).identity()


def test_a_compressed_folder_is_not_unpacked_in_place(datasets):
    pytest.importorskip("zstd", reason="needs the package zstd")
    before = sorted((datasets / "packed").iterdir())
    assert before[0].name.endswith(".zstd.bin")
    assert [text for _, text in stream(datasets / "packed").numbered_texts(2)] == ["one", "two"] * 9
    assert sorted((datasets / "packed").iterdir()) == before


def test_what_is_no_text_or_damaged_is_named(optimised, datasets, tmp_path):
    def error(path: Path | str, **changes) -> str:
        with pytest.raises(DataError) as raised:
            list(stream(path, **changes).numbered_texts(0))
        return str(raised.value)

    assert "holds no index.json" in error(tmp_path / "absent")
    assert "cannot open local:/nowhere (FileNotFoundError" in error("local:/nowhere")
    folder = datasets / "dictionaries"
    assert [text for _, text in stream(folder).numbered_texts(0)] == ["one", "two"]
    assert "item 0 is a dict with 'text', 'number'; wanted text" in error(folder, text_key="content")
    assert "item 0 is a dict" in error(folder, text_key="number")
    damaged = Path(shutil.copytree(optimised, tmp_path / "damaged"))
    chunk = damaged / "chunk-0-3.bin"
    chunk.write_bytes(chunk.read_bytes()[:100])
    assert f"cannot read item 21 of {damaged}" in error(damaged)
    (damaged / "index.json").write_text("{")
    assert "cannot read the index of" in error(damaged)


def test_items_that_run_code_and_chunks_elsewhere_are_refused(optimised, tmp_path):
    def error(folder: Path) -> str:
        with pytest.raises(DataError) as raised:
            list(stream(folder).numbered_texts(0))
        return str(raised.value)

    def change(**changes) -> Path:
        folder = Path(shutil.copytree(optimised, tmp_path / f"copy{len(list(tmp_path.iterdir()))}"))
        index = json.loads((folder / "index.json").read_text())
        index["config"] |= changes.pop("config", {})
        index["chunks"][0] |= changes
        (folder / "index.json").write_text(json.dumps(index))
        return folder

    assert "format 'pickle'" in error(change(config={"data_format": ["pickle"]}))
    assert "format 'graph'" in error(change(config={"data_format": ["graph:pickle"]}))
    for name in ("../chunk-0-0.bin", str(optimised / "chunk-0-0.bin"), "..", "sub/chunk-0-0.bin"):
        assert "names the chunk" in error(change(filename=name))
