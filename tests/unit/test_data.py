"""Packing, splits, order, and the loader's state."""

import math
from collections import Counter
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch

from models import decoder_config, random_decoder
from nestlm.data.document_scan import DocumentScan
from nestlm.data.manifest import SPLITS, Manifest
from nestlm.data.packed_rows import PackedRows
from nestlm.data.preparation import prepare_source
from nestlm.data.sources.base import Document
from nestlm.data.sources.synthetic import Synthetic
from nestlm.data.sources.text import TextFolder
from nestlm.data.step_loader import StepLoader, collate_rows, rows_of_step
from nestlm.data.tokenizer import load_tokenizer
from nestlm.distributed.collectives import RowShard
from nestlm.errors import DataError

SOURCE = Synthetic(num_documents=60, num_words=100, seed=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data")
    prepare_source(SOURCE, path, vocab_size=288, tokenizer_file=None, heldout_share=0.1)
    return path


def tokens_of(folder: Path, split: str) -> np.ndarray:
    manifest = Manifest.read(folder)
    return np.concatenate([np.fromfile(folder / shard.name, manifest.dtype) for shard in manifest.splits[split].shards])


def test_tokens_decode_to_the_documents(folder):
    manifest, tokenizer = Manifest.read(folder), load_tokenizer(folder / "tokenizer.json")
    for split in ("train", "calibration", "validation"):
        tokens = tokens_of(folder, split)
        texts = tokenizer.decode(tokens.tolist(), skip_special_tokens=False).split("<|endoftext|>")[1:]
        assert len(texts) == manifest.splits[split].documents
        assert set(texts) <= {text for _, text in SOURCE.documents()}
        assert sum(len(text.encode()) for text in texts) == manifest.splits[split].bytes
        assert len(tokens) == manifest.splits[split].tokens


def test_splits_are_disjoint_and_stable():
    documents = [Document(f"file{number}", "x" * 100) for number in range(50)] + [Document("huge", "x" * 5000)]

    def split_of(documents: list[Document]) -> dict[str, str]:
        codes = DocumentScan.of(documents).splits(heldout_share=0.05)
        return {name: SPLITS[code] for (name, _), code in zip(documents, codes, strict=True)}

    splits = split_of(documents)
    assert Counter(splits.values()) == {"train": 41, "calibration": 5, "validation": 5}
    assert splits["huge"] == "train"
    assert split_of(documents[::-1]) == splits
    by_hash = sorted((name for name in splits if name != "huge"), key=lambda name: sha256(name.encode()).digest())
    assert [splits[name] for name in by_hash[:11]] == ["validation"] * 5 + ["calibration"] * 5 + ["train"]


@pytest.mark.parametrize(
    ("sizes", "heldout_share"),
    [([100_000] + [250] * 60, 0.1), ([10, 10, 10], 0.4), ([900, 50, 50], 0.3), ([5] * 4 + [10_000] * 3, 0.49)],
)
def test_large_documents_leave_something_to_train_on(sizes, heldout_share, capsys):
    documents = [Document(f"file{number}", "x" * size) for number, size in enumerate(sizes)]
    splits = DocumentScan.of(documents).splits(heldout_share=heldout_share)
    held = [sum(size for size, split in zip(sizes, splits, strict=True) if split == code) for code in (0, 1, 2)]
    assert min(held) > 0
    assert splits[np.argmax(sizes)] == 0 or sizes == [10, 10, 10]
    said = capsys.readouterr().err
    assert f"instead of {heldout_share} (heldout_share)" in said or sizes == [10, 10, 10]


def test_too_few_documents_to_split():
    for number in range(3):
        documents = [Document(str(each), "text") for each in range(number)]
        with pytest.raises(DataError, match=rf"got {number} documents, wanted at least 3: .*cut the text"):
            DocumentScan.of(documents).splits(heldout_share=0.1)
    assert set(DocumentScan.of([Document("one", "text")]).splits(heldout_share=None)) == {SPLITS.index("validation")}


def test_preparing_twice_gives_the_same_bytes(folder, tmp_path):
    prepare_source(SOURCE, tmp_path, vocab_size=288, tokenizer_file=None, heldout_share=0.1)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {p.name: p.read_bytes() for p in folder.iterdir()}


def test_rows_overlap_by_one_token(folder):
    rows = PackedRows(folder, "train", sequence_length=16)
    assert all(rows[index][-1] == rows[index + 1][0] for index in range(len(rows) - 1))
    assert all(len(rows[index]) == 17 for index in range(len(rows)))


def test_an_epoch_visits_each_row_once_and_the_next_differs(folder):
    rows = PackedRows(folder, "calibration", sequence_length=16)
    rows.row_ends = np.array([12])
    order = [rows_of_step(step, rows=rows, batch_size=4, seed=0, stream="x") for step in range(6)]
    for epoch in (order[:3], order[3:]):
        assert sorted(row for rows in epoch for row in rows) == list(range(12))
    assert order[:3] != order[3:]
    assert rows_of_step(0, rows=rows, batch_size=4, seed=1, stream="x") != order[0]
    assert rows_of_step(0, rows=rows, batch_size=4, seed=0, stream="y") != order[0]


def loader(folder: Path, **changes) -> StepLoader:
    arguments = {"num_steps": 6, "batch_size": 4, "seed": 0, "stream": "t", "separator": 0} | changes
    return StepLoader(PackedRows(folder, "train", sequence_length=16), **arguments)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resume_is_exact(folder, num_workers):
    whole = [batch.tokens_BL for batch in loader(folder, num_workers=num_workers)]
    first, second = loader(folder, num_workers=num_workers), loader(folder)
    seen = [batch.tokens_BL for batch, _ in zip(first, range(2), strict=False)]
    assert first.state_dict() == {"next_step": 3}, "zip has fetched a third batch to find its end"
    second.load_state_dict({"next_step": 2})
    seen += [batch.tokens_BL for batch in second]
    assert len(seen) == len(whole) == 6
    assert all(torch.equal(one, other) for one, other in zip(seen, whole, strict=True))


def test_ranks_share_each_step_without_overlap(folder):
    whole = list(loader(folder))
    ranks = [list(loader(folder, row_shard=RowShard(rank, 2))) for rank in range(2)]
    for step, batch in enumerate(whole):
        parts = torch.stack([rank[step].tokens_BL for rank in ranks], dim=1).flatten(0, 1)
        assert torch.equal(parts, batch.tokens_BL)


def test_documents_in_a_row_do_not_see_each_other():
    separator = 0
    row = np.array([5, 6, 7, separator, 8, 9, 10, 11, 12], dtype=np.uint16)
    other = np.array([20, 21, 22, separator, 8, 9, 10, 11, 12], dtype=np.uint16)
    batch = collate_rows([row, other], separator=separator)
    assert batch.documents_BL is not None
    decoder = random_decoder(decoder_config(num_kv_groups=4))
    apart = decoder(batch.tokens_BL, documents_BL=batch.documents_BL).logits_BLV
    torch.testing.assert_close(apart[0, 3:], apart[1, 3:])
    together = decoder(batch.tokens_BL).logits_BLV
    assert not torch.allclose(together[0, 3:], together[1, 3:], atol=1e-3)
    assert collate_rows([row], separator=None).documents_BL is None
    assert collate_rows([np.roll(row, -3)], separator=separator).documents_BL is None, "one document needs no mask"


def test_one_document_with_a_mask_equals_none():
    decoder = random_decoder(decoder_config(num_kv_groups=4))
    tokens_BL = torch.arange(20).view(1, 20)
    masked = decoder(tokens_BL, documents_BL=torch.zeros_like(tokens_BL)).logits_BLV
    torch.testing.assert_close(masked, decoder(tokens_BL).logits_BLV)


def test_bad_data_is_named(tmp_path):
    with pytest.raises(DataError, match="no folder"):
        list(TextFolder(str(tmp_path / "absent")).documents())
    with pytest.raises(DataError, match=r"holds no \.txt"):
        list(TextFolder(str(tmp_path)).documents())
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"txt": "typo"}\n')
    with pytest.raises(DataError, match=r"bad\.jsonl line 2"):
        list(TextFolder(str(tmp_path)).documents())
    (tmp_path / "bad.jsonl").unlink()
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"binary\.txt"):
        list(TextFolder(str(tmp_path)).documents())
    (tmp_path / "binary.txt").write_text("one document")
    with pytest.raises(DataError, match="got 1 documents, wanted at least 3"):
        prepare_source(TextFolder(str(tmp_path)), tmp_path, vocab_size=288, tokenizer_file=None, heldout_share=0.1)
    with pytest.raises(DataError, match=r"tokens, wanted 4000"):
        prepare_source(SOURCE, tmp_path, vocab_size=4000, tokenizer_file=None, heldout_share=0.1)


def test_a_tokenizer_that_is_not_the_models_is_refused(folder, tmp_path):
    with pytest.raises(DataError, match=r"288 tokens, model\.vocab_size is 200"):
        prepare_source(SOURCE, tmp_path, vocab_size=200, tokenizer_file=folder / "tokenizer.json", heldout_share=0.1)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_rows_longer_than_the_split_are_refused(folder):
    with pytest.raises(DataError, match="fewer than one row"):
        PackedRows(folder, "validation", sequence_length=10**6)


def test_loss_of_a_uniform_guess_is_the_log_of_the_vocabulary():
    from nestlm.eval.policy_scores import Scores

    scores = Scores(loss=math.log(256), accuracy=0.0)
    assert scores.perplexity == pytest.approx(256)
    assert scores.bits_per_byte(tokens=10, num_bytes=10) == pytest.approx(8.0)
    assert scores.bits_per_byte(tokens=10, num_bytes=40) == pytest.approx(2.0)


def test_a_separators_name_in_a_text_is_text(tmp_path):
    """The name stays plain text: it neither splits the document nor gets lost."""
    source = tmp_path / "texts"
    source.mkdir()
    for number in range(40):
        (source / f"{number}.txt").write_text(f"{number} holds <|endoftext|> in words, and some more words " * 4)
    manifest = prepare_source(TextFolder(str(source)), tmp_path, vocab_size=300, tokenizer_file=None, heldout_share=0.1)
    train = manifest.splits["train"]
    tokens = tokens_of(tmp_path, "train")
    assert (tokens == manifest.begin).sum() == train.documents
    assert "holds <|endoftext|> in words" in load_tokenizer(tmp_path / "tokenizer.json").decode(tokens.tolist())


def test_json_lines_keep_odd_line_breaks_and_refuse_what_is_no_text(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"text": "one\u2028still one"}\n{"text": "two"}\n', encoding="utf-8")
    assert [text for _, text in TextFolder(str(tmp_path)).documents()] == ["one\u2028still one", "two"]
    for bad in ('{"text": null}', '{"text": "\\ud800"}', "[1]"):
        path.write_text(bad)
        with pytest.raises(DataError, match=r"lines\.jsonl line 1"):
            list(TextFolder(str(tmp_path)).documents())
