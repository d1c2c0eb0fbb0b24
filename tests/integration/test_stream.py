"""A Hugging Face stream: its own order for any number of ranks, exact resume, a run on it. Without a network."""

import json
import shutil
from pathlib import Path

import pytest

import nestlm
from nestlm.config.compose import build, compose
from nestlm.data.sources.hub import HubStream
from nestlm.errors import ConfigError, DataError
from plugins import NANO
from streams import HELD_OUT, check_order_and_resume, hundred_texts

datasets = pytest.importorskip("datasets")


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in hundred_texts()))
    return folder


def test_the_order_is_the_streams_and_a_resume_on_other_ranks_sees_each_token_once(texts, tmp_path):
    check_order_and_resume(HubStream(str(texts), heldout_documents=HELD_OUT), tmp_path)


def test_a_run_on_a_stream(run, texts):
    stream = ["data=hf_streaming", f"data.path={texts}", f"data.source.heldout_documents={HELD_OUT}"]
    finished = run(*stream, "budget=0.8")
    assert (finished / "results.csv").read_text().count("\n") == 3
    with pytest.raises(DataError, match="no more than its 100 held-out documents"):
        run(*stream[:2], "data.source.heldout_documents=100", "budget=0.8", name="short")
    with pytest.raises(ConfigError, match=r"data\.num_workers: got 2, wanted none"):
        build(compose([*NANO, *stream, "+data.num_workers=2"]))
    with pytest.raises(ConfigError, match=r"data\.source\.heldout_documents: got 0"):
        build(compose([*NANO, *stream[:2], "data.source.heldout_documents=0"]))
    shutil.rmtree(texts)
    model = nestlm.load(finished)
    assert model.evaluate([0.8])[0]["val_loss"] > 0
    assert model.generate("the cat", max_tokens=2), "nothing of it needs the stream"


def test_a_stream_that_changed_is_another_one(texts):
    source = HubStream(str(texts), heldout_documents=HELD_OUT)
    before = source.identity()
    assert before == source.identity()
    with (texts / "train.jsonl").open("a") as file:
        file.write('{"text": "more"}\n')
    assert source.identity() != before
