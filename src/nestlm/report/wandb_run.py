"""What wandb gets beside numbers: pictures, the results' table, specs and the final checkpoint."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch.loggers import WandbLogger

from nestlm.errors import ConfigError
from nestlm.report.tables import read_csv

# Artifacts by type: patterns below the run's folder.
ARTIFACTS = {
    "specs": ("specs/*.json", "results.csv", "config.yaml", "latency_table.json"),
    "model": ("checkpoints/joint/*.safetensors", "checkpoints/data/tokenizer.json"),
}


def start(logger: WandbLogger) -> None:
    """Begin the logger's run.

    Raises:
        ConfigError: wandb refuses, as without an account where `logger.offline=false`.
    """
    import wandb  # slow to import, so only where it is used

    try:
        _ = logger.experiment
    except wandb.Error as error:
        raise ConfigError(f"logger: wandb says: {error} Or keep the run here with logger.offline=true") from error


def publish(logger: WandbLogger, run_dir: Path) -> None:
    """Log what lies in a run's folder, with its pictures.

    Files of artifacts are not copied: of an offline run, `wandb sync` reads them where they lie.
    """
    import wandb

    run = logger.experiment
    rows = read_csv(run_dir / "results.csv")
    table = wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows], allow_mixed_types=True)
    run.log({"results": table} | {name: wandb.Image(str(run_dir / f"{name}.png")) for name in ("pareto", "routing")})
    folder = run_dir.absolute()  # where `wandb sync` is called is not known
    for kind, patterns in ARTIFACTS.items():
        artifact = wandb.Artifact(f"{kind}-{run.id}", type=kind)
        for path in (path for pattern in patterns for path in sorted(folder.glob(pattern))):
            artifact.add_file(str(path), name=path.relative_to(folder).as_posix(), policy="immutable", skip_cache=True)
        run.log_artifact(artifact)


def finish(logger: WandbLogger, *, failed: bool) -> None:
    """End the logger's run: it would stay open, and the next job of a sweep would log into it."""
    logger.experiment.finish(exit_code=int(failed))
