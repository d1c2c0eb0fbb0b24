"""Tokenizers: training, loading, checks against a model, and encoding."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from nestlm.errors import DataError

SEPARATOR = "<|endoftext|>"  # the special token of trained tokenizers, with id 0
QUOTED_LENGTH = 80  # characters of a text or an error that a message quotes


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer whose token 0 separates documents.

    Raises:
        DataError: the text is too short to yield `vocab_size` tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[SEPARATOR],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise DataError(
            f"model.vocab_size: the text yields a tokenizer of {tokenizer.get_vocab_size()} tokens, "
            f"wanted {vocab_size} (at least 257); bring more text or set model.vocab_size to that"
        )
    return tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """Load a tokenizer.json. Raises DataError if it is missing or damaged."""
    if not path.is_file():
        raise DataError(
            f"data.tokenizer: {path} does not exist; wanted a tokenizer.json, as AutoTokenizer.save_pretrained of "
            "transformers writes it"
        )
    try:
        return parse_tokenizer(path.read_bytes())
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"data.tokenizer: {path} is no tokenizer.json ({str(error)[:QUOTED_LENGTH]})") from error


def parse_tokenizer(content: bytes) -> Tokenizer:
    """Build a tokenizer from the content of a tokenizer.json. Raises the library's Exception for any other content."""
    return Tokenizer.from_str(content.decode())


def hash_tokenizer(tokenizer: Tokenizer) -> str:
    """Return the SHA-256 of the tokenizer's JSON as the library writes it, which ignores the layout of its file."""
    return hashlib.sha256(tokenizer.to_str().encode()).hexdigest()


def hash_tokenizer_file(file: Path) -> str:
    """Return the SHA-256 of a tokenizer.json that the library wrote; it equals `hash_tokenizer` of its tokenizer."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def id_bound(tokenizer: Tokenizer) -> int:
    """Return the largest token id plus one. Ids may have gaps, so it can exceed the number of tokens."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def check_vocabulary(tokenizer: Tokenizer, *, vocab_size: int) -> None:
    """Check that a model has a row of its embedding for every token of the tokenizer's vocabulary.

    Tokens that were added above the vocabulary may lack a row as long as no text holds them; see `check_token_ids`.

    Raises:
        DataError: the vocabulary is larger than `vocab_size`.
    """
    size = max(tokenizer.get_vocab(with_added_tokens=False).values(), default=-1) + 1
    if size > vocab_size:
        raise DataError(
            f"data.tokenizer: has {size} tokens, model.vocab_size is {vocab_size}; wanted the model's own tokenizer"
        )


def check_token_ids(tokenizer: Tokenizer, ids: Sequence[int] | np.ndarray, *, vocab_size: int, where: str) -> None:
    """Check that a model has a row of its embedding for every id.

    Args:
        tokenizer: names the token in the message.
        ids: token ids.
        vocab_size: vocabulary size of the model, V.
        where: the beginning of the message, which says what the ids are from.

    Raises:
        DataError: an id is not below `vocab_size`.
    """
    largest = max(ids) if len(ids) else 0
    if largest >= vocab_size:
        raise DataError(
            f"{where} holds {tokenizer.id_to_token(int(largest))!r}, token {largest}, but the model has only "
            f"{vocab_size} tokens (model.vocab_size); take it out of the text, or use the model's own tokenizer"
        )


def make_text_encoder(tokenizer: Tokenizer, *, special_tokens: bool = False) -> Tokenizer:
    """Copy a tokenizer without its truncation and padding, to encode whole texts.

    Args:
        tokenizer: the tokenizer, which is not changed.
        special_tokens: whether the name of a special token in a text becomes that token instead of plain text.
    """
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.no_truncation()
    copy.no_padding()
    copy.encode_special_tokens = not special_tokens
    return copy


def encode_prompt(tokenizer: Tokenizer, text: str, *, begin: int) -> list[int]:
    """Encode a prompt, with the token that begins a document in front.

    Args:
        tokenizer: the tokenizer as `make_text_encoder` returns it.
        text: the prompt.
        begin: id of the token that begins a document.

    Raises:
        DataError: the text is not valid Unicode, or the tokenizer has no tokens for some of its characters.
    """
    try:
        encoding = tokenizer.encode(text, add_special_tokens=False)
    except (TypeError, UnicodeEncodeError) as error:
        raise DataError(
            f"prompt: {text[:QUOTED_LENGTH]!r} is no Unicode text ({str(error)[:QUOTED_LENGTH]}); wanted UTF-8"
        ) from error
    unknown = getattr(tokenizer.model, "unk_token", None)
    covered = {
        place
        for token, (start, end) in zip(encoding.tokens, encoding.offsets, strict=True)
        if token != unknown
        for place in range(start, end)
    }
    lost = "".join(" " if place in covered else character for place, character in enumerate(text)).split()
    if lost:
        shown = ", ".join(map(repr, dict.fromkeys(lost)))
        raise DataError(f"prompt: the tokenizer has no token for {shown:.{QUOTED_LENGTH}}; leave it out")
    return prepend_begin(tokenizer, encoding.ids, begin=begin)


def prepend_begin(tokenizer: Tokenizer, ids: list[int], *, begin: int) -> list[int]:
    """Put the begin token before a document's ids, unless its text begins with the name of that token.

    Chat templates write that name. It counts only when the tokenizer turns names into special tokens.
    """
    return ids if not tokenizer.encode_special_tokens and ids[:1] == [begin] else [begin, *ids]
