"""What an error of Hydra or OmegaConf says to a user: one or two lines with the key, what was wanted, and the cure."""

from __future__ import annotations

import re

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf import OmegaConf

from nestlm.config.groups import CONF, groups
from nestlm.errors import NestlmError
from nestlm.utils.messages import suggest_name
from nestlm.utils.nested_dict import flat_items

PLUGGED_IN = ("joblib", "submitit_local", "submitit_slurm")  # launchers that are not Hydra's own
LONGEST = 120  # characters of what a message repeats


def explain(error: Exception) -> str:
    """One or two lines: what was got, what was wanted, the cure."""
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
        return f"{name}: no such group or field{nearest_key(name)}"
    lines = [line.strip() for line in text.splitlines() if line.strip() and "hydra.cc" not in line]
    if cause and cause not in text:  # such as of a merge, whose error names the override alone
        lines = [lines[0], cause.splitlines()[0].strip()]
    key = re.search(r"full_key: (\S+)", text)
    if key is not None:
        return f"{key.group(1)}: {cut(lines[0])}"
    return "; ".join(cut(line) for line in lines[:2])


def explain_option(missing: str, options: list[str]) -> str:
    """The line for a name that a group does not have."""
    group, _, got = missing.removesuffix(".yaml").rpartition("/")
    if group == "hydra/launcher" and got in PLUGGED_IN:
        return f"launcher: {got} needs a package that is not installed; pip install 'nestlm[launchers]'"
    near = suggest_name(got, options)
    return f"{group}: got {got!r}, wanted one of {', '.join(options)}{near if 'did you' in near else ''}"


def explain_syntax(override: str, *, several: bool) -> str:
    """The line for an override that is not of Hydra's grammar, or that lists several values outside of a sweep."""
    key, _, value = override.partition("=")
    if not re.fullmatch(r"[+~]{0,2}[\w.@/-]+", key) or not value:
        return f"{cut(override)}: wanted GROUP=NAME or FIELD=VALUE"
    escaped = value.strip("'\"").replace("\\", "\\\\").replace('"', '\\"').replace("'", "'\\\\''")
    quoted = f"'{key}=\"{cut(escaped)}\"'"
    if several:
        return f"{cut(override)}: a text with a comma is quoted, {quoted}; a list is {key}=[...]; a sweep needs -m"
    return f"{cut(override)}: not Hydra's syntax; quote a value with signs such as = ( ) # ~ ; or letters: {quoted}"


def cut(text: str) -> str:
    """A text whose end is left out where it is long."""
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def nearest_key(name: str) -> str:
    """The end of a message: the existing key that is most like a misspelled one."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = OmegaConf.to_container(compose("train"), resolve=False)
    parent = name.rpartition(".")[0]
    keys = list(dict.fromkeys([*(key for key, _ in flat_items(config)), *groups()]))
    return suggest_name(name, [key for key in keys if key.rpartition(".")[0] == parent] or keys)
