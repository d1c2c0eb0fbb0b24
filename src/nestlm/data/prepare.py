"""From documents to packed token shards on disk, one set a split."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from nestlm.data import tokenizer as tokenizers
from nestlm.data.source.base import Document, Source, fingerprint
from nestlm.errors import DataError
from nestlm.progress import track

SPLITS: tuple[str, ...] = ("train", "calibration", "validation")
SHARD_TOKENS = 2**26
LARGEST_HELDOUT = 0.2  # of a held-out split, for one document
ENCODE_TOGETHER = 64  # documents that the tokenizer takes at once


@dataclass(frozen=True)
class Split:
    """What a split holds."""

    shards: tuple[str, ...]
    documents: int
    tokens: int
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """What a folder of shards holds, and what it was made from."""

    fingerprint: str
    tokenizer_hash: str
    vocab_size: int
    separator: int
    splits: dict[str, Split]

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read `manifest.json` of a prepared folder."""
        fields = json.loads((folder / "manifest.json").read_text())
        fields["splits"] = {
            name: Split(**(split | {"shards": tuple(split["shards"])})) for name, split in fields["splits"].items()
        }
        return cls(**fields)


def prepare(
    source: Source, folder: Path, *, vocab_size: int, tokenizer_file: Path | None, heldout_share: float
) -> Manifest:
    """Tokenize a source into `folder`: shards, tokenizer.json and manifest.json.

    Args:
        source: where the documents come from.
        folder: an existing folder, written into.
        vocab_size: V of the model; a tokenizer of that size is trained on the training split.
        tokenizer_file: a tokenizer to use instead of training one.
        heldout_share: share of the bytes in each of the calibration and validation splits.

    Raises:
        DataError: too few documents, or a tokenizer that does not suit the model.
    """
    sizes = {name: len(text.encode()) for name, text in source.documents()}
    split_of = assign_splits(sizes, heldout_share=heldout_share)
    if tokenizer_file is None:
        texts = (text for name, text in source.documents() if split_of[name] == "train")
        tokenizer = tokenizers.train(texts, vocab_size=vocab_size)
    else:
        tokenizer = tokenizers.load(tokenizer_file)
    if tokenizer.get_vocab_size() > vocab_size:
        raise DataError(
            f"data.tokenizer: has {tokenizer.get_vocab_size()} tokens, model.vocab_size is {vocab_size}; "
            "wanted the model's own tokenizer"
        )
    serialized = tokenizer.to_str()
    tokenizer.encode_special_tokens = True  # a separator's name in a text is text
    (folder / "tokenizer.json").write_text(serialized, encoding="utf-8")
    manifest = Manifest(
        fingerprint=fingerprint(source.documents()),
        tokenizer_hash=hashlib.sha256(serialized.encode()).hexdigest(),
        vocab_size=vocab_size,
        separator=tokenizers.separator_id(tokenizer),
        splits=write_splits(source, folder, tokenizer=tokenizer, split_of=split_of, vocab_size=vocab_size),
    )
    fields = manifest.__dict__ | {"splits": {name: split.__dict__ for name, split in manifest.splits.items()}}
    (folder / "manifest.json").write_text(json.dumps(fields, indent=2))
    return manifest


def assign_splits(sizes: dict[str, int], *, heldout_share: float) -> dict[str, str]:
    """Split by document, in the order of their names' hashes, so that adding one moves few others.

    Args:
        sizes: bytes of each document.
        heldout_share: share of all bytes that each of validation and calibration is filled up to. A document larger
            than a fifth of that goes to training, so that none dominates what is measured, unless too few are smaller.

    Raises:
        DataError: nothing would be left to train on.
    """
    target = heldout_share * sum(sizes.values())
    by_hash = sorted(sizes, key=lambda name: hashlib.sha256(name.encode()).digest())
    by_hash.sort(key=lambda name: sizes[name] > target * LARGEST_HELDOUT)  # stable: large ones last
    splits = dict.fromkeys(by_hash, "train")
    waiting = iter(by_hash)
    for split in ("validation", "calibration"):
        filled = 0
        while filled < target:
            name = next(waiting, None)
            if name is None:
                break
            splits[name] = split
            filled += sizes[name]
    if set(splits.values()) != set(SPLITS):
        raise DataError(f"data: {len(sizes)} documents don't split into {', '.join(SPLITS)}; bring more files")
    return splits


def write_splits(
    source: Source, folder: Path, *, tokenizer: Tokenizer, split_of: dict[str, str], vocab_size: int
) -> dict[str, Split]:
    """Write every split's shards; a separator stands before each document."""
    dtype = np.uint16 if vocab_size <= 2**16 else np.uint32
    separator = tokenizers.separator_id(tokenizer)
    pending: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    waiting = dict.fromkeys(SPLITS, 0)
    written: dict[str, Split] = {split: Split((), 0, 0, 0) for split in SPLITS}

    def flush(split: str) -> None:
        if pending[split]:
            name = f"{split}-{len(written[split].shards):05d}.npy"
            np.save(folder / name, np.concatenate(pending[split]))
            pending[split], waiting[split] = [], 0
            total = written[split]
            written[split] = Split((*total.shards, name), total.documents, total.tokens, total.bytes)

    for documents in track(chunks(source.documents()), "tokenize", total=math.ceil(len(split_of) / ENCODE_TOGETHER)):
        encoded = tokenizer.encode_batch([text for _, text in documents], add_special_tokens=False)
        for document, encoding in zip(documents, encoded, strict=True):
            split = split_of[document.name]
            tokens = np.array([separator, *encoding.ids], dtype=dtype)
            pending[split].append(tokens)
            total = written[split]
            size = len(document.text.encode())
            written[split] = Split(total.shards, total.documents + 1, total.tokens + len(tokens), total.bytes + size)
            waiting[split] += len(tokens)
            if waiting[split] >= SHARD_TOKENS:
                flush(split)
    for split in SPLITS:
        flush(split)
    return written


def chunks(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """Documents in lists of ENCODE_TOGETHER."""
    group: list[Document] = []
    for document in documents:
        group.append(document)
        if len(group) == ENCODE_TOGETHER:
            yield group
            group = []
    if group:
        yield group
