"""Finished runs as reports see them, made up."""

import json
from pathlib import Path
from typing import Any

import yaml

from nestlm.report.record import write_record
from nestlm.report.runs import RunResults


def run(name: str, seed: int, losses: dict[str, float], **provenance) -> RunResults:
    known = {
        "commit": "1234567890abcdef", "dirty": False, "data_fingerprint": "text", "tokenizer": "tokens", "packages": {},
        "device": "cpu", "threads": 1, "wall_seconds": 1.0, "command": ["train.py", f"seed={seed}"],
    }  # fmt: skip
    rows = [
        {"router": router, "budget": budget, "val_loss": loss + bonus, "achieved": 0.5, "cost": "flops"}
        for router, bonus in (("uniform", 1.0), (name, 0.0))
        for budget, loss in losses.items()
    ]
    specs = [
        {"router": name, "budget": budget, "achieved": 0.5, "widths": {"mlp": [1, 2]}, "full_widths": {"mlp": [4, 4]}}
        for budget in losses
    ]
    config = {"label": None, "seed": seed, "router": {"name": name, "network": {"seed": seed}}, "steps": 3}
    metrics = {"pretrain": {"val_loss": 3.0, "tokens": 10}, "evaluate": {"pareto_gap": 0.1}}
    return RunResults(Path(f"{name}-{seed}"), config, rows, metrics, specs, known | provenance, {"pretrain": True})


def run_folder(folder: Path, config: dict[str, Any]) -> Path:
    """As much of a finished run's folder as is read before its config is understood."""
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    known = {"commit": None, "threads": 1, "data_fingerprint": "text"}
    (folder / "provenance.json").write_text(json.dumps(known), encoding="utf-8")
    for name in ("results.csv", "timings.csv"):
        (folder / name).touch()
    write_record(folder)
    return folder
