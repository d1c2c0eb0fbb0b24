"""The stage cache: what is damaged in it is named, and done again."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from nestlm.errors import CheckpointError, ConfigError
from nestlm.model.weights_io import check_weights, save_weights
from nestlm.pipeline.cache import MARKER, StageFolder
from nestlm.utils.checksums import CHECKSUMS, matches_checksum, write_with_checksum

RESULT = {"seconds": 1.5, "val_loss": 3.25}


@pytest.fixture
def stage(tmp_path: Path) -> StageFolder:
    """A finished stage."""
    folder = StageFolder(tmp_path, "elastic", "0123456789abcdef")
    (folder.path / "parent").mkdir(parents=True)
    (folder.path / ".lock").touch()
    save_weights({"weight": torch.ones(3)}, folder.path / "model.safetensors")
    write_with_checksum(folder.path / "score-full.json", lambda path: path.write_text('{"loss": 3.25}'))
    (folder.path / "parent/config.json").write_text("{}")
    (folder.path / "train-0.bin").write_bytes(b"tokens")
    folder.finish(RESULT)
    return folder


def test_a_finished_stage_is_found_again(stage):
    assert stage.result() == RESULT
    assert "train-0.bin" not in (stage.path / CHECKSUMS).read_text(), "its manifest has its hash"


@pytest.mark.parametrize("name", [MARKER, CHECKSUMS, "score-full.json", "parent/config.json", "model.safetensors"])
@pytest.mark.parametrize("damage", ["flip", "cut", "zero", "remove"])
def test_a_damaged_stage_is_named_and_done_again(name, damage, stage, capsys):
    path = stage.path / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    damaged = {"flip": bytes(content), "cut": bytes(content[:-3]), "zero": bytes(len(content))}
    path.unlink() if damage == "remove" else path.write_bytes(damaged[damage])
    assert stage.result() is None
    told = capsys.readouterr().err
    assert ("elastic in the cache is damaged" in told) == (path.name != "stage.json" or damage != "remove")
    assert not told or [path.name for path in stage.path.iterdir()] == [".lock"], "nothing of it is used"


def test_another_runs_stage_is_not_used(stage, tmp_path, capsys):
    other = StageFolder(tmp_path, "elastic", "fedcba9876543210")
    shutil.copytree(stage.path, other.path)
    assert other.result() is None
    assert "is of another run's stage" in " ".join(capsys.readouterr().err.split())
    other.path.joinpath("stage.json").mkdir()
    assert other.result() is None
    other.finish(RESULT)
    assert other.result() == RESULT


@pytest.mark.parametrize("damage", [Path.mkdir, lambda path: path.symlink_to("nowhere")])
def test_what_is_no_lock_is_refused_by_name(damage, stage):
    (stage.path / ".lock").unlink()
    damage(stage.path / ".lock")
    with pytest.raises(ConfigError, match=r"\.lock: got a (link|folder), wanted a file; remove it"), stage.locked():
        pass


def test_weights_of_a_stage_are_checked_when_they_are_read(stage):
    path = stage.path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    with pytest.raises(CheckpointError, match=r"model.safetensors is damaged.*remove it and do the run again"):
        check_weights(path)


def test_a_score_of_a_killed_stage_is_used_only_as_it_was_written(tmp_path):
    path = tmp_path / "score-full.json"
    path.write_text(json.dumps({"loss": 1.0}))
    assert not matches_checksum(path), "killed between the file and its hash"
    write_with_checksum(path, lambda partial: partial.write_text(json.dumps({"loss": 1.0})))
    assert matches_checksum(path)
    path.write_text(json.dumps({"loss": 2.0}))
    assert not matches_checksum(path)
