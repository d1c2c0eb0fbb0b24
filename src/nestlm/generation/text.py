"""Turns generated tokens into text: a whole continuation at once, or piece by piece."""

from __future__ import annotations

import re
from collections.abc import Sequence

from tokenizers import Tokenizer

BYTE = re.compile("<0x[0-9A-F]{2}>")  # a byte in SentencePiece vocabularies
REPLACEMENT = "\ufffd"
WINDOW = 128  # tokens that are decoded again with the next one: the text of a token depends on those before it


def continuation(tokenizer: Tokenizer, prompt: Sequence[int], tokens: Sequence[int]) -> str:
    """Decode tokens that follow a prompt; decoded alone, some tokenizers would drop a space at the start."""
    return tokenizer.decode([*prompt, *tokens])[len(tokenizer.decode(list(prompt))) :]


class TextStream:
    """Decodes tokens one by one, and returns only complete characters: a character may take several tokens.

    Bytes that are not UTF-8 become replacement characters. Byte tokens wait until a token follows that is none, since a
    single wrong byte makes the tokenizer's decoder replace the whole run of bytes.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        self.context, self.known, self.waiting = list(prompt), tokenizer.decode(list(prompt)), list[int]()

    def add(self, token: int) -> str:
        """Add a token and return the text that is complete by now; it may be empty."""
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
        """Return the text of the tokens that are still waiting, incomplete characters replaced."""
        return self.tokenizer.decode([*self.context, *self.waiting])[len(self.known) :]
