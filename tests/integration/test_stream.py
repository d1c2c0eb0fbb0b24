"""A stream: its own order for any number of ranks, exact resume, and a run that trains on it. Without a network."""

import json
from pathlib import Path

import numpy as np
import pytest

from nestlm.compose import build, compose
from nestlm.data.prepare import prepare
from nestlm.data.source.hub import HubStream
from nestlm.data.source.synthetic import Synthetic
from nestlm.data.stream import StreamLoader
from nestlm.data.tokenizer import for_texts, load, separator_id
from nestlm.errors import ConfigError, DataError
from nestlm.parallel.ranks import ALONE, Share
from plugins import NANO

datasets = pytest.importorskip("datasets")

HELD_OUT, LENGTH, BATCH = 60, 32, 6


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "texts"
    folder.mkdir()
    documents = [text for _, text in Synthetic(num_documents=100, num_words=60, seed=0).documents()]
    documents[70] = " "  # no document
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return folder


def loader(source: HubStream, tokenizer: Path, *, num_steps: int, share: Share = ALONE) -> StreamLoader:
    loaded = load(tokenizer)
    return StreamLoader(
        source, for_texts(loaded), num_steps=num_steps, batch_size=BATCH, sequence_length=LENGTH,
        document_separator=separator_id(loaded), separate_documents=False, share=share,
    )  # fmt: skip


def test_the_order_is_the_streams_and_a_resume_on_other_ranks_sees_each_token_once(texts, tmp_path):
    source = HubStream(str(texts), heldout_documents=HELD_OUT)
    prepare(source, tmp_path, vocab_size=288, tokenizer_file=None, heldout_share=0.4)
    tokenizer = tmp_path / "tokenizer.json"
    encoder = for_texts(load(tokenizer))
    once = [
        token
        for _, text in source.numbered(HELD_OUT)
        for token in [0, *encoder.encode(text, add_special_tokens=False).ids]
    ]
    num_steps = int(1.5 * len(once) / (BATCH * LENGTH))
    assert num_steps > 10
    seen, state = [], {"next_step": 0, "number": HELD_OUT, "offset": 0}
    for world_size, stop in ((2, 3), (3, 7), (1, num_steps)):
        ranks = [loader(source, tokenizer, num_steps=stop, share=Share(r, world_size)) for r in range(world_size)]
        for rank in ranks:
            rank.load_state_dict(state)
        for batches in zip(*ranks, strict=True):
            rows = np.empty((BATCH, LENGTH), dtype=np.int64)
            for number, batch in enumerate(batches):
                rows[number::world_size] = batch.tokens_BL.numpy()
            seen += rows.flatten().tolist()
        states = [rank.state_dict() for rank in ranks]
        state = states[0]
        assert states == [state] * world_size
        assert state["next_step"] == stop
    assert seen == (once + once)[: num_steps * BATCH * LENGTH], "and begins again behind the held-out documents"


def test_a_run_on_a_stream(run, texts):
    stream = ["data=hf_streaming", f"data.path={texts}", f"data.source.heldout_documents={HELD_OUT}"]
    assert (run(*stream, "budget=0.8") / "results.csv").read_text().count("\n") == 3
    with pytest.raises(DataError, match="no more than its 100 held-out documents"):
        run(*stream[:2], "data.source.heldout_documents=100", "budget=0.8", name="short")
    with pytest.raises(ConfigError, match=r"data\.num_workers: got 2, wanted 0"):
        build(compose([*NANO, *stream, "data.num_workers=2"]))


def test_a_stream_that_changed_is_another_one(texts):
    source = HubStream(str(texts), heldout_documents=HELD_OUT)
    before = source.identity()
    assert before == source.identity()
    with (texts / "train.jsonl").open("a") as file:
        file.write('{"text": "more"}\n')
    assert source.identity() != before
