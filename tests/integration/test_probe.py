"""What elastic training logs for sweeps that stop runs early, and that looking changes nothing."""

import csv
from pathlib import Path

import pytest
import torch

from nestlm.pipeline.stages.base import ModelStage


def rows_of(folder: Path) -> list[dict[str, str]]:
    (written,) = folder.glob("logs/*/version_0/metrics.csv")
    with written.open() as file:
        return [row for row in csv.DictReader(file) if row.get("elastic/gap")]


def test_looking_changes_nothing(run, tmp_path):
    plain = run("budget=[0.9,0.7]", name="plain", cache=tmp_path / "plain-cache")
    assert not rows_of(plain)
    looked = run("budget=[0.9,0.7]", "elastic_probe_steps=1", name="looked", cache=tmp_path / "looked-cache")
    for name in ("results.csv", "metrics.json", "checkpoints/elastic/model.safetensors"):
        assert (plain / name).read_bytes() == (looked / name).read_bytes()
    rows = rows_of(looked)
    assert [int(row["step"]) for row in rows] == [0, 1, 2, 3]
    gaps = [float(row["elastic/gap"]) for row in rows]
    assert gaps[-1] < gaps[0], "it learned"
    losses = [float(value) for name, value in rows[-1].items() if name.startswith("elastic/loss_at_")]
    assert len(losses) == 5, "the smallest to the full model"
    before = sum(losses) / len(losses) - gaps[-1]
    assert before == pytest.approx(sum(map(float, losses_of(rows[0]))) / len(losses) - gaps[0])
    again = run("budget=[0.9,0.7]", "elastic_probe_steps=2", name="again", cache=tmp_path / "plain-cache")
    assert not rows_of(again), "the setting is no part of a key: the stage comes from the cache and logs nothing"


def losses_of(row: dict[str, str]) -> list[str]:
    return [value for name, value in row.items() if name.startswith("elastic/loss_at_")]


def test_looking_draws_nothing_and_reads_calibration_text_only(run, tmp_path, monkeypatch):
    seen = []
    original = ModelStage.calibration_data

    def watched(self, decoder, runtime, *, num_sequences):
        before = torch.get_rng_state()
        calibration = original(self, decoder, runtime, num_sequences=num_sequences)
        assert torch.equal(torch.get_rng_state(), before)
        rows = self.packed_tokens(runtime, stream="x").rows("calibration")
        seen.append((self.name, rows, calibration.batches))
        return calibration

    monkeypatch.setattr(ModelStage, "calibration_data", watched)
    run("budget=0.9", "elastic_probe_steps=2", cache=tmp_path / "cache")
    (rows, batches), *_ = [(rows, batches) for stage, rows, batches in seen if stage == "elastic"]
    known = {tuple(rows[index].tolist()) for index in range(len(rows))}
    for batch in batches:
        for tokens_L, last in zip(batch.tokens_BL, batch.targets_BL[:, -1], strict=True):
            assert (*tokens_L.tolist(), int(last)) in known
