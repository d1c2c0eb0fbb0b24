"""Errors as a user reads them: one or two lines with the key, what was got, what was wanted, and the cure."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nestlm.config.groups import CONF, groups
from nestlm.errors import EXIT_PREEMPTED, EXIT_USER_ERROR, NestlmError, Preempted
from nestlm.utils.messages import suggest_name
from nestlm.utils.nested_dict import flat_items
from nestlm.utils.resources import resource_error

PLUGGED_IN = ("joblib", "submitit_local", "submitit_slurm")  # launchers that are not Hydra's own
USER_ERRORS = (NestlmError, HydraException, OmegaConfBaseException)
LONGEST = 120  # characters of what a message repeats


@contextmanager
def plain_errors() -> Iterator[None]:
    """Print an error that a user can cure without its traceback, and exit with the code that belongs to it.

    A bug keeps its traceback, and `traceback=true` on the command line keeps every traceback.
    """
    try:
        yield
    except Exception as error:
        known = user_error(error)
        if known is None or any(argument.lower() == "traceback=true" for argument in sys.argv[1:]):
            raise
        print(f"error: {explain(known)}", file=sys.stderr)
        sys.exit(EXIT_PREEMPTED if isinstance(known, Preempted) else EXIT_USER_ERROR)


def user_error(error: Exception) -> Exception | None:
    """Return an error that a user can cure, or a ResourceError for what the machine lacks; None for a bug."""
    return error if isinstance(error, USER_ERRORS) else resource_error(error)


def explain(error: Exception) -> str:
    """Say in one or two lines what an error of ours, of Hydra or of OmegaConf got, what was wanted, and the cure."""
    if isinstance(error, NestlmError):
        return str(error)
    if isinstance(error, MissingConfigException) and error.options and error.missing_cfg_file:
        return explain_option(error.missing_cfg_file, list(error.options))
    text = str(error)
    ambiguous = re.search(r"Ambiguous value for argument '(.*)'", text)
    if ambiguous is not None:
        return explain_syntax(ambiguous.group(1), several=True)
    if isinstance(error, OverrideParseException):
        return explain_syntax(error.override or "", several=False)
    cause = str(error.__cause__ or "")
    unknown = re.search(r"Could not override '([^']+)'", text)
    if unknown:
        inner = re.search(r"is not in struct\s+full_key: (\S+)", cause)
        name = (inner or unknown).group(1).split("@")[0]
        return explain_name(name)
    lines = [line.strip() for line in text.splitlines() if line.strip() and "hydra.cc" not in line]
    if cause and cause not in text:  # such as of a merge, whose error names the override alone
        lines = [lines[0], cause.splitlines()[0].strip()]
    key = re.search(r"full_key: (\S+)", text)
    if key is not None:
        return f"{key.group(1)}: {cut(lines[0])}"
    return "; ".join(cut(line) for line in lines[:2])


def explain_option(missing: str, options: list[str]) -> str:
    """Say that a group has no option of a name, and which options it has."""
    group, _, got = missing.removesuffix(".yaml").rpartition("/")
    if group == "hydra/launcher" and got in PLUGGED_IN:
        return f"launcher: {got} needs a package that is not installed; pip install 'nestlm[launchers]'"
    near = suggest_name(got, options)
    return f"{group}: got {got!r}, wanted one of {', '.join(options)}{near if 'did you' in near else ''}"


def explain_syntax(override: str, *, several: bool) -> str:
    """Say that an override does not follow Hydra's grammar, or, if `several`, lists values outside of a sweep."""
    key, _, value = override.partition("=")
    if not re.fullmatch(r"[+~]{0,2}[\w.@/-]+", key) or not value:
        return f"{cut(override)}: wanted GROUP=NAME or FIELD=VALUE"
    escaped = value.strip("'\"").replace("\\", "\\\\").replace('"', '\\"').replace("'", "'\\\\''")
    quoted = f"'{key}=\"{cut(escaped)}\"'"
    if several:
        return f"{cut(override)}: a text with a comma is quoted, {quoted}; a list is {key}=[...]; a sweep needs -m"
    return f"{cut(override)}: not Hydra's syntax; quote a value with signs such as = ( ) # ~ ; or letters: {quoted}"


def cut(text: str) -> str:
    """Shorten a text to at most LONGEST characters."""
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def explain_name(name: str) -> str:
    """Say that a config has no field or group of a name, and which one is most like it.

    A field that the default option of its group has is one that the chosen option does not use.
    """
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = OmegaConf.to_container(compose("train"), resolve=False)
    keys = list(dict.fromkeys([*(key for key, _ in flat_items(config)), *groups()]))
    if name in keys:
        group = name.partition(".")[0]
        return f"{name}: the chosen option of {group} has no such field; remove it, or choose another option"
    parent = name.rpartition(".")[0]
    alike = [key for key in keys if key.rpartition(".")[0] == parent] or keys
    return f"{name}: no such group or field{suggest_name(name, alike)}"
