"""Translate a tokenizer.json into llama.cpp's vocabulary."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nestlm.errors import ExportError

# Patterns that split texts before merges, and llama.cpp's names for them.
SPLITS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+": "llama-bpe",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": (
        "qwen2"
    ),
}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # llama.cpp's token types
SPACE = "\u2581"  # SentencePiece's character for a space


@dataclass(frozen=True)
class GgufVocabulary:
    """A tokenizer in the form in which GGUF stores it.

    Attributes:
        model: `gpt2` for byte-level byte pair encoding, `llama` for SentencePiece.
        split: llama.cpp's name of how texts are split before merges; `default` for `llama`.
        tokens: texts of the tokens by id, one for each row of the model's embedding.
        kinds: llama.cpp's type of each token.
        merges: merges of `gpt2` in their order; None for `llama`.
        scores: scores of the tokens of `llama`, where the merge with the highest score comes first; None for `gpt2`.
        leading_space: whether `llama` puts a space before a text.
    """

    model: str
    split: str
    tokens: list[str]
    kinds: list[int]
    merges: list[str] | None
    scores: list[float] | None
    leading_space: bool

    @classmethod
    def read(cls, path: Path, *, size: int) -> GgufVocabulary:
        """Read a tokenizer.json for a model with a vocabulary of `size` tokens.

        Raises:
            ExportError: the file cannot be read, or llama.cpp has no counterpart of the tokenizer.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            model, added = data["model"], data["added_tokens"]
            by_id = {index: token for token, index in model["vocab"].items()} | {
                each["id"]: each["content"] for each in added
            }
            kind, merges = model["type"], [tuple(split_merge(merge)) for merge in model["merges"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ExportError(
                f"export: {path} is no tokenizer.json of byte pairs ({error!r}), which GGUF takes"
            ) from error
        tokens = [by_id.get(index, f"[unused {index}]") for index in range(size)]
        kinds = [NORMAL if index in by_id else UNUSED for index in range(size)]
        for each in added:
            if each["id"] >= size:  # the token has no row in the embedding, so no text can hold it
                continue
            kinds[each["id"]] = CONTROL if each["special"] else USER_DEFINED
        steps = list(pipeline_steps(data.get("pre_tokenizer"), "pretokenizers"))
        if kind == "BPE" and any(step["type"] == "ByteLevel" for step in steps):
            split = split_name(steps, data.get("normalizer"), path)
            return cls("gpt2", split, tokens, kinds, [" ".join(merge) for merge in merges], None, False)
        if kind == "BPE" and model.get("byte_fallback"):
            return cls.sentences(data, tokens, kinds, merges, steps)
        raise ExportError(f"export: {path} is a {kind} of neither bytes nor SentencePiece, which llama.cpp lacks")

    @classmethod
    def sentences(
        cls, data: dict[str, Any], tokens: list[str], kinds: list[int], merges: list[tuple[str, ...]], steps: list[Any]
    ) -> GgufVocabulary:
        """Build the vocabulary of a SentencePiece model. The earlier a merge, the higher the score of its token.

        Args:
            data: the content of a tokenizer.json.
            tokens: texts of the tokens by id.
            kinds: types of the tokens, changed in place for bytes and the unknown token.
            merges: pairs of texts, in their order.
            steps: the pre-tokenizer's steps.
        """
        ranks: dict[str, int] = {}
        for rank, pair in enumerate(merges):
            ranks.setdefault("".join(pair), rank)
        unknown = data["model"].get("unk_token")
        for index, token in enumerate(tokens):
            if kinds[index] == NORMAL and len(token) == 6 and token.startswith("<0x"):
                kinds[index] = BYTE
            elif token == unknown:
                kinds[index] = UNKNOWN
        scores = [-float(ranks.get(token, len(merges))) for token in tokens]
        normal = pipeline_steps(data.get("normalizer"), "normalizers")
        leading = any(step["type"] == "Prepend" for step in normal) or any(
            step.get("prepend_scheme") in ("first", "always") for step in steps
        )
        return cls("llama", "default", tokens, kinds, None, scores, leading)


def split_merge(merge: str | list[str]) -> list[str]:
    """Return the two halves of a merge, which older files write as one string and newer files as a list."""
    return merge.split(" ") if isinstance(merge, str) else merge


def pipeline_steps(step: dict[str, Any] | None, key: str) -> Iterator[dict[str, Any]]:
    """Yield the steps of a normalizer or pre-tokenizer of a tokenizer.json.

    Args:
        step: a sequence of steps, a single step, or None for no steps.
        key: the key under which a sequence lists its steps.
    """
    if step is None:
        return
    yield from step[key] if step["type"] == "Sequence" else [step]


def split_name(steps: list[dict[str, Any]], normalizer: Any, path: Path) -> str:
    """Return llama.cpp's name for how a byte-level tokenizer splits texts.

    Args:
        steps: the pre-tokenizer's steps.
        normalizer: the tokenizer's normalizer, or None.
        path: the tokenizer.json, for the error message.

    Raises:
        ExportError: llama.cpp has no name for it.
    """
    *first, last = steps
    if normalizer is None and not last.get("add_prefix_space"):
        if not first and last.get("use_regex", True):
            return "gpt-2"
        patterns = [SPLITS.get(step.get("pattern", {}).get("Regex")) for step in first]
        if len(patterns) == 1 and patterns[0] is not None and not last.get("use_regex", True):
            return patterns[0]
    raise ExportError(
        f"export: llama.cpp has no name for how {path} prepares texts; wanted the way of GPT-2, Llama 3 or Qwen2; "
        "try --format hf"
    )
