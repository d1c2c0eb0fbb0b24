"""Parts of error messages, and checks of texts and names that a config holds."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any

from nestlm.errors import ConfigError

LONGEST_NAME = 255  # bytes between slashes, the limit of common file systems
CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def suggest_name(name: str, candidates: Iterable[str]) -> str:
    """Return the end of a message about an unknown name: the closest candidate, or the list of all.

    The text is empty when no candidate is close and there are more than 20.
    """
    names = list(candidates)
    matches = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if matches:
        return f"; did you mean {matches[0]!r}?"
    return f"; it has {', '.join(sorted(names))}" if 0 < len(names) <= 20 else ""


def quote_value(value: Any, *, longest: int = 80) -> str:
    """Return `repr(value)` on one line, cut to `longest` characters, for an error message."""
    text = " ".join(repr(value).split())
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def check_text(text: str, where: str) -> None:
    """Check that a text of a config can be a name, a path or a number.

    Args:
        text: the text.
        where: the config key, for the message.

    Raises:
        ConfigError: it has control characters, is not valid UTF-8, or is too long.
    """
    if CONTROL.search(text):
        raise ConfigError(f"{where}: got {quote_value(text)}, wanted a text without control characters")
    try:
        longest = max(len(part.encode()) for part in text.split("/"))
    except UnicodeEncodeError:
        raise ConfigError(f"{where}: got {quote_value(text)}, wanted a text that is valid UTF-8") from None
    if longest > LONGEST_NAME or len(text) > 16 * LONGEST_NAME:
        raise ConfigError(f"{where}: got {quote_value(text)}, wanted at most {LONGEST_NAME} bytes between slashes")


def check_folder_name(name: str, where: str, *, parts: int) -> None:
    """Check that a text names a folder below another one, in at most `parts` parts between slashes.

    Raises:
        ConfigError: the name is empty, absolute, has too many parts, or leads out of the folder.
    """
    split = name.split("/")
    if not name or len(split) > parts or any(part.strip() in ("", ".", "..") for part in split) or "\\" in name:
        wanted = "a name such as ablation/router" if parts > 1 else "a name"
        raise ConfigError(f"{where}: got {quote_value(name)}, wanted {wanted}, without leading slashes, . or ..")
