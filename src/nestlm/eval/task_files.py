"""Task files of the EleutherAI harness that come from elsewhere: plain values and sandboxed templates, no code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lm_eval.tasks
import lm_eval.utils
import yaml
from jinja2 import Environment
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nestlm.errors import DataError

OWN_TASKS = Path(lm_eval.tasks.__file__).resolve().parent  # the harness's: installed, so trusted


def check_task_files(folder: Path) -> None:
    """Raise DataError for a folder whose task files could run code or read task files elsewhere.

    The harness imports what `!function` names, loads a metric with `hf_evaluate: true` as a script, and follows
    `include` to any place. Files may still include those that the harness brings along.

    Raises:
        DataError: a file is no YAML of plain values, or has one of these.
    """
    root = folder.resolve()
    for path in sorted(folder.rglob("*.yaml")):
        if not path.resolve().is_relative_to(root):
            raise DataError(f"task_files: {path} is a link out of the folder; copy the file there")
        try:
            content = yaml.safe_load(path.read_bytes())
        except (yaml.YAMLError, OSError, UnicodeDecodeError, RecursionError) as error:
            reason = " ".join(str(error).split())[:200]
            raise DataError(
                f"task_files: {path} cannot be used ({reason}); wanted plain values: its own functions are not run"
            ) from error
        for key, value in entries(content):
            if key == "include":
                check_include(value, path=path, root=root)
            elif key == "hf_evaluate" and value:
                raise DataError(f"task_files: {path}: hf_evaluate runs a script; wanted a metric of the harness")


def entries(content: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every key with its value, at any level of nesting."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield key, value
            yield from entries(value)
    elif isinstance(content, list):
        for value in content:
            yield from entries(value)


def check_include(value: Any, *, path: Path, root: Path) -> None:
    """Raise DataError unless what a file includes lies in its folder, or is the harness's own."""
    for name in value if isinstance(value, list) else [value]:
        place = (path.parent / str(name)).expanduser().resolve()
        in_folder = place.is_relative_to(root) and place.suffix == ".yaml"  # so that it is checked as well
        if not in_folder and not place.is_relative_to(OWN_TASKS):
            raise DataError(
                f"task_files: {path} includes {str(name)[:100]!r}; wanted a .yaml file of the folder, or of the harness"
            )


@contextmanager
def sandboxed_templates() -> Iterator[None]:
    """Render the harness's templates in Jinja's sandbox: as they are, an expression in a task file can run anything.

    Raises:
        DataError: an expression that the sandbox refuses.
    """
    plain: Environment = lm_eval.utils.env
    sandbox = ImmutableSandboxedEnvironment(
        loader=plain.loader, undefined=plain.undefined, keep_trailing_newline=plain.keep_trailing_newline
    )
    sandbox.filters |= plain.filters
    lm_eval.utils.env = sandbox
    try:
        yield
    except SecurityError as error:
        raise DataError(f"task_files: a template is not run ({error}); wanted fields of a question") from error
    finally:
        lm_eval.utils.env = plain
