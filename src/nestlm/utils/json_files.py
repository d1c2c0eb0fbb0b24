"""JSON files that nestlm writes and reads back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nestlm.errors import DataError

REASON_LENGTH = 100  # characters of another library's error that a message quotes


def to_json(content: Any) -> str:
    """Format a value as the JSON text that nestlm writes: indented by 2, ending in a newline."""
    return json.dumps(content, indent=2) + "\n"


def write_json(path: Path, content: Any) -> None:
    """Write a value to a JSON file atomically."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(to_json(content), encoding="utf-8")
    partial.replace(path)


def read_json(path: Path, *, cure: str, kind: type = dict) -> Any:
    """Read a value from a JSON file.

    Args:
        path: the file.
        cure: the end of the error message, which says what to do about a damaged file.
        kind: the expected class of the value.

    Raises:
        DataError: the file is missing, is not JSON, is nested too deeply, or holds a value of another class.
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
    """Turn errors about missing keys or wrong types into a DataError that names the damaged file.

    Wrap code in it that picks values out of a file which nestlm wrote and somebody may have edited.

    Args:
        place: the file or folder that the message names.
        cure: the end of the message.

    Raises:
        DataError: a key or column is missing, or a value has another type.
    """
    try:
        yield
    except DataError:
        raise
    except (KeyError, TypeError, AttributeError, IndexError, ArithmeticError) as error:
        reason = repr(error)[:REASON_LENGTH]
        raise DataError(f"{place} is damaged, or of another version of nestlm ({reason}); {cure}") from error
