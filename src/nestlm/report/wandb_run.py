"""Log to wandb what is not a number: plots, the table of results, specs and the final checkpoint."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch.loggers import WandbLogger

from nestlm.errors import ConfigError
from nestlm.report.tables import read_csv

# Artifacts by type: patterns of their files, relative to the run's folder.
ARTIFACTS = {
    "specs": ("specs/*.json", "results.csv", "config.yaml", "latency_table.json"),
    "model": ("checkpoints/joint/*.safetensors", "checkpoints/data/tokenizer.json"),
}


def start(logger: WandbLogger) -> None:
    """Begin the logger's wandb run.

    Raises:
        ConfigError: wandb refuses, for example without an account and with `logger.offline=false`.
    """
    import wandb  # slow to import, so only where it is used

    try:
        _ = logger.experiment
    except wandb.Error as error:
        raise ConfigError(f"logger: wandb says: {error} Or keep the run here with logger.offline=true") from error


def publish(logger: WandbLogger, run_dir: Path) -> None:
    """Log the table of results, the plots and the artifacts of a finished run's folder.

    Files of artifacts are not copied, so they must stay in the folder until `wandb sync` has uploaded an offline run.
    """
    import wandb

    run = logger.experiment
    rows = read_csv(run_dir / "results.csv")
    table = wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows], allow_mixed_types=True)
    run.log({"results": table} | {name: wandb.Image(str(run_dir / f"{name}.png")) for name in ("pareto", "routing")})
    folder = run_dir.absolute()  # `wandb sync` may be called from another folder
    for kind, patterns in ARTIFACTS.items():
        artifact = wandb.Artifact(f"{kind}-{run.id}", type=kind)
        for path in (path for pattern in patterns for path in sorted(folder.glob(pattern))):
            artifact.add_file(str(path), name=path.relative_to(folder).as_posix(), policy="immutable", skip_cache=True)
        run.log_artifact(artifact)


def finish(logger: WandbLogger, *, failed: bool) -> None:
    """End the logger's wandb run, so that the next job of a sweep does not log into it; `failed` sets its exit code."""
    logger.experiment.finish(exit_code=int(failed))
