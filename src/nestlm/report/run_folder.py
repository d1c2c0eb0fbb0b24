"""Write the values that a run's stages reported into its folder. `render` makes pages and plots of them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import yaml

from nestlm.errors import DataError
from nestlm.model.parent_files import ParentFiles
from nestlm.pipeline.run import FinishedStages
from nestlm.pipeline.runtime import LATENCY_TABLE
from nestlm.pipeline.stages.base import Result, Stage
from nestlm.pipeline.stages.data import DataStage
from nestlm.pipeline.stages.elastic import ElasticStage
from nestlm.pipeline.stages.evaluate import EvaluateResult, EvaluateStage
from nestlm.pipeline.stages.pretrain import PretrainStage
from nestlm.pipeline.stages.rank import RankStage
from nestlm.pipeline.stages.training import TrainingResult
from nestlm.report.provenance import provenance
from nestlm.report.record import CURE, PROVENANCE, begin, write_record
from nestlm.report.tables import write_csv
from nestlm.utils.json_files import damaged_file_errors, read_json, write_json

# Columns of results.csv that files in specs/ hold as well.
IN_SPECS = ("router", "budget", "achieved", "cost", "achieved_cost", "params", "flops", "memory")
PARENT = "pretrain/parent"  # folder below a run's checkpoints: files of the given weights that exports need
# Patterns of the files in stages' folders that a run's folder keeps.
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
    run_dir: Path, *, config: dict[str, Any], finished: FinishedStages, router: str, parent: ParentFiles | None
) -> None:
    """Write config, provenance, metrics, results, timings, specs and weights of a run.

    Args:
        run_dir: an existing folder.
        config: the resolved settings.
        finished: all stages, in order.
        router: label of the run's router.
        parent: files of the given weights that exports need; None where no weights were given.
    """
    evaluated, data = finished.result(EvaluateStage), finished.result(DataStage)
    begin(run_dir)
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    write_json(run_dir / "metrics.json", stage_metrics(finished, router=router))
    write_csv(run_dir / "results.csv", [outcome.cells() for outcome in evaluated.outcomes])
    write_csv(run_dir / "timings.csv", timing_rows(finished))
    write_specs(run_dir / "specs", evaluated, router=router)
    link_checkpoints(run_dir / "checkpoints", finished)
    if parent is not None:
        parent.write(run_dir / "checkpoints" / PARENT)
    for stage in finished:
        for table in stage.folder.glob(LATENCY_TABLE):
            shutil.copy2(table, run_dir / table.name)
    write_json(
        run_dir / PROVENANCE,
        provenance(
            seed=config["seed"],
            data_fingerprint=data.fingerprint,
            tokenizer_hash=data.tokenizer,
            tokens={name: result.tokens for name, result in training_results(finished).items()},
            seconds=sum(stage.seconds for stage in finished),
        ),
    )
    write_record(run_dir)


def training_results(finished: FinishedStages) -> dict[str, TrainingResult]:
    """Return the results of the stages that train, by the stage's name."""
    return {each.stage.name: each.result for each in finished if isinstance(each.result, TrainingResult)}


def stage_metrics(finished: FinishedStages, *, router: str) -> dict[str, dict[str, Any]]:
    """Return what metrics.json holds, by stage: what the stage measured, and how it compares with the teacher.

    Args:
        finished: all stages.
        router: label of the run's router.
    """
    metrics = {each.stage.name: each.result.metrics() for each in finished}
    teacher, rank = finished.result(PretrainStage), finished.result(RankStage)
    elastic = finished.result(ElasticStage)
    lost = rank.smallest_sliced - teacher.val_loss
    recovered = (rank.smallest_sliced - elastic.smallest) / lost if lost and teacher.tokens != 0 else None
    metrics[ElasticStage.name] |= {
        "full_over_teacher": elastic.full / teacher.val_loss - 1.0,
        "smallest_recovered": recovered,
    }
    for name, result in training_results(finished).items():
        if result is not teacher and result.tokens is not None:
            metrics[name]["token_share"] = result.tokens / teacher.tokens if teacher.tokens else None
    metrics[EvaluateStage.name]["pareto_gap"] = pareto_gap(finished, router=router)
    return metrics


def pareto_gap(finished: FinishedStages, *, router: str) -> float:
    """Return the loss of a router above the teacher's, in nats, a mean over budgets."""
    teacher = finished.result(PretrainStage).val_loss
    outcomes = finished.result(EvaluateStage).outcomes
    gaps = [outcome.readings.val_loss - teacher for outcome in outcomes if outcome.router == router]
    return sum(gaps) / len(gaps)


def timing_rows(finished: FinishedStages) -> list[dict[str, Any]]:
    """Return the rows of timings.csv: times of stages, searches and forward passes, and peak memory of training stages.

    `cached` says that an earlier run measured the time.
    """
    rows = [
        timing_row(each.stage.name, each.seconds, each.cached, each.result)
        if isinstance(each.result, TrainingResult)
        else timing_row(each.stage.name, each.seconds, each.cached)
        for each in finished
    ]
    evaluated = finished[EvaluateStage]
    rows.append(timing_row("forward full", evaluated.result.full_seconds, evaluated.cached))
    for outcome in evaluated.result.outcomes:
        asked = f"{outcome.router} {outcome.budget}"
        rows.append(timing_row(f"find {asked}", outcome.find_seconds, evaluated.cached))
        rows.append(timing_row(f"forward {asked}", outcome.forward_seconds, evaluated.cached))
    return rows


def timing_row(what: str, seconds: float, cached: bool, trained: TrainingResult | None = None) -> dict[str, Any]:
    """Return a row of timings.csv; `trained` is the result of a training stage."""
    trained = TrainingResult() if trained is None else trained
    return {
        "what": what,
        "seconds": seconds,
        "cached": cached,
        "tokens": trained.tokens,
        "resumed_at_step": trained.resumed_at_step,
        "peak_bytes": trained.peak_bytes,
    }


def write_specs(folder: Path, evaluated: EvaluateResult, *, router: str) -> None:
    """Write the sub-network or plan that the run's router chose for each budget, one JSON file per budget.

    Args:
        folder: the folder to fill; other JSON files in it are removed.
        evaluated: result of the evaluation.
        router: label of the run's router.
    """
    folder.mkdir(exist_ok=True)
    for stale in folder.glob("*.json"):
        stale.unlink()
    for outcome in evaluated.outcomes:
        if outcome.router == router:
            cells = outcome.cells()
            content = {name: cells[name] for name in IN_SPECS if name in cells} | {"widths": outcome.widths}
            if outcome.plan is not None:
                content["plan"] = outcome.plan
            content |= {"full_widths": evaluated.full_widths, "layers": evaluated.layers}
            write_json(folder / f"{outcome.budget}.json", content)


def read_result(folder: Path, kind: type[Stage[Result]]) -> Result:
    """Return what a stage of a finished run reported, as far as metrics.json holds it.

    Raises:
        DataError: the file is absent, damaged, or of another version of nestlm.
    """
    path = folder / "metrics.json"
    with damaged_file_errors(path, cure=CURE):
        content = read_json(path, cure=CURE)[kind.name]
    try:
        return kind.result_type().from_json(content)
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path} is damaged, or of another version of nestlm ({reason}); {CURE}") from error


def link_checkpoints(folder: Path, finished: FinishedStages) -> None:
    """Put the files that `nestlm.load` needs into a folder: weights and their hashes, tokenizer, held-out text.

    They become hard links to the stages' files; copies, where the file system allows no links.
    """
    shutil.rmtree(folder, ignore_errors=True)  # files of an earlier run in this folder
    for stage in finished:
        for source in sorted({path for pattern in KEPT for path in stage.folder.glob(pattern)}):
            target = folder / stage.stage.name / source.relative_to(stage.folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(source, target)
            except OSError:  # another file system
                shutil.copy2(source, target)
