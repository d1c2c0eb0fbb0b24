"""Finished runs as reports see them, made up."""

from pathlib import Path

from nestlm.report.runs import Run


def run(name: str, seed: int, losses: dict[str, float], **provenance) -> Run:
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
    return Run(Path(f"{name}-{seed}"), config, rows, metrics, specs, known | provenance, {"pretrain": True})
