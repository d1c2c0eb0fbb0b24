"""`nestlm prepare`: killed at any moment it goes on, and ends with the same bytes; what it made trains."""

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from itertools import product
from pathlib import Path
from random import Random

import pytest

from nestlm.cli.prepare_folder import prepare_folder
from nestlm.data.manifest import JOURNAL, MANIFEST, Manifest
from nestlm.data.preparation import prepare_source
from nestlm.data.sources.synthetic import Synthetic
from nestlm.errors import DataError
from nestlm.report.tables import read_csv

SHARD = 30_000


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    source = Synthetic(num_documents=60, num_words=100, seed=0)
    prepare_source(source, folder, vocab_size=288, tokenizer_file=None, heldout_share=0.1)
    return folder / "tokenizer.json"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 3 MB: long enough to be killed in the middle."""
    folder, random = tmp_path_factory.mktemp("corpus"), Random(0)
    words = [f"{random.randrange(10**6):x}" for _ in range(1000)]
    for number in range(150):
        (folder / f"{number:03d}.txt").write_text(" ".join(random.choices(words, k=3500)))
    return folder


def command(corpus: Path, tokenizer: Path, out: Path) -> list[str]:
    program = [sys.executable, "-c", "from nestlm.__main__ import main; main()"]
    where = ["prepare", str(corpus), "--tokenizer", str(tokenizer), "--out", str(out)]
    return [*program, *where, "--shard-tokens", str(SHARD)]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def test_killed_and_begun_again_it_ends_with_the_same_bytes(corpus, tokenizer, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    subprocess.run(command(corpus, tokenizer, whole), check=True, capture_output=True)
    made: list[int] = []
    for shards in (1, 15, 35):
        process = subprocess.Popen(command(corpus, tokenizer, out), stderr=subprocess.PIPE, text=True)
        end = time.monotonic() + 100
        while not (out / JOURNAL).is_file() or len(list(out.glob("train-*.bin"))) < shards:
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < end
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert not (out / MANIFEST).exists(), "half a folder is not taken for a whole one"
        made.append((out / "train-00000.bin").stat().st_mtime_ns)
    last = subprocess.run(command(corpus, tokenizer, out), check=True, capture_output=True, text=True)
    made.append((out / "train-00000.bin").stat().st_mtime_ns)
    assert len(set(made)) == 1, "what was finished was not made again"
    assert content(out) == content(whole)
    assert "tokens/s; the tokenizer alone" in last.stdout
    again = subprocess.run(command(corpus, tokenizer, out), check=True, capture_output=True, text=True)
    assert "was finished already" in again.stdout
    assert content(out) == content(whole)


def test_a_folder_that_was_begun_from_something_else_is_refused(corpus, tokenizer, tmp_path):
    out = tmp_path / "out"
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(60):
        (texts / f"{number}.txt").write_bytes((corpus / f"{number:03d}.txt").read_bytes()[:2000])

    def begin(**changes) -> Manifest:
        settings = {"text_key": "text", "heldout_share": 0.05, "shard_tokens": SHARD, "tokenizer": tokenizer}
        return prepare_folder(str(texts), out, **(settings | changes))

    manifest = begin()
    assert begin() == manifest
    other = tmp_path / "other"
    other.mkdir()
    prepare_source(Synthetic(60, 100, 3), other, vocab_size=280, tokenizer_file=None, heldout_share=0.1)
    mistakes = {
        "heldout_share 0.05, now it is 0.1": {"heldout_share": 0.1},
        f"shard_tokens {SHARD}, now it is 99": {"shard_tokens": 99},
        "tokenizer_hash": {"tokenizer": other},
    }
    for message, changes in mistakes.items():
        with pytest.raises(DataError, match=f"was begun with {message}"):
            begin(**changes)
    (texts / "7.txt").write_text("changed")
    with pytest.raises(DataError, match="was begun with fingerprint"):
        begin()
    outside = {"consumed": 1, "manifest": asdict(manifest)}
    outside["manifest"]["splits"]["train"]["shards"][0]["name"] = "../texts/1.txt"
    entries = ['{"consumed": 3}', "[" * 100_000, "[]", json.dumps(outside)]
    for name, entry in product((MANIFEST, JOURNAL), entries):
        (out / MANIFEST).unlink(missing_ok=True)
        (out / name).write_text(entry)
        with pytest.raises(DataError, match=rf"{name} is damaged"):
            begin()
        (out / name).unlink()
    with pytest.raises(DataError, match=r"--out: .* lies in"):
        prepare_folder(
            str(texts), texts / "out", tokenizer=tokenizer, text_key="text", heldout_share=0.1, shard_tokens=9
        )
    (tmp_path / "full").mkdir()
    (tmp_path / "full/diary.txt").write_text("mine")
    out = tmp_path / "full"
    with pytest.raises(DataError, match=r"holds diary.txt; wanted a new folder"):
        begin()


def test_a_text_that_changes_while_it_is_read_is_named(tokenizer, tmp_path):
    class Growing:
        texts = 60

        def documents(self):
            yield from Synthetic(self.texts, 50, 0).documents()
            self.texts += 1

    with pytest.raises(DataError, match="run this again"):
        prepare_source(Growing(), tmp_path, vocab_size=None, tokenizer_file=tokenizer, heldout_share=0.1)
    assert not (tmp_path / MANIFEST).exists()


def test_a_prepared_folder_trains_as_its_texts_do(run, tmp_path):
    """The same documents and tokens, in the same order: the same numbers. Also as a mixture of one."""
    first = run("budget=0.8", name="texts")
    folder = tmp_path / "prepared"
    folder.mkdir()
    source = Synthetic(num_documents=300, num_words=400, seed=0)
    tokenizer = first / "checkpoints/data/tokenizer.json"
    prepare_source(source, folder, vocab_size=None, tokenizer_file=tokenizer, heldout_share=0.02)
    expected = (first / "results.csv").read_bytes()
    for name, data in {
        "auto": ["data=auto", f"data.path={folder}"],
        "shards": ["data=shards", f"data.path={folder}", "data.num_workers=1"],
    }.items():
        second = run("budget=0.8", *data, name=name)
        assert (second / "results.csv").read_bytes() == expected
        assert (second / "checkpoints/data/tokenizer.json").read_bytes() == tokenizer.read_bytes()
    copied = shutil.copytree(folder, tmp_path / "copied")
    (copied / "notes.md").write_text("copied")
    third = run("budget=0.8", "data=shards", f"data.path={copied}", "data.num_workers=1", name="copied")
    cached = {row["what"]: row["cached"] for row in read_csv(third / "timings.csv")}
    assert cached["data"], "content counts, not where it lies"
    assert cached["elastic"]
    half = f"data.sources=[{{path: {folder}, weight: 1}}, {{path: {folder}, weight: 2}}]"
    mixed = run("budget=0.8", "data=mixture", half, name="mixture")
    assert (mixed / "results.csv").read_bytes() != expected, "another order"
    with pytest.raises(DataError, match=r"holds '.*', token 287, but the model has only 287 tokens"):
        run("data=shards", f"data.path={folder}", "model.vocab_size=287", name="other")
