"""Texts in messages, and names that a config gives to folders."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any

from nestlm.errors import ConfigError

LONGEST_NAME = 255  # bytes between slashes, as file systems have it
CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def suggest_name(name: str, candidates: Iterable[str]) -> str:
    """The end of a message: the likeliest right name, or all of them."""
    names = list(candidates)
    matches = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if matches:
        return f"; did you mean {matches[0]!r}?"
    return f"; it has {', '.join(sorted(names))}" if 0 < len(names) <= 20 else ""


def quote_value(value: Any, *, longest: int = 80) -> str:
    """A value as a message quotes it: in one line, its end left out where it is long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def check_text(text: str, where: str) -> None:
    """Raise ConfigError for a text that no name, path or number is."""
    if CONTROL.search(text):
        raise ConfigError(f"{where}: got {quote_value(text)}, wanted a text without control characters")
    try:
        longest = max(len(part.encode()) for part in text.split("/"))
    except UnicodeEncodeError:
        raise ConfigError(f"{where}: got {quote_value(text)}, wanted a text that is valid UTF-8") from None
    if longest > LONGEST_NAME or len(text) > 16 * LONGEST_NAME:
        raise ConfigError(f"{where}: got {quote_value(text)}, wanted at most {LONGEST_NAME} bytes between slashes")


def check_name(name: str, where: str, *, parts: int) -> None:
    """Raise ConfigError unless a text names a folder below another one, in at most so many parts between slashes."""
    split = name.split("/")
    if not name or len(split) > parts or any(part.strip() in ("", ".", "..") for part in split) or "\\" in name:
        wanted = "a name such as ablation/router" if parts > 1 else "a name"
        raise ConfigError(f"{where}: got {quote_value(name)}, wanted {wanted}, without leading slashes, . or ..")
