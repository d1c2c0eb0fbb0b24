"""The tokens that begin and end a text: from settings, from the files beside a tokenizer, or by well-known names."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from nestlm.data.tokenizer import SEPARATOR, make_text_encoder
from nestlm.errors import DataError
from nestlm.utils.console import console

KNOWN_BEGINS = (SEPARATOR, "<|begin_of_text|>", "<s>", "</s>")
KNOWN_ENDS = ("</s>", "<|end_of_text|>", "<|eot_id|>", "<|im_end|>")
PREPARED = ("portions.json", "manifest.json")  # files of nestlm that hold the ids found when they were written
TOKENIZER_CONFIG, SPECIAL_MAP = "tokenizer_config.json", "special_tokens_map.json"
CONFIG, GENERATION = "config.json", "generation_config.json"
MAX_NAMED = 8  # special tokens that a message lists


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the tokens that begin and end a text.

    Attributes:
        begin: id of the token before each document.
        ends: ids of the tokens that end a text, the main one first.
    """

    begin: int
    ends: tuple[int, ...]

    @property
    def stops(self) -> frozenset[int]:
        """Ids at which generation stops: those that end a text, and the one that begins the next."""
        return frozenset({self.begin, *self.ends})


@dataclass(frozen=True)
class SpecialTokenSettings:
    """The user's settings for special tokens.

    Attributes:
        begin: the token that begins documents; None takes the one that the files beside the tokenizer name.
        ends: the tokens that end texts, the main one first; None takes those that the files name.
        in_text: whether the name of a special token in a text becomes that token instead of plain text.
    """

    begin: str | None = None
    ends: Sequence[str] | None = None
    in_text: bool = False

    def make_warner(self, tokenizer: Tokenizer) -> SpecialTokenWarner:
        """Create a warner for training texts that `tokenizer` encodes."""
        return SpecialTokenWarner(
            tokenizer, where="data: texts hold", cure="data.special_tokens=true (nestlm prepare --special-tokens)"
        )

    def read(self, tokenizer: Tokenizer, folder: Path | None) -> SpecialTokens:
        """Find the tokens that begin and end texts; see `read_special_tokens`."""
        return read_special_tokens(tokenizer, folder, begin=self.begin, ends=self.ends)


def read_special_tokens(
    tokenizer: Tokenizer, folder: Path | None, *, begin: str | None = None, ends: Sequence[str] | None = None
) -> SpecialTokens:
    """Find the tokens that begin and end texts.

    The begin token is the first that exists of: `begin`; `bos_token` of the tokenizer's files; the token that the
    tokenizer itself puts before a text; `bos_token_id`; a well-known name; the main end token. The end tokens are the
    first that exist of: `ends`; `eos_token_id` of generation_config.json, else of config.json; `eos_token`; well-known
    names; the begin token.

    Args:
        tokenizer: the tokenizer.
        folder: the folder of its tokenizer.json, which may hold other files of a checkpoint; None if there is none.
        begin: the begin token; None takes it from the files.
        ends: the end tokens; None takes them from the files.

    Raises:
        DataError: the tokenizer lacks a named token or has none of the tokens above, a file is damaged, or files
            disagree about the begin token.
    """
    files = TokenizerConfigs(tokenizer, folder)
    end_ids = (
        files.find_ends()
        if ends is None
        else tuple(dict.fromkeys(files.find_id(end, "data.end_tokens") for end in ends))
    )
    begin_id = files.find_begin(end_ids) if begin is None else files.find_id(begin, "data.begin_token")
    return SpecialTokens(begin_id, end_ids or (begin_id,))


@dataclass(frozen=True)
class TokenizerConfigs:
    """The JSON files beside a tokenizer.json, with the precedence that transformers gives them.

    Attributes:
        tokenizer: the tokenizer.
        folder: the folder of the files; None if there are none.
        contents: contents of the files that were read, by name.
    """

    tokenizer: Tokenizer
    folder: Path | None
    contents: dict[str, Mapping[str, Any]] = field(default_factory=dict)

    def find_begin(self, ends: Sequence[int]) -> int:
        """Find the id of the begin token.

        Args:
            ends: ids of the end tokens; the first of them is the last resort.

        Raises:
            DataError: there is no begin token, or files disagree about it.
        """
        for name in PREPARED:
            if isinstance(found := self.read_file(name).get("begin"), int):
                return found
        declared, prefix = self.find_declared("bos_token"), self.prefix_ids
        if declared is not None and prefix and declared not in prefix:
            raise DataError(
                f"data.tokenizer: bos_token is {self.quote_token(declared)} in {self.folder}, but the tokenizer puts "
                f"{self.quote_token(prefix[0])} before a text; name the one that begins texts "
                "(data.begin_token, --begin-token)"
            )
        if declared is not None:
            return declared
        if len(prefix) == 1:
            return prefix[0]
        special = {index for index, token in self.tokenizer.get_added_tokens_decoder().items() if token.special}
        known = (self.tokenizer.token_to_id(name) for name in KNOWN_BEGINS)
        candidates = [
            *(
                index
                for name in (CONFIG, GENERATION)
                for index in self.read_ids(name, "bos_token_id")
                if index in special
            ),
            *(index for index in known if index is not None),
            *ends,
        ]
        if not candidates:
            raise DataError(
                f"data.tokenizer: no file beside it names a bos_token, and it has none of {', '.join(KNOWN_BEGINS)}; "
                f"name the token that begins texts (data.begin_token, --begin-token){self.suggestion()}"
            )
        return candidates[0]

    def find_ends(self) -> tuple[int, ...]:
        """Find the ids of the end tokens, the main one first; the tuple is empty if no file names one."""
        for name in PREPARED:
            if self.read_file(name).get("ends"):
                return tuple(self.read_ids(name, "ends"))
        listed = self.read_ids(GENERATION, "eos_token_id") or self.read_ids(CONFIG, "eos_token_id")
        if not listed:
            main = self.find_declared("eos_token")
            known = (self.tokenizer.token_to_id(name) for name in KNOWN_ENDS)
            return tuple(index for index in known if index is not None) if main is None else (main,)
        text = self.declared_text("eos_token")
        main = None if text is None else self.tokenizer.token_to_id(text)
        order = sorted(dict.fromkeys(listed), key=lambda index: (index != main, not self.has_id(index)))
        return tuple(order)

    @cached_property
    def prefix_ids(self) -> list[int]:
        """Ids that the tokenizer itself puts before a text."""
        is_plain = self.tokenizer.padding is None and self.tokenizer.truncation is None
        encoding = (self.tokenizer if is_plain else make_text_encoder(self.tokenizer)).encode("a")
        mask = encoding.special_tokens_mask
        return encoding.ids[: mask.index(0)] if 0 in mask else []

    def find_declared(self, name: str) -> int | None:
        """Return the id of the token that the files declare under `name`, such as `bos_token`, or None.

        Raises:
            DataError: the tokenizer lacks the declared token.
        """
        text = self.declared_text(name)
        if text is None:
            return None
        index = self.tokenizer.token_to_id(text)
        if index is None:
            setting = "data.begin_token, --begin-token" if name == "bos_token" else "data.end_tokens, --end-token"
            raise DataError(
                f"data.tokenizer: {name} is {text[:80]!r} in {self.folder}, which tokenizer.json lacks; name another "
                f"({setting}){self.suggestion()}"
            )
        return index

    def declared_text(self, name: str) -> str | None:
        """Return the text of the token that the files declare under `name`, or None.

        special_tokens_map.json takes precedence over tokenizer_config.json, but is ignored if that lists added tokens.
        """
        config = self.read_file(TOKENIZER_CONFIG)
        maps = [config] if "added_tokens_decoder" in config else [self.read_file(SPECIAL_MAP), config]
        for content in maps:
            value = content.get(name)
            text = value.get("content") if isinstance(value, dict) else value
            if text is not None:
                if not isinstance(text, str):
                    raise DataError(
                        f"data.tokenizer: {name} is {str(text)[:80]} in {self.folder}, wanted a token's text; mend it"
                    )
                return text
        return None

    def read_ids(self, name: str, key: str) -> list[int]:
        """Read the token ids, none to several, under a key of a file. Raises DataError for any other value."""
        value = self.read_file(name).get(key)
        found = [] if value is None else value if isinstance(value, list) else [value]
        if not all(isinstance(index, int) and not isinstance(index, bool) for index in found):
            raise DataError(
                f"data.tokenizer: {key} is {str(value)[:80]} in {self.folder}/{name}, wanted a token's id, or a list "
                "of ids; mend it"
            )
        return [index for index in found if index >= 0]

    def read_file(self, name: str) -> Mapping[str, Any]:
        """Read a file once; returns an empty dictionary if it does not exist. Raises DataError if it is damaged."""
        if name not in self.contents:
            path = None if self.folder is None else self.folder / name
            self.contents[name] = read_json_object(path) if path is not None and path.is_file() else {}
        return self.contents[name]

    def has_id(self, index: int) -> bool:
        """Return whether the tokenizer has a token with this id."""
        return index < 2**32 and self.tokenizer.id_to_token(index) is not None

    def find_id(self, text: str, setting: str) -> int:
        """Return the id of a token.

        Args:
            text: the token.
            setting: the config key that names it, for the message.

        Raises:
            DataError: the tokenizer lacks the token.
        """
        index = self.tokenizer.token_to_id(text)
        if index is None:
            raise DataError(f"{setting}: got {text[:80]!r}, which the tokenizer lacks{self.suggestion()}")
        return index

    def suggestion(self) -> str:
        """Return the end of an error message, which lists special tokens of the tokenizer."""
        names = list(special_token_names(self.tokenizer))[:MAX_NAMED]
        return f"; it has {', '.join(names)}" if names else ""

    def quote_token(self, index: int) -> str:
        """Return a token in quotes for an error message."""
        return repr(self.tokenizer.id_to_token(index))


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object. Raises DataError for any other content."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"data.tokenizer: cannot read {path} ({str(error)[:100]}); mend it, or fetch it again"
        ) from error
    if not isinstance(content, dict):
        raise DataError(f"data.tokenizer: {path} holds a {type(content).__name__}, wanted an object; fetch it again")
    return content


def special_token_names(tokenizer: Tokenizer) -> Iterator[str]:
    """Yield the names of a tokenizer's special tokens in the order of their ids."""
    for _, token in sorted(tokenizer.get_added_tokens_decoder().items()):
        if token.special:
            yield token.content


class SpecialTokenWarner:
    """Warns once about texts with names of special tokens that are encoded as plain text."""

    def __init__(self, tokenizer: Tokenizer, *, where: str, cure: str) -> None:
        """Compile the names into a pattern.

        Args:
            tokenizer: the tokenizer that encodes the texts; one that turns names into special tokens needs no warning.
            where: the beginning of the warning, which says what holds the names.
            cure: the setting that turns names into special tokens.
        """
        names = (
            [] if not tokenizer.encode_special_tokens else sorted(special_token_names(tokenizer), key=len, reverse=True)
        )
        self.pattern = re.compile("|".join(map(re.escape, names))) if names else None
        self.where, self.cure = where, cure

    def check(self, text: str) -> None:
        """Print the warning for the first text that holds a name; later texts are not searched."""
        if self.pattern is not None and self.pattern.search(text):
            found = ", ".join(list(dict.fromkeys(self.pattern.findall(text)))[:MAX_NAMED])
            console.print(
                f"{self.where} {found}: names of special tokens, taken as plain text; {self.cure} makes special tokens "
                "of them",
                highlight=False,
                markup=False,
            )
            self.pattern = None
