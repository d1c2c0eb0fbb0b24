"""From tokens back to text: of a whole continuation, and piece by piece."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


def continuation(tokenizer: Tokenizer, prompt: Sequence[int], tokens: Sequence[int]) -> str:
    """The text of tokens, as it follows a prompt: some tokenizers leave a space out at the start of a text."""
    return tokenizer.decode([*prompt, *tokens])[len(tokenizer.decode(list(prompt))) :]


class TextStream:
    """Hands out whole characters as tokens come: one may take several tokens."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self.tokenizer, self.prompt = tokenizer, list(prompt)
        self.stream = DecodeStream(list(prompt), skip_special_tokens=True)
        self.tokens: list[int] = []
        self.written = 0

    def add(self, token: int) -> str:
        """What is sure to be the text's next piece; it may be empty."""
        self.tokens.append(token)
        piece = self.stream.step(self.tokenizer, token) or ""
        self.written += len(piece)
        return piece

    def rest(self) -> str:
        """What no further token has completed."""
        return continuation(self.tokenizer, self.prompt, self.tokens)[self.written :]
