"""From tokens back to text: of a whole continuation, and piece by piece."""

from __future__ import annotations

import re
from collections.abc import Sequence

from tokenizers import Tokenizer

BYTE = re.compile("<0x[0-9A-F]{2}>")  # how SentencePiece's vocabularies spell a byte
REPLACEMENT = "\ufffd"
WINDOW = 128  # tokens that are decoded again with the next one: the text of a token depends on those before it


def continuation(tokenizer: Tokenizer, prompt: Sequence[int], tokens: Sequence[int]) -> str:
    """The text of tokens, as it follows a prompt: some tokenizers leave a space out at the start of a text."""
    return tokenizer.decode([*prompt, *tokens])[len(tokenizer.decode(list(prompt))) :]


class TextStream:
    """Hands out whole characters as tokens come: one may take several tokens.

    Bytes that are no UTF-8 come as replacement characters. A run of byte tokens is handed out with the first token that
    is none: a single wrong byte makes the tokenizer's decoder replace all bytes of the run.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        self.context, self.known, self.waiting = list(prompt), tokenizer.decode(list(prompt)), list[int]()

    def add(self, token: int) -> str:
        """What is sure to be the text's next piece; it may be empty."""
        self.waiting.append(token)
        if BYTE.fullmatch(self.tokenizer.id_to_token(token) or ""):
            return ""
        piece = self.rest()
        if piece.endswith(REPLACEMENT):
            return ""
        self.context, self.waiting = [*self.context, *self.waiting][-WINDOW:], []
        self.known = self.tokenizer.decode(self.context)
        return piece

    def rest(self) -> str:
        """What no further token has completed."""
        return self.tokenizer.decode([*self.context, *self.waiting])[len(self.known) :]
