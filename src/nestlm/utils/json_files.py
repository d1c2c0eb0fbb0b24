"""JSON files that this project writes and reads again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nestlm.errors import DataError

REASON_LENGTH = 100  # characters of a parser's own words


def to_json(content: Any) -> str:
    """The text of a file."""
    return json.dumps(content, indent=2) + "\n"


def write_json(path: Path, content: Any) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(to_json(content), encoding="utf-8")
    partial.replace(path)


def read_json(path: Path, *, cure: str, kind: type = dict) -> Any:
    """The value in a file.

    Args:
        path: of the file.
        cure: what a user does about a damaged one.
        kind: class of the value.

    Raises:
        DataError: the file is absent, no JSON, nested too deeply, or holds a value of another class.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; {cure}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged: no JSON ({str(error)[:REASON_LENGTH]}); {cure}") from error
    if not isinstance(content, kind):
        raise DataError(f"{path} is damaged: got a {type(content).__name__}, wanted a {kind.__name__}; {cure}")
    return content


@contextmanager
def damaged_file_errors(place: Path, *, cure: str) -> Iterator[None]:
    """Read values of our own files, which may have been edited.

    Raises:
        DataError: a key or a column is absent, or a value is of another type.
    """
    try:
        yield
    except DataError:
        raise
    except (KeyError, TypeError, AttributeError, IndexError, ArithmeticError) as error:
        reason = repr(error)[:REASON_LENGTH]
        raise DataError(f"{place} is damaged, or of another version of nestlm ({reason}); {cure}") from error
