"""Write a run's folder from what its stages reported: values only; `render` makes pages and pictures of them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import yaml

from nestlm.model.parent_files import ParentFiles
from nestlm.pipeline.run import FinishedStage
from nestlm.report.provenance import provenance
from nestlm.report.record import PROVENANCE, begin, write_record
from nestlm.report.tables import write_csv
from nestlm.utils.json_files import write_json

# Kept out of metrics.json: seconds and peaks of memory go to timings.csv, rows to results.csv, specs to specs/.
ELSEWHERE = {
    "seconds",
    "resumed_at_step",
    "peak_bytes",
    "rows",
    "specs",
    "full_spec",
    "layers",
    "find_seconds",
    "full_seconds",
    "forward_seconds",
}
PARENT = "pretrain/parent"  # below a run's checkpoints: what exports need of the weights that were given
# Files that a run keeps of its stages' folders.
KEPT = (
    "*.safetensors",
    "SHA256SUMS",
    "tokenizer.json",
    "manifest.json",
    "portions.json",
    "calibration-*",
    "validation-*",
    "portion-*/*",
)


def write_run_folder(
    run_dir: Path, *, config: dict[str, Any], finished: list[FinishedStage], router: str, parent: ParentFiles | None
) -> dict[str, dict[str, Any]]:
    """Write config, provenance, metrics, results, timings, specs and weights of a run; returns the metrics.

    Args:
        run_dir: an existing folder.
        config: the resolved settings.
        finished: all stages, in order.
        router: label of the router that was asked for.
        parent: what exports need of the weights that were given.
    """
    results = {stage.name: stage.result for stage in finished}
    metrics = stage_metrics(results, router=router)
    begin(run_dir)
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    write_json(run_dir / "metrics.json", metrics)
    write_csv(run_dir / "results.csv", results["evaluate"]["rows"])
    write_csv(run_dir / "timings.csv", timing_rows(finished))
    write_specs(run_dir / "specs", results["evaluate"], router=router)
    link_checkpoints(run_dir / "checkpoints", finished)
    if parent is not None:
        parent.write(run_dir / "checkpoints" / PARENT)
    for stage in finished:
        for table in stage.folder.glob("latency_table.json"):
            shutil.copy2(table, run_dir / table.name)
    write_json(
        run_dir / PROVENANCE,
        provenance(
            seed=config["seed"],
            data_fingerprint=results["data"]["fingerprint"],
            tokenizer_hash=results["data"]["tokenizer"],
            tokens={stage: metrics[stage]["tokens"] for stage in ("pretrain", "elastic", "router", "joint")},
            seconds=sum(stage.result["seconds"] for stage in finished),
        ),
    )
    write_record(run_dir)
    return metrics


def stage_metrics(results: dict[str, dict[str, Any]], *, router: str) -> dict[str, dict[str, Any]]:
    """What each stage measured, how the stages compare, and how far the router's losses lie above the teacher's."""
    metrics = {
        name: {key: value for key, value in result.items() if key not in ELSEWHERE} for name, result in results.items()
    }
    teacher, rank, elastic = (metrics[name] for name in ("pretrain", "rank", "elastic"))
    lost = rank["smallest_sliced"] - teacher["val_loss"]
    elastic["full_over_teacher"] = elastic["full"] / teacher["val_loss"] - 1.0
    elastic["smallest_recovered"] = None
    if lost and teacher["tokens"] != 0:
        elastic["smallest_recovered"] = (rank["smallest_sliced"] - elastic["smallest"]) / lost
    for stage in ("elastic", "router", "joint"):
        metrics[stage]["token_share"] = metrics[stage]["tokens"] / teacher["tokens"] if teacher["tokens"] else None
    gaps = [row["val_loss"] - teacher["val_loss"] for row in results["evaluate"]["rows"] if row["router"] == router]
    metrics["evaluate"]["pareto_gap"] = sum(gaps) / len(gaps)
    return metrics


def timing_rows(finished: list[FinishedStage]) -> list[dict[str, Any]]:
    """Everything that was measured in seconds; `cached` says that an earlier run measured it.

    `peak_bytes` is what a training stage's tensors took at most on a GPU.
    """
    rows = [
        {
            "what": stage.name,
            "seconds": stage.result["seconds"],
            "cached": stage.cached,
            "tokens": stage.result.get("tokens", 0),
            "resumed_at_step": stage.result.get("resumed_at_step", 0),
            "peak_bytes": stage.result.get("peak_bytes"),
        }
        for stage in finished
    ]
    last = finished[-1]
    whole = {"what": "forward full", "seconds": last.result["full_seconds"], "cached": last.cached}
    nothing = {"tokens": 0, "resumed_at_step": 0, "peak_bytes": None}
    rows.append(whole | nothing)
    outcomes = zip(last.result["rows"], last.result["find_seconds"], last.result["forward_seconds"], strict=True)
    for row, found, forward in outcomes:
        for what, seconds in (("find", found), ("forward", forward)):
            name = f"{what} {row['router']} {row['budget']}"
            rows.append({"what": name, "seconds": seconds, "cached": last.cached} | nothing)
    return rows


def write_specs(folder: Path, outcome: dict[str, Any], *, router: str) -> None:
    """One file a budget: the sub-network that the asked router chose."""
    folder.mkdir(exist_ok=True)
    for stale in folder.glob("*.json"):
        stale.unlink()
    for row, choice in zip(outcome["rows"], outcome["specs"], strict=True):
        if row["router"] == router:
            keys = ("router", "budget", "achieved", "cost", "achieved_cost", "params", "flops", "memory")
            chosen = {key: row[key] for key in keys if key in row}
            whole = {"full_widths": outcome["full_spec"], "layers": outcome["layers"]}
            write_json(folder / f"{row['budget']}.json", chosen | choice | whole)


def link_checkpoints(folder: Path, finished: list[FinishedStage]) -> None:
    """What `nestlm.load` needs, as hard links where the file system allows, else as copies: the weights that stages
    left behind with their hashes, the tokenizer, and the held-out text.
    """  # noqa: D205
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier run in this folder
    for stage in finished:
        for source in sorted({path for pattern in KEPT for path in stage.folder.glob(pattern)}):
            target = folder / stage.name / source.relative_to(stage.folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(source, target)
            except OSError:  # another file system
                shutil.copy2(source, target)
