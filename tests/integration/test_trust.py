"""Nothing that is loaded runs code: a harmless marker in every file behind every loading door, hashes made right."""

import contextlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch

import nestlm
import parity
from nestlm.cost.latency.table_file import LatencyTable
from nestlm.data import tokenizer as tokenizers
from nestlm.data.preparation import prepare_source
from nestlm.data.prepared_data import PreparedData
from nestlm.data.sources.synthetic import Synthetic
from nestlm.data.sources.text import TextFolder
from nestlm.distributed import sharded_checkpoint as sharded
from nestlm.errors import CheckpointError, DataError, NestlmError
from nestlm.model.parent_files import ParentFiles
from nestlm.model.pretrained import family_from_checkpoint
from nestlm.nn.decoder import Decoder
from nestlm.report.record import write_record
from nestlm.report.runs import RunResults
from nestlm.train.callbacks.timed_checkpoint import STATE, last_good_checkpoint
from nestlm.utils.checksums import CHECKSUMS, XXH128, hash_files, list_files, read_checksums, write_checksums

BINARY = (".safetensors", ".bin", ".crc", ".distcp")


class Marker:
    """Makes a folder where it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self):
        return os.mkdir, (str(self.place),)


def payloads(place: Path, name: str = "") -> dict[str, bytes]:
    """Contents that make a folder in a reader that runs what it reads; of weights and tokens no text."""
    archive, array = BytesIO(), BytesIO()
    torch.save({"state": Marker(place)}, archive)
    np.save(array, np.array([Marker(place)], dtype=object), allow_pickle=True)
    runs = f"__import__('os').mkdir({str(place)!r})"
    pickled = {"pickle": pickle.dumps(Marker(place)), "torch": archive.getvalue(), "numpy": array.getvalue()}
    if name.endswith(BINARY):
        return pickled
    return {
        **pickled,
        "python": runs.encode(),
        "yaml": f"!!python/object/apply:os.mkdir [{place}]".encode(),
        "target": json.dumps({"_target_": "os.mkdir", "path": str(place)}).encode(),
        "template": f"{{{{ cycler.__init__.__globals__.os.mkdir({str(place)!r}) }}}}".encode(),
    }


def walk(
    folder: Path,
    door: Callable[[], object],
    *,
    tmp_path: Path,
    mend: Callable[[], None] = lambda: None,
    errors: tuple[type[Exception], ...] = (NestlmError,),
) -> int:
    """Go through a door once for each file below a folder and each payload in its place; returns how often it opened.

    What cannot be read is refused by an error of ours, or by one of those that the door's caller knows.
    """
    place, opened = tmp_path / "ran", 0
    door()
    for name in list_files(folder):
        path = folder / name
        content = path.read_bytes()
        for kind, payload in payloads(place, name).items():
            path.unlink()  # a hard link elsewhere stays as it is
            path.write_bytes(payload)
            mend()
            with contextlib.suppress(*errors):
                door()
                opened += 1
            assert not place.exists(), f"{kind} in {name} ran"
        path.write_bytes(content)
    mend()
    door()
    return opened


def make_sums_right(folder: Path) -> None:
    """Write the hashes of all stages anew, as somebody who wants the files to be read."""
    for sums in sorted(folder.glob(f"checkpoints/*/{CHECKSUMS}")):
        with contextlib.suppress(ValueError):  # a payload
            listed = [name for name in read_checksums(sums) if (sums.parent / name).is_file()]
            write_checksums(sums.parent, hash_files(sums.parent, listed))


def test_a_run_is_only_read(static_run, tmp_path):
    folder = Path(shutil.copytree(static_run, tmp_path / "run"))

    def door() -> None:
        RunResults.read(folder)
        model = nestlm.load(folder)
        model.at(0.8)
        next(iter(model.calibration.batches))

    def mend() -> None:
        make_sums_right(folder)
        write_record(folder)

    assert walk(folder, door, tmp_path=tmp_path, mend=mend)


def test_a_checkpoint_is_only_read(tmp_path):
    folder = tmp_path / "parent"
    parity.checkpoint("Llama 2", folder)
    for name in ("modeling_own.py", "tokenization_own.py", "pytorch_model.bin", "custom_generate/generate.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"")

    def door() -> None:
        family = family_from_checkpoint(weights=str(folder), context_length=None, pretraining_tokens=None)
        family.check_weights(dry_run=False)
        family.load_weights(Decoder.empty(family.decoder_config()))
        ParentFiles.from_checkpoint(folder).write(tmp_path / "copy")
        tokenizers.load_tokenizer(folder / "tokenizer.json")

    assert walk(folder, door, tmp_path=tmp_path)


def test_prepared_text_is_only_read(tmp_path):
    folder = tmp_path / "prepared"
    folder.mkdir()
    source = Synthetic(num_documents=100, num_words=60, seed=0)
    prepare_source(source, folder, vocab_size=288, tokenizer_file=None, heldout_share=0.1)

    def door() -> None:
        prepared = PreparedData.read(folder)
        for split in ("train", "validation"):
            rows = prepared.rows(split, sequence_length=32)
            _ = [rows[number] for number in range(len(rows))]

    walk(folder, door, tmp_path=tmp_path)


def test_texts_are_only_read(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, suffix in enumerate((".txt", ".jsonl", ".json", ".csv", ".parquet", ".py", ".txt.gz", ".jsonl.zst")):
        for kind, payload in payloads(tmp_path / "ran").items():
            path = folder / f"{number}-{kind}{suffix}"
            path.write_bytes(payload)
            with contextlib.suppress(DataError):
                list(TextFolder(str(path)).documents())
            assert not (tmp_path / "ran").exists(), path.name


def test_a_training_checkpoint_is_only_read(tmp_path):
    folder = tmp_path / "step=00000001.ckpt"
    for kind, payload in payloads(tmp_path / "ran").items():
        folder.mkdir()
        (folder / STATE).write_bytes(payload)
        write_checksums(folder, hash_files(folder, list_files(folder, XXH128), XXH128), XXH128)
        with contextlib.suppress(CheckpointError):
            assert last_good_checkpoint(tmp_path, is_sharded=False) is None, kind
        shutil.rmtree(folder, ignore_errors=True)  # a damaged one is gone
        assert not (tmp_path / "ran").exists(), kind


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_sharded_checkpoint_is_only_read(sharded_checkpoint, tmp_path):
    folder = sharded_checkpoint

    def door() -> None:
        write_checksums(folder, hash_files(folder, list_files(folder, XXH128), XXH128), XXH128)
        sharded.check(folder)
        sharded.read_model(folder)

    walk(folder, door, tmp_path=tmp_path, errors=(NestlmError, RuntimeError, EOFError, pickle.UnpicklingError))


def test_a_latency_table_is_only_read(tmp_path):
    for kind, payload in payloads(tmp_path / "ran").items():
        (tmp_path / "table.json").write_bytes(payload)
        with pytest.raises(NestlmError):
            LatencyTable.read(tmp_path / "table.json")
        assert not (tmp_path / "ran").exists(), kind
