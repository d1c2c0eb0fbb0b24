"""Byte-level BPE tokenizers, trained here or brought along with a model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from nestlm.errors import DataError

SEPARATOR = "<|endoftext|>"
QUOTED_LENGTH = 80  # characters of a text or an error that a message quotes


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> Tokenizer:
    """A byte-level BPE whose token 0 separates documents.

    Raises:
        DataError: the text is too small to yield that many tokens.
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
    """Read a tokenizer.json. Raises DataError when there is none, or it is damaged."""
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
    """The tokenizer of a tokenizer.json's content. Raises an exception of the library where it is none."""
    return Tokenizer.from_str(content.decode())


def hash_tokenizer(tokenizer: Tokenizer) -> str:
    """SHA-256 of the tokenizer as the library writes it: equal for equal ones, however their files are laid out."""
    return hashlib.sha256(tokenizer.to_str().encode()).hexdigest()


def hash_tokenizer_file(file: Path) -> str:
    """SHA-256 of a tokenizer.json that the library wrote."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def id_bound(tokenizer: Tokenizer) -> int:
    """The smallest number that all token ids are below; ids may have gaps."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def check_vocabulary(tokenizer: Tokenizer, *, vocab_size: int) -> None:
    """Raise DataError where a tokenizer's own tokens are more than a model's.

    Tokens that were added above the vocabulary may lack a row in the embedding as long as no text holds them.
    """
    size = max(tokenizer.get_vocab(with_added_tokens=False).values(), default=-1) + 1
    if size > vocab_size:
        raise DataError(
            f"data.tokenizer: has {size} tokens, model.vocab_size is {vocab_size}; wanted the model's own tokenizer"
        )


def check_token_ids(tokenizer: Tokenizer, ids: Sequence[int] | np.ndarray, *, vocab_size: int, where: str) -> None:
    """Raise DataError, naming the token, where ids hold one that a model's embedding has no row for."""
    largest = max(ids) if len(ids) else 0
    if largest >= vocab_size:
        raise DataError(
            f"{where} holds {tokenizer.id_to_token(int(largest))!r}, token {largest}, but the model has only "
            f"{vocab_size} tokens (model.vocab_size); take it out of the text, or use the model's own tokenizer"
        )


def make_text_encoder(tokenizer: Tokenizer, *, special_tokens: bool = False) -> Tokenizer:
    """A copy that takes texts as they are: none is cut or filled up.

    Args:
        tokenizer: the tokenizer.
        special_tokens: whether the name of a special token in a text becomes that token; otherwise it is plain text.
    """
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.no_truncation()
    copy.no_padding()
    copy.encode_special_tokens = not special_tokens
    return copy


def encode_prompt(tokenizer: Tokenizer, text: str, *, begin: int) -> list[int]:
    """Token ids of a text, after the token that begins a document.

    Args:
        tokenizer: as `for_texts` returns it; where it makes special tokens of names, a prompt may bring its own begin.
        text: the prompt.
        begin: id of the token that begins a document.

    Raises:
        DataError: the tokenizer cannot say the text: it is no Unicode text, or characters would be left out.
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
    lost = "".join(" " if place in covered else sign for place, sign in enumerate(text)).split()
    if lost:
        shown = ", ".join(map(repr, dict.fromkeys(lost)))
        raise DataError(f"prompt: the tokenizer has no token for {shown:.{QUOTED_LENGTH}}; leave it out")
    return prepend_begin(tokenizer, encoding.ids, begin=begin)


def prepend_begin(tokenizer: Tokenizer, ids: list[int], *, begin: int) -> list[int]:
    """Token ids of a document after the token that begins it, unless the text named that token itself.

    Chat templates write it. Where names are plain text, no text can name it.
    """
    return ids if not tokenizer.encode_special_tokens and ids[:1] == [begin] else [begin, *ids]
