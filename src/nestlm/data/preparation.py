"""From documents to packed token shards on disk, one set a split. What is killed goes on after the last full shard."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Encoding, Tokenizer

from nestlm.data import tokenizer as tokenizers
from nestlm.data.document_scan import DocumentScan
from nestlm.data.manifest import (
    JOURNAL,
    MANIFEST,
    SPLITS,
    TOKENIZER,
    Manifest,
    ShardReader,
    Split,
    check_counts,
    render_json,
    write_file,
    write_shard,
)
from nestlm.data.prefetch import prefetch
from nestlm.data.sources.base import Document, Source
from nestlm.data.special_tokens import SpecialTokenSettings, SpecialTokenWarner
from nestlm.errors import DataError
from nestlm.utils.console import progress_bar, track

SHARD_TOKENS = 2**26
BATCH_BYTES = 2**21  # of text that the tokenizer's threads share out at once
MB = 1e6
NO_SETTINGS = SpecialTokenSettings()


def prepare_source(
    source: Source,
    folder: Path,
    *,
    vocab_size: int | None,
    tokenizer_file: Path | None,
    heldout_share: float | None,
    special: SpecialTokenSettings = NO_SETTINGS,
    shard_tokens: int = SHARD_TOKENS,
    timings: dict[str, float] | None = None,
) -> Manifest:
    """Tokenize a source into `folder`: shards, tokenizer.json and, last of all, manifest.json.

    Args:
        source: where the documents come from.
        folder: an existing folder, written into. What an interrupted call left there is gone on with; a finished
            folder stays as it is.
        vocab_size: V of the model; without a file a tokenizer of that size is trained on the training split. None
            takes any tokenizer.
        tokenizer_file: a tokenizer to use instead of training one.
        heldout_share: share of the bytes in each of the calibration and validation splits; None: nothing is split, all
            of it is validation.
        special: what the user says about special tokens.
        shard_tokens: a shard is closed at this many.
        timings: is told the `tokens` that were made, and the `seconds` that this took once the source was surveyed.

    Raises:
        DataError: too few documents, a tokenizer that does not suit the model, or a folder that was begun from
            something else.
    """
    survey = DocumentScan.of(track(source.documents(), "survey"))
    split_of = survey.splits(heldout_share=heldout_share)
    tokenizer = choose_tokenizer(source, split_of, vocab_size=vocab_size, tokenizer_file=tokenizer_file)
    size = tokenizers.id_bound(tokenizer)
    if vocab_size is not None:
        tokenizers.check_vocabulary(tokenizer, vocab_size=vocab_size)
    around = special.read(tokenizer, None if tokenizer_file is None else tokenizer_file.parent)
    manifest = Manifest(
        fingerprint=survey.fingerprint,
        tokenizer_hash=tokenizers.hash_tokenizer(tokenizer),
        vocab_size=size if vocab_size is None else min(size, vocab_size),
        begin=around.begin,
        ends=around.ends,
        special_tokens=special.in_text,
        dtype="<u2" if size <= 2**16 else "<u4",
        heldout_share=heldout_share,
        shard_tokens=shard_tokens,
        splits={name: Split() for name in SPLITS},
    )
    if (folder / MANIFEST).is_file():
        finished = Manifest.read(folder)
        check_same_plan(finished, manifest, folder)
        (folder / JOURNAL).unlink(missing_ok=True)
        return finished
    write_file(folder / TOKENIZER, tokenizer.to_str().encode())
    writer, started = ShardWriter.resume(folder, manifest), time.monotonic()
    before = writer.manifest.num_tokens
    encoder = tokenizers.make_text_encoder(tokenizer, special_tokens=special.in_text)
    names = special.plain_name_warner(encoder)
    write_documents(source, writer, survey=survey, split_of=split_of, tokenizer=encoder, names=names)
    manifest = writer.finish()
    if timings is not None:
        timings |= {"tokens": manifest.num_tokens - before, "seconds": time.monotonic() - started}
    return manifest


def choose_tokenizer(
    source: Source, split_of: np.ndarray, *, vocab_size: int | None, tokenizer_file: Path | None
) -> Tokenizer:
    """The given tokenizer, or one that is trained on the training split."""
    if tokenizer_file is not None:
        return tokenizers.load_tokenizer(tokenizer_file)
    if vocab_size is None:
        raise DataError("data.tokenizer: got none, and no vocabulary size to train one of; name a tokenizer.json")
    train = SPLITS.index("train")
    texts = (text for split, (_, text) in zip(split_of, source.documents(), strict=True) if split == train)
    return tokenizers.train_tokenizer(texts, vocab_size=vocab_size)


def check_same_plan(begun: Manifest, wanted: Manifest, folder: Path) -> None:
    """Raise DataError, naming the difference, where a folder was begun from something else."""
    other, plan = asdict(begun), asdict(wanted)
    for name, value in plan.items():
        if name != "splits" and other[name] != value:
            raise DataError(
                f"data: {folder} was begun with {name} {other[name]}, now it is {value}; use another folder, or remove "
                "this one"
            )


@dataclass
class ShardWriter:
    """Collects the tokens of documents, and writes all splits' shards and the journal when one is full.

    Attributes:
        folder: where to.
        manifest: with the splits as far as they are written.
        consumed: documents that are in them.
        pending: tokens of documents that are not, by split, with their bytes.
    """

    folder: Path
    manifest: Manifest
    consumed: int
    pending: dict[str, list[np.ndarray]]
    pending_bytes: dict[str, int]
    waiting: dict[str, int]

    @classmethod
    def resume(cls, folder: Path, manifest: Manifest) -> ShardWriter:
        """Go on after the journal's last entry, or begin. Raises DataError when it is of another corpus or plan."""
        path, consumed = folder / JOURNAL, 0
        if path.is_file():
            try:
                entry = json.loads(path.read_bytes())
                check_counts(consumed := entry["consumed"])
                begun = Manifest.from_json(entry["manifest"])
            except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise DataError(f"data: {path} is damaged ({error!r:.100}); remove the folder, begin again") from error
            check_same_plan(begun, manifest, folder)
            for split in begun.splits.values():
                for shard in split.shards:
                    ShardReader(folder, shard, dtype=begun.dtype, vocab_size=begun.vocab_size)
            manifest = begun
        writer = cls(folder, manifest, consumed, {}, {}, {})
        writer.empty()
        return writer

    def empty(self) -> None:
        """Nothing is pending."""
        self.pending = {name: [] for name in SPLITS}
        self.pending_bytes, self.waiting = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0)

    def add(self, split: str, ids: list[int], *, num_bytes: int) -> None:
        """Take a document, which begins with the begin token."""
        tokens = np.array(ids, dtype=self.manifest.dtype)
        self.pending[split].append(tokens)
        self.pending_bytes[split] += num_bytes
        self.waiting[split] += len(tokens)
        if self.waiting[split] >= self.manifest.shard_tokens:
            self.flush()

    def flush(self) -> None:
        """Write what is pending, then the journal: only what it names counts."""
        splits = dict(self.manifest.splits)
        for name, arrays in self.pending.items():
            if arrays:
                old = splits[name]
                shard = write_shard(self.folder, f"{name}-{len(old.shards):05d}.bin", np.concatenate(arrays))
                splits[name] = Split(
                    shards=(*old.shards, shard),
                    documents=old.documents + len(arrays),
                    bound=max(old.bound, *(int(array.max()) + 1 for array in arrays)),
                    tokens=old.tokens + shard.tokens,
                    bytes=old.bytes + self.pending_bytes[name],
                )
        self.manifest = replace(self.manifest, splits=splits)
        self.consumed += sum(map(len, self.pending.values()))
        self.empty()
        entry: dict[str, Any] = {"consumed": self.consumed, "manifest": asdict(self.manifest)}
        write_file(self.folder / JOURNAL, render_json(entry).encode())

    def finish(self) -> Manifest:
        """Write the rest and the manifest."""
        self.flush()
        self.manifest.write(self.folder)
        (self.folder / JOURNAL).unlink()
        return self.manifest


def write_documents(
    source: Source,
    writer: ShardWriter,
    *,
    survey: DocumentScan,
    split_of: np.ndarray,
    tokenizer: Tokenizer,
    names: SpecialTokenWarner,
) -> None:
    """Tokenize all documents that the writer has not got yet; reading, tokenizing and writing overlap."""
    manifest, number, done = writer.manifest, writer.consumed, float(survey.sizes[: writer.consumed].sum()) / MB
    total, tokens, started = survey.num_bytes / MB, 0, time.monotonic()
    batches = prefetch(batch_documents(source.documents(), skip=writer.consumed))
    with progress_bar("MB, {task.fields[speed]} tokens/s") as progress, ThreadPoolExecutor(1) as pool:
        bar = progress.add_task("tokenize", total=round(total), completed=round(done), speed="")
        for documents, encodings in encode_batches(batches, tokenizer, pool):
            for document, encoding in zip(documents, encodings, strict=True):
                num_bytes = len(document.text.encode())
                if number >= len(survey.sizes) or num_bytes != survey.sizes[number]:
                    raise DataError(f"data: {document.name} has changed while it was read; run this again")
                names.look(document.text)
                ids = tokenizers.prepend_begin(tokenizer, encoding.ids, begin=manifest.begin)
                tokenizers.check_token_ids(
                    tokenizer, ids, vocab_size=manifest.vocab_size, where=f"data: {document.name}"
                )
                writer.add(SPLITS[split_of[number]], ids, num_bytes=num_bytes)
                number, done, tokens = number + 1, done + num_bytes / MB, tokens + len(ids)
            speed = tokens / (time.monotonic() - started)
            progress.update(bar, completed=round(done), speed=f"{speed:,.0f}")
    if number != len(survey.sizes):
        raise DataError(f"data: the source has {number} documents, it had {len(survey.sizes)}; run this again")


def batch_documents(documents: Iterator[Document], *, skip: int) -> Iterator[list[Document]]:
    """Documents in lists of about BATCH_BYTES, without the first ones."""
    group, size = list[Document](), 0
    for number, document in enumerate(documents):
        if number < skip:
            continue
        group.append(document)
        size += len(document.text)
        if size >= BATCH_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def encode_batches(
    batches: Iterator[list[Document]], tokenizer: Tokenizer, pool: ThreadPoolExecutor
) -> Iterator[tuple[list[Document], list[Encoding]]]:
    """Batches with their encodings; the next one is encoded while the caller works on this one."""

    def encode(documents: list[Document]) -> list[Encoding]:
        return tokenizer.encode_batch_fast([text for _, text in documents], add_special_tokens=False)

    current = next(batches, None)
    future = pool.submit(encode, current) if current is not None else None
    while current is not None and future is not None:
        following = next(batches, None)
        next_future = pool.submit(encode, following) if following is not None else None
        yield current, future.result()
        current, future = following, next_future
