"""Tokenizes the documents of a source into a prepared folder: packed shards, tokenizer and manifest."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tokenizers import Encoding, Tokenizer

from nestlm.data import tokenizer as tokenizers
from nestlm.data.document_scan import DocumentScan
from nestlm.data.manifest import JOURNAL, MANIFEST, SPLITS, TOKENIZER, Manifest, Split, write_file
from nestlm.data.prefetch import prefetch
from nestlm.data.shard_writer import ShardWriter, check_same_plan
from nestlm.data.sources.base import Document, Source
from nestlm.data.special_tokens import SpecialTokenSettings, SpecialTokenWarner
from nestlm.errors import DataError
from nestlm.utils.console import progress_bar, track

SHARD_TOKENS = 2**26
BATCH_BYTES = 2**21  # of text that the tokenizer's threads divide among themselves
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

    An interrupted call is resumed after its last full shard; a finished folder is left unchanged.

    Args:
        source: where the documents come from.
        folder: an existing folder.
        vocab_size: vocabulary size of the model, V; without `tokenizer_file`, a tokenizer of this size is trained on
            the training split. None accepts any tokenizer.
        tokenizer_file: a tokenizer.json to use instead of training one.
        heldout_share: share of the bytes in each of the calibration and validation splits; None puts all documents
            into the validation split.
        special: the user's settings for special tokens.
        shard_tokens: a shard is closed when it has this many tokens.
        timings: receives the number of new `tokens`, and the `seconds` that they took after the first pass.

    Raises:
        DataError: there are too few documents, the tokenizer does not suit the model, or the folder was begun from
            other documents or with other settings.
    """
    scan = DocumentScan.of(track(source.documents(), "scan"))
    split_of = scan.splits(heldout_share=heldout_share)
    tokenizer = choose_tokenizer(source, split_of, vocab_size=vocab_size, tokenizer_file=tokenizer_file)
    manifest = plan_manifest(
        scan,
        tokenizer,
        vocab_size=vocab_size,
        tokenizer_folder=None if tokenizer_file is None else tokenizer_file.parent,
        heldout_share=heldout_share,
        special=special,
        shard_tokens=shard_tokens,
    )
    if (folder / MANIFEST).is_file():
        finished = Manifest.read(folder)
        check_same_plan(finished, manifest, folder)
        (folder / JOURNAL).unlink(missing_ok=True)
        return finished
    write_file(folder / TOKENIZER, tokenizer.to_str().encode())
    writer, started = ShardWriter.resume(folder, manifest), time.monotonic()
    resumed_tokens = writer.manifest.num_tokens
    encoder = tokenizers.make_text_encoder(tokenizer, special_tokens=special.in_text)
    write_documents(
        source, writer, scan=scan, split_of=split_of, tokenizer=encoder, warner=special.make_warner(encoder)
    )
    manifest = writer.finish()
    if timings is not None:
        timings |= {"tokens": manifest.num_tokens - resumed_tokens, "seconds": time.monotonic() - started}
    return manifest


def choose_tokenizer(
    source: Source, split_of: np.ndarray, *, vocab_size: int | None, tokenizer_file: Path | None
) -> Tokenizer:
    """Load the given tokenizer, or train one on the training split.

    Args:
        source: the documents.
        split_of: the split of each document, as an index into SPLITS.
        vocab_size: size of a tokenizer to train.
        tokenizer_file: the tokenizer.json to load; None trains one.

    Raises:
        DataError: there is neither a file nor a size, or the file or the text does not yield a tokenizer.
    """
    if tokenizer_file is not None:
        return tokenizers.load_tokenizer(tokenizer_file)
    if vocab_size is None:
        raise DataError("data.tokenizer: got none, and no vocabulary size to train one of; name a tokenizer.json")
    train = SPLITS.index("train")
    texts = (text for split, (_, text) in zip(split_of, source.documents(), strict=True) if split == train)
    return tokenizers.train_tokenizer(texts, vocab_size=vocab_size)


def plan_manifest(
    scan: DocumentScan,
    tokenizer: Tokenizer,
    *,
    vocab_size: int | None,
    tokenizer_folder: Path | None,
    heldout_share: float | None,
    special: SpecialTokenSettings,
    shard_tokens: int,
) -> Manifest:
    """Build the manifest of a folder that holds no shard yet; its splits are empty.

    `tokenizer_folder` is the folder of the tokenizer.json, whose other files may name special tokens; see
    `prepare_source` for the other arguments.

    Raises:
        DataError: the tokenizer has more tokens than the model, or no token that begins a text.
    """
    size = tokenizers.id_bound(tokenizer)
    if vocab_size is not None:
        tokenizers.check_vocabulary(tokenizer, vocab_size=vocab_size)
    around = special.read(tokenizer, tokenizer_folder)
    return Manifest(
        fingerprint=scan.fingerprint,
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


def write_documents(
    source: Source,
    writer: ShardWriter,
    *,
    scan: DocumentScan,
    split_of: np.ndarray,
    tokenizer: Tokenizer,
    warner: SpecialTokenWarner,
) -> None:
    """Tokenize the documents that the writer does not have yet; reading, tokenizing and writing overlap.

    Args:
        source: the documents.
        writer: receives them.
        scan: the sizes that the first pass found.
        split_of: the split of each document, as an index into SPLITS.
        tokenizer: the tokenizer as `make_text_encoder` returns it.
        warner: sees every text.

    Raises:
        DataError: the documents changed after the first pass, or hold a token that the model lacks.
    """
    manifest, number = writer.manifest, writer.num_consumed
    done, total, tokens, started = float(scan.sizes[:number].sum()) / MB, scan.num_bytes / MB, 0, time.monotonic()
    batches = prefetch(batch_documents(source.documents(), skip=number))
    with progress_bar("MB, {task.fields[speed]} tokens/s") as progress, ThreadPoolExecutor(1) as pool:
        bar = progress.add_task("tokenize", total=round(total), completed=round(done), speed="")
        for documents, encodings in encode_batches(batches, tokenizer, pool):
            for document, encoding in zip(documents, encodings, strict=True):
                num_bytes = len(document.text.encode())
                if number >= len(scan.sizes) or num_bytes != scan.sizes[number]:
                    raise DataError(f"data: {document.name} has changed while it was read; run this again")
                warner.check(document.text)
                ids = tokenizers.prepend_begin(tokenizer, encoding.ids, begin=manifest.begin)
                where = f"data: {document.name}"
                tokenizers.check_token_ids(tokenizer, ids, vocab_size=manifest.vocab_size, where=where)
                writer.add(SPLITS[split_of[number]], ids, num_bytes=num_bytes)
                number, done, tokens = number + 1, done + num_bytes / MB, tokens + len(ids)
            speed = tokens / (time.monotonic() - started)
            progress.update(bar, completed=round(done), speed=f"{speed:,.0f}")
    if number != len(scan.sizes):
        raise DataError(f"data: the source has {number} documents, it had {len(scan.sizes)}; run this again")


def batch_documents(documents: Iterator[Document], *, skip: int) -> Iterator[list[Document]]:
    """Group documents into lists of about BATCH_BYTES of text, leaving out the first `skip` documents."""
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
    """Yield each batch with its encodings; `pool` encodes the next batch while the caller handles the current one."""

    def encode(documents: list[Document]) -> list[Encoding]:
        return tokenizer.encode_batch_fast([text for _, text in documents], add_special_tokens=False)

    current = next(batches, None)
    future = pool.submit(encode, current) if current is not None else None
    while current is not None and future is not None:
        following = next(batches, None)
        next_future = pool.submit(encode, following) if following is not None else None
        yield current, future.result()
        current, future = following, next_future
