"""Prepared folders: damage is an error that names the file before its tokens reach training."""

import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nestlm.data.datamodule import DataSettings, PackedTokens
from nestlm.data.manifest import SPLITS, Manifest
from nestlm.data.preparation import NO_SETTINGS, prepare_source
from nestlm.data.prepared_data import PreparedData
from nestlm.data.shard_files import BLOCK_BYTES
from nestlm.data.sources.base import Portion
from nestlm.data.sources.shards import ShardMixture
from nestlm.data.sources.synthetic import Synthetic
from nestlm.data.tokenizer import load_tokenizer
from nestlm.errors import DataError

NUM_DAMAGES = 200


def make(folder: Path, *, seed: int = 0, tokenizer: Path | None = None, vocab_size: int = 288) -> Path:
    folder.mkdir()
    source = Synthetic(num_documents=150, num_words=400, seed=seed)
    prepare_source(
        source, folder, vocab_size=vocab_size, tokenizer_file=tokenizer, heldout_share=0.1, shard_tokens=3 * BLOCK_BYTES
    )
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("prepared") / "one")


@pytest.fixture(scope="module")
def others(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A folder with another text and the same tokenizer, and one with the same text and another tokenizer."""
    root = tmp_path_factory.mktemp("others")
    return [make(root / "text", seed=1, tokenizer=folder / "tokenizer.json"), make(root / "tokens", vocab_size=270)]


def read_all(folder: Path) -> int:
    """Open a folder as a run does, and read every row."""
    prepared = PreparedData.read(folder)
    prepared.check(sequence_length=64)
    rows = [prepared.rows(split, sequence_length=64) for split in SPLITS]
    return sum(len(each[index]) for each in rows for index in range(len(each)))


def damage(folder: Path, others: list[Path], generator: random.Random) -> str:
    """Damage a copy of a folder; returns a description of the damage."""
    files = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    kind = generator.choice(["flip", "flip", "cut", "swap", "manifest", "missing"])
    path = generator.choice(files)
    if kind == "flip":
        content = bytearray(path.read_bytes())
        place = generator.randrange(len(content))
        content[place] ^= generator.randrange(1, 256)
        path.write_bytes(content)
        return f"flip byte {place} of {path.name}"
    if kind == "cut":
        length = generator.randrange(path.stat().st_size)
        path.write_bytes(path.read_bytes()[:length])
        return f"cut {path.name} to {length}"
    if kind == "swap":
        one, two = generator.sample([each for each in files if each.suffix == ".bin"], 2)
        endings = ["", ".crc"] if generator.random() < 0.5 else [""]
        for ending in endings:
            first, second = (each.with_name(each.name + ending) for each in (one, two))
            content = first.read_bytes()
            first.write_bytes(second.read_bytes())
            second.write_bytes(content)
        return f"swap {one.name} and {two.name} with {endings}"
    if kind == "manifest":
        other = generator.choice(others)
        shutil.copy(other / "manifest.json", folder / "manifest.json")
        return f"manifest of {other.name}"
    path.unlink()
    return f"remove {path.name}"


def test_every_damage_is_named(folder, others, tmp_path):
    assert read_all(folder) > 10**5
    assert (folder / "train-00002.bin").stat().st_size > BLOCK_BYTES, "several shards of several blocks"
    undetected, unnamed = [], []
    for seed in range(NUM_DAMAGES):
        copy = tmp_path / str(seed)
        shutil.copytree(folder, copy)
        done = damage(copy, others, random.Random(seed))
        try:
            read_all(copy)
            undetected.append(done)
        except DataError as error:
            if str(copy) not in str(error) or not any(cure in str(error) for cure in ("again", "wanted")):
                unnamed.append((done, str(error)))
        shutil.rmtree(copy)
    assert not undetected
    assert not unnamed


def test_a_damage_after_the_opening_is_found_at_the_read(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    rows = PreparedData.read(copy).rows("train", sequence_length=64)
    good = rows[3].copy()
    with (copy / "train-00000.bin").open("r+b") as file:
        file.seek(2 * BLOCK_BYTES + 5)
        file.write(b"\xff")
    np.testing.assert_array_equal(rows[3], good, "another block")
    with pytest.raises(DataError, match=rf"train-00000.bin is damaged in bytes {2 * BLOCK_BYTES} to {3 * BLOCK_BYTES}"):
        rows[BLOCK_BYTES // 64]


def test_a_token_beyond_the_vocabulary_is_named(folder, tmp_path):
    """The token is in the shard from the start, so all checksums are right."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    replace(Manifest.read(copy), vocab_size=40).write(copy)
    with pytest.raises(DataError, match=r"train-00000\.bin holds token \d+, the vocabulary has 40"):
        read_all(copy)


def test_a_tokenizer_that_is_not_the_models_is_refused(folder, others, tmp_path):
    prepared = PreparedData.read(folder)
    prepared.with_model_tokens(special=NO_SETTINGS, vocab_size=300, tokenizer_file=folder / "tokenizer.json")
    laid_out = tmp_path / "tokenizer.json"
    load_tokenizer(folder / "tokenizer.json").save(str(laid_out), pretty=True)
    assert laid_out.read_bytes() != (folder / "tokenizer.json").read_bytes()
    prepared.with_model_tokens(special=NO_SETTINGS, vocab_size=288, tokenizer_file=laid_out)
    with pytest.raises(DataError, match=r"holds '.*', token 287, but the model has only 287 tokens"):
        prepared.with_model_tokens(special=NO_SETTINGS, vocab_size=287, tokenizer_file=None)
    with pytest.raises(DataError, match="another tokenizer than"):
        prepared.with_model_tokens(special=NO_SETTINGS, vocab_size=288, tokenizer_file=others[1] / "tokenizer.json")
    PreparedData.open([Portion(folder, 1.0), Portion(others[0], 1.0)])
    with pytest.raises(DataError, match="another tokenizer than"):
        PreparedData.open([Portion(folder, 1.0), Portion(others[1], 1.0)])


@pytest.fixture
def kept(folder, others, tmp_path) -> tuple[Path, list[Path]]:
    """The data stage's copy of the held-out splits of two folders, moved elsewhere; and the paths of the folders."""
    copies, stage = [tmp_path / "a", tmp_path / "b"], tmp_path / "stage"
    stage.mkdir()
    for source, copy in zip((folder, others[0]), copies, strict=True):
        shutil.copytree(source, copy)
    PreparedData.open([Portion(path, weight) for path, weight in zip(copies, (1.0, 3.0), strict=True)]).copy_heldout(
        stage
    )
    for copy in copies:
        shutil.rmtree(copy)
    return stage.rename(tmp_path / "moved"), copies


def loader_of(stage: Path, copies: list[Path]) -> PackedTokens:
    source = ShardMixture(
        [{"path": str(path), "weight": weight} for path, weight in zip(copies, (1.0, 3.0), strict=True)]
    )
    return PackedTokens(settings_of(source), PreparedData.read(stage), seed=0, stream="t", num_steps=1)


def test_held_out_tokens_are_kept_and_training_tokens_are_read_in_place(folder, others, kept):
    stage, copies = kept
    whole = PreparedData.open([Portion(folder, 1.0), Portion(others[0], 3.0)])
    loader = loader_of(stage, copies)
    for split in SPLITS[1:]:
        rows, wanted = loader.rows(split), whole.rows(split, sequence_length=64)
        assert len(rows) == len(wanted)
        assert all(np.array_equal(rows[index], wanted[index]) for index in range(len(rows)))
    with pytest.raises(DataError, match=r"a holds no manifest.json"):
        loader.rows("train")
    for source, copy in zip((folder, folder), copies, strict=True):
        shutil.copytree(source, copy)
    with pytest.raises(DataError, match=r"b has changed since this run began"):
        loader.rows("train")
    shutil.rmtree(copies[1])
    shutil.copytree(others[0], copies[1])
    assert len(loader.rows("train")) == len(whole.rows("train", sequence_length=64))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "damaged: got a list, wanted a dict"),
        ("{", "damaged: no JSON"),
        ('{"begin": 0, "ends": [0]}', "portions.json is damaged"),
        ('{"begin": 0, "ends": 3, "weights": [1]}', "portions.json is damaged"),
        ('{"begin": 0, "ends": [0], "weights": []}', "portions.json is damaged"),
        ('{"begin": 0, "ends": [0], "weights": ["../../x"]}', "portions.json is damaged"),
        ('{"begin": 0, "ends": [0], "weights": [1, 3, 1]}', "portion-2 holds no manifest.json"),
    ],
)
def test_a_damaged_list_of_portions_is_named(kept, content, message):
    (kept[0] / "portions.json").write_text(content)
    with pytest.raises(DataError, match=message):
        PreparedData.read(kept[0])


def test_nothing_outside_a_prepared_folder_is_read(folder, tmp_path):
    """Neither a name in a manifest with a valid checksum nor a link leads out of the folder."""
    for name in ("../one/train-00000.bin", str(folder / "train-00000.bin"), "train-00000.bin/../../x", ".lock"):
        copy = tmp_path / "copy"
        shutil.copytree(folder, copy)
        manifest = Manifest.read(copy)
        train = manifest.splits["train"]
        shards = (replace(train.shards[0], name=name), *train.shards[1:])
        replace(manifest, splits=manifest.splits | {"train": replace(train, shards=shards)}).write(copy)
        with pytest.raises(DataError, match=r"manifest.json is damaged"):
            read_all(copy)
        shutil.rmtree(copy)
    for name in ("train-00000.bin", "train-00001.bin.crc", "manifest.json", "tokenizer.json"):
        copy = tmp_path / "copy"
        shutil.copytree(folder, copy)
        (copy / name).unlink()
        (copy / name).symlink_to(folder / name)
        with pytest.raises(DataError, match=rf"{name} is a link out of its folder"):
            read_all(copy)
        (copy / name).unlink()
        shutil.copy(folder / name, copy / f"{name}.moved")
        (copy / name).symlink_to(f"{name}.moved")
        assert read_all(copy) == read_all(folder), "a link within the folder"
        shutil.rmtree(copy)


@pytest.mark.parametrize("change", [{"dtype": "O"}, {"begin": -1}, {"ends": ()}, {"vocab_size": 1.5}])
def test_values_that_no_manifest_has_are_refused(folder, change, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    replace(Manifest.read(copy), **change).write(copy)
    with pytest.raises(DataError, match=r"manifest.json is damaged, or of another version"):
        read_all(copy)


def test_a_folder_of_an_earlier_version_is_to_be_prepared_again(folder, tmp_path):
    (tmp_path / "manifest.json").write_text((folder / "manifest.json").read_text().replace('"begin"', '"separator"'))
    with pytest.raises(DataError, match="was prepared by an earlier version of nestlm; prepare it again"):
        Manifest.read(tmp_path)


def settings_of(source: ShardMixture) -> DataSettings:
    return DataSettings(
        source, None, None, None, special_tokens=False, sequence_length=64, batch_size=2, eval_batch_size=2,
        heldout_share=0.1, separate_documents=True, num_workers=0,
    )  # fmt: skip
