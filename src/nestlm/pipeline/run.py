"""Walk the stages in order: each result comes from the cache, or the stage runs."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic

from lightning.pytorch.loggers import Logger

from nestlm.distributed import collectives
from nestlm.pipeline.cache import StageFolder
from nestlm.pipeline.key import stage_key
from nestlm.pipeline.order import STAGES
from nestlm.pipeline.runtime import StageRuntime
from nestlm.pipeline.settings import Settings
from nestlm.pipeline.stages.base import Result, Stage
from nestlm.pipeline.stages.training import TrainingResult
from nestlm.utils.console import console
from nestlm.utils.resources import resource_errors


@dataclass(frozen=True)
class FinishedStage(Generic[Result]):
    """A stage that is done.

    Attributes:
        stage: the stage.
        folder: folder with its files.
        result: what it reported.
        seconds: time that it took when it ran.
        cached: whether its result came from the cache.
    """

    stage: Stage[Result]
    folder: Path
    result: Result
    seconds: float
    cached: bool


@dataclass(frozen=True)
class FinishedStages:
    """All stages of a run that is done, in order."""

    stages: tuple[FinishedStage[Any], ...]

    def __iter__(self) -> Iterator[FinishedStage[Any]]:
        return iter(self.stages)

    def __getitem__(self, kind: type[Stage[Result]]) -> FinishedStage[Result]:
        """Return the stage of a class. Raises KeyError where the run has none."""
        for finished in self.stages:
            if type(finished.stage) is kind:
                return finished
        raise KeyError(kind.name)

    def result(self, kind: type[Stage[Result]]) -> Result:
        """Return what the stage of a class reported. Raises KeyError where the run has none."""
        return self[kind].result


def run_stages(settings: Settings, *, config: Mapping[str, Any], cache: Path, logger: Logger) -> FinishedStages:
    """Walk the stages of checked settings.

    Args:
        settings: settings of the run.
        config: the same as plain resolved values, of which cache keys are made.
        cache: folder of the stages' folders.
        logger: receives training logs.

    Raises:
        NestlmError: something in settings, data or weights that a user can cure.
    """
    finished: list[FinishedStage[Any]] = []
    identities, folders = dict[str, str](), dict[str, Path]()
    inputs: dict[str, list[str]] = {}  # names of all stages that a stage builds on, directly or not
    for kind in STAGES:
        stage = kind.of(settings)
        if not stage.is_needed:
            continue
        direct = [name for name in stage.after if name in identities]
        inputs[stage.name] = list(dict.fromkeys(other for name in direct for other in (*inputs[name], name)))
        key = stage_key(
            stage,
            config=config,
            previous=[identities[name] for name in direct],
            outside=stage.outside_identity(cache),
            plugins=settings.plugins,
        )
        folder = StageFolder(cache, stage.name, key)
        seen = {name: folders[name] for name in inputs[stage.name]}
        runtime = StageRuntime.of(settings, folder=folder.path, inputs=seen, logger=logger)
        done = run_stage(stage, folder, runtime)
        finished.append(done)
        identities[stage.name], folders[stage.name] = stage.identity(folder.path, key=key), folder.path
        settings = stage.refine(settings, done.result, folder=folder.path)
    return FinishedStages(tuple(finished))


def run_stage(stage: Stage[Result], folder: StageFolder, runtime: StageRuntime) -> FinishedStage[Result]:
    """Take a stage's result from the cache, or do its work; rank 0 looks and writes, and the others wait for it."""
    is_first = collectives.rank() == 0
    with folder.locked() if is_first else nullcontext():
        content = collectives.broadcast_from_rank_zero(folder.result() if is_first else None)
        cached = content is not None
        if content is None:
            started = time.monotonic()
            with resource_errors(folder.path):
                reported = asdict(stage.run(runtime)) if is_first or not stage.is_alone else {}
            content = collectives.broadcast_from_rank_zero(reported | {"seconds": time.monotonic() - started})
            if is_first:
                folder.finish(content)
        if is_first:
            drop_checkpoints(folder.path)
        collectives.barrier()
    result = stage.result_type().from_json(content)
    seconds = f"{content['seconds']:7.1f} s"
    if isinstance(result, TrainingResult) and result.peak_bytes is not None:
        seconds += f"  peak {result.peak_bytes / 2**30:.3g} GiB"
    console.print(f"{stage.name:>9} {seconds}{'  (from the cache)' if cached else ''}", highlight=False)
    return FinishedStage(stage, folder.path, result, content["seconds"], cached)


def drop_checkpoints(folder: Path) -> None:
    """Remove the training checkpoints of a finished stage: optimizer states are larger than the result."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
