"""The config files of Hydra: where they lie, their groups, and the options of a group."""

from pathlib import Path

import nestlm

# In a checkout, src/nestlm/conf is a link to conf/ at the top; in a wheel it is the folder itself.
CONF = (Path(nestlm.__file__).parent / "conf").resolve()


def groups() -> list[str]:
    """Return the names of the config groups, sorted."""
    return sorted(path.name for path in CONF.iterdir() if path.is_dir())


def options(group: str) -> list[str]:
    """Return the names that `GROUP=NAME` takes, sorted. Files that options share lie in a folder below the group."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))
