"""Which tokens begin and end a text: as named, as the files beside a tokenizer say, or by well-known names."""

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
PREPARED = ("portions.json", "manifest.json")  # files of ours, which hold what was read when they were written
TOKENIZER_CONFIG, SPECIAL_MAP = "tokenizer_config.json", "special_tokens_map.json"
CONFIG, GENERATION = "config.json", "generation_config.json"
MAX_NAMED = 8  # special tokens that a message names


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the tokens around a text.

    Attributes:
        begin: id of the token before each document.
        ends: ids at which a text ends, the main one first.
    """

    begin: int
    ends: tuple[int, ...]

    @property
    def stops(self) -> frozenset[int]:
        """Ids at which generation stops: the ends of a text, and the begin of the next one."""
        return frozenset({self.begin, *self.ends})


@dataclass(frozen=True)
class SpecialTokenSettings:
    """What a user says about special tokens.

    Attributes:
        begin: content of the token that begins documents; None: as the files beside the tokenizer say.
        ends: contents of the tokens that end texts; None: likewise.
        in_text: whether the name of a special token in a text becomes that token, and not plain tokens.
    """

    begin: str | None = None
    ends: Sequence[str] | None = None
    in_text: bool = False

    def plain_name_warner(self, tokenizer: Tokenizer) -> SpecialTokenWarner:
        """What warns of texts that the encoder of texts does not take as the user may have meant them."""
        return SpecialTokenWarner(
            tokenizer, where="data: texts hold", cure="data.special_tokens=true (nestlm prepare --special-tokens)"
        )

    def read(self, tokenizer: Tokenizer, folder: Path | None) -> SpecialTokens:
        """The tokens around a text; see `read_special_tokens`."""
        return read_special_tokens(tokenizer, folder, begin=self.begin, ends=self.ends)


def read_special_tokens(
    tokenizer: Tokenizer, folder: Path | None, *, begin: str | None = None, ends: Sequence[str] | None = None
) -> SpecialTokens:
    """Find the tokens that begin and end texts.

    Begins: the named token; `bos_token` of the tokenizer's files; the token that the tokenizer itself puts before a
    text; `bos_token_id`; a well-known name; the main end. Ends: the named tokens; `eos_token_id` of
    generation_config.json, else of config.json; `eos_token`; well-known names; the begin.

    Args:
        tokenizer: the tokenizer.
        folder: the folder that holds its tokenizer.json and perhaps other files of a checkpoint; None: there is none.
        begin: content of the begin token; None: as the files say.
        ends: contents of the end tokens; None: as the files say.

    Raises:
        DataError: a named token that the tokenizer lacks, a damaged file, files that disagree on what begins a text,
            or a tokenizer without any such token.
    """
    files = TokenizerConfigs(tokenizer, folder)
    end_ids = (
        files.ends() if ends is None else tuple(dict.fromkeys(files.named(end, "data.end_tokens") for end in ends))
    )
    begin_id = files.begin(end_ids) if begin is None else files.named(begin, "data.begin_token")
    return SpecialTokens(begin_id, end_ids or (begin_id,))


@dataclass(frozen=True)
class TokenizerConfigs:
    """The JSON files beside a tokenizer.json, read as transformers reads them.

    Attributes:
        tokenizer: the tokenizer.
        folder: where the files are; None: there are none.
    """

    tokenizer: Tokenizer
    folder: Path | None
    read: dict[str, Mapping[str, Any]] = field(default_factory=dict)

    def begin(self, ends: Sequence[int]) -> int:
        """Id of the begin token. Raises DataError where there is none, or files disagree."""
        for name in PREPARED:
            if isinstance(found := self.content(name).get("begin"), int):
                return found
        said, put = self.declared("bos_token"), self.put_before
        if said is not None and put and said not in put:
            raise DataError(
                f"data.tokenizer: bos_token is {self.show(said)} in {self.folder}, but the tokenizer puts "
                f"{self.show(put[0])} before a text; name the one that begins texts (data.begin_token, --begin-token)"
            )
        if said is not None:
            return said
        if len(put) == 1:
            return put[0]
        special = {index for index, token in self.tokenizer.get_added_tokens_decoder().items() if token.special}
        known = (self.tokenizer.token_to_id(name) for name in KNOWN_BEGINS)
        candidates = [
            *(index for name in (CONFIG, GENERATION) for index in self.ids(name, "bos_token_id") if index in special),
            *(index for index in known if index is not None),
            *ends,
        ]
        if not candidates:
            raise DataError(
                f"data.tokenizer: no file beside it names a bos_token, and it has none of {', '.join(KNOWN_BEGINS)}; "
                f"name the token that begins texts (data.begin_token, --begin-token){self.suggestion()}"
            )
        return candidates[0]

    def ends(self) -> tuple[int, ...]:
        """Ids of the end tokens, the main one first; none where nothing names one."""
        for name in PREPARED:
            if self.content(name).get("ends"):
                return tuple(self.ids(name, "ends"))
        listed = self.ids(GENERATION, "eos_token_id") or self.ids(CONFIG, "eos_token_id")
        if not listed:
            main = self.declared("eos_token")
            known = (self.tokenizer.token_to_id(name) for name in KNOWN_ENDS)
            return tuple(index for index in known if index is not None) if main is None else (main,)
        text = self.token("eos_token")
        main = None if text is None else self.tokenizer.token_to_id(text)
        order = sorted(dict.fromkeys(listed), key=lambda index: (index != main, not self.has(index)))
        return tuple(order)

    @cached_property
    def put_before(self) -> list[int]:
        """Ids that the tokenizer itself puts before a text."""
        is_plain = self.tokenizer.padding is None and self.tokenizer.truncation is None
        encoding = (self.tokenizer if is_plain else make_text_encoder(self.tokenizer)).encode("a")
        mask = encoding.special_tokens_mask
        return encoding.ids[: mask.index(0)] if 0 in mask else []

    def declared(self, name: str) -> int | None:
        """Id of a token of the tokenizer's files. Raises DataError where the tokenizer lacks it."""
        text = self.token(name)
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

    def token(self, name: str) -> str | None:
        """Content of a token of the tokenizer's files; special_tokens_map.json goes first where it is read."""
        config = self.content(TOKENIZER_CONFIG)
        maps = [config] if "added_tokens_decoder" in config else [self.content(SPECIAL_MAP), config]
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

    def ids(self, name: str, key: str) -> list[int]:
        """Token ids that a file holds under a key: one, several, or none. Raises DataError for anything else."""
        value = self.content(name).get(key)
        found = [] if value is None else value if isinstance(value, list) else [value]
        if not all(isinstance(index, int) and not isinstance(index, bool) for index in found):
            raise DataError(
                f"data.tokenizer: {key} is {str(value)[:80]} in {self.folder}/{name}, wanted a token's id, or a list "
                "of ids; mend it"
            )
        return [index for index in found if index >= 0]

    def content(self, name: str) -> Mapping[str, Any]:
        """A file's content; empty where there is no such file. Raises DataError for a damaged one."""
        if name not in self.read:
            path = None if self.folder is None else self.folder / name
            self.read[name] = read_json_object(path) if path is not None and path.is_file() else {}
        return self.read[name]

    def has(self, index: int) -> bool:
        """Whether the tokenizer has a token of this id."""
        return index < 2**32 and self.tokenizer.id_to_token(index) is not None

    def named(self, text: str, setting: str) -> int:
        """Id of a token that a setting names. Raises DataError where the tokenizer lacks it."""
        index = self.tokenizer.token_to_id(text)
        if index is None:
            raise DataError(f"{setting}: got {text[:80]!r}, which the tokenizer lacks{self.suggestion()}")
        return index

    def suggestion(self) -> str:
        """The end of a message: special tokens that could be named."""
        names = list(special_token_names(self.tokenizer))[:MAX_NAMED]
        return f"; it has {', '.join(names)}" if names else ""

    def show(self, index: int) -> str:
        """A token as messages name it."""
        return repr(self.tokenizer.id_to_token(index))


def read_json_object(path: Path) -> dict[str, Any]:
    """An object of a JSON file. Raises DataError for anything else."""
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
    """Contents of a tokenizer's special tokens, by id."""
    for _, token in sorted(tokenizer.get_added_tokens_decoder().items()):
        if token.special:
            yield token.content


class SpecialTokenWarner:
    """Warns, once, of texts that hold names of special tokens which are taken as plain text."""

    def __init__(self, tokenizer: Tokenizer, *, where: str, cure: str) -> None:
        """Take the names.

        Args:
            tokenizer: as texts are encoded; one that makes special tokens of names has no plain ones.
            where: what holds them, as the message begins.
            cure: the setting that makes special tokens of them.
        """
        names = (
            [] if not tokenizer.encode_special_tokens else sorted(special_token_names(tokenizer), key=len, reverse=True)
        )
        self.pattern = re.compile("|".join(map(re.escape, names))) if names else None
        self.where, self.cure = where, cure

    def look(self, text: str) -> None:
        """Look at a text; the first that holds a name is the last that is looked at."""
        if self.pattern is not None and self.pattern.search(text):
            found = ", ".join(list(dict.fromkeys(self.pattern.findall(text)))[:MAX_NAMED])
            console.print(
                f"{self.where} {found}: names of special tokens, taken as plain text; {self.cure} makes special tokens "
                "of them",
                highlight=False,
                markup=False,
            )
            self.pattern = None
