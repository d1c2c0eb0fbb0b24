"""Finds the config files and the names of their groups."""

from pathlib import Path

CONF = Path(__file__).resolve().parents[3] / "conf"


def groups() -> list[str]:
    """Names of the config groups."""
    return sorted(path.name for path in CONF.iterdir() if path.is_dir())


def options(group: str) -> list[str]:
    """Names that GROUP=NAME takes."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))
