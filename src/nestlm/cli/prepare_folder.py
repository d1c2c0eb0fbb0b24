"""The work of `nestlm prepare`: check its arguments, prepare a folder, and print sizes and speed."""

from __future__ import annotations

import time
from itertools import chain, islice
from pathlib import Path

from nestlm.data import tokenizer as tokenizers
from nestlm.data.manifest import JOURNAL, MANIFEST, TOKENIZER, Manifest
from nestlm.data.preparation import BATCH_BYTES, NO_SETTINGS, batch_documents, prepare_source
from nestlm.data.sources.base import Source
from nestlm.data.sources.hub import PREFIX, HubDataset
from nestlm.data.sources.text import TextFolder
from nestlm.data.special_tokens import SpecialTokenSettings
from nestlm.errors import DataError
from nestlm.utils.console import output
from nestlm.utils.locks import lock_folder

SAMPLED = 4 * BATCH_BYTES  # bytes of text on which the tokenizer is timed alone


def prepare_folder(
    path: str,
    folder: Path,
    *,
    tokenizer: Path,
    text_key: str,
    heldout_share: float,
    shard_tokens: int,
    special: SpecialTokenSettings = NO_SETTINGS,
) -> Manifest:
    """Tokenize texts into a folder of shards, and print its sizes and the speed.

    Args:
        path: a folder of text files, one such file, or hf:NAME.
        folder: the folder to write: a new one, or one that an ended call left.
        tokenizer: a tokenizer.json, or a folder that holds one.
        text_key: the JSON key or column that holds the text.
        heldout_share: share of the bytes in each of calibration and validation.
        shard_tokens: the most tokens of a shard.
        special: what the user says about special tokens.

    Raises:
        DataError: an argument is out of bounds, the texts cannot be read or prepared, or the folder holds other files
            or is part of the text.
    """
    if not 0 < heldout_share < 0.5 or shard_tokens <= 0:
        raise DataError(
            f"nestlm prepare: got --heldout-share {heldout_share} --shard-tokens {shard_tokens}, wanted a share "
            "between 0 and 0.5, and a positive number"
        )
    source = source_from_argument(path, text_key)
    if Path(path).is_dir() and folder.resolve().is_relative_to(Path(path).resolve()):
        raise DataError(f"--out: {folder} lies in {path}, whose text is read; wanted another place")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"--out: cannot make {folder} ({error.strerror}); wanted a folder to write to") from error
    file = tokenizer / TOKENIZER if tokenizer.is_dir() else tokenizer
    with lock_folder(folder, str(folder)):
        check_folder(folder)
        finished = (folder / MANIFEST).is_file()
        timings: dict[str, float] = {}
        manifest = prepare_source(
            source,
            folder,
            vocab_size=None,
            tokenizer_file=file,
            heldout_share=heldout_share,
            shard_tokens=shard_tokens,
            special=special,
            timings=timings,
        )
    splits = ", ".join(f"{split.tokens:,} {name}" for name, split in manifest.splits.items())
    documents = sum(split.documents for split in manifest.splits.values())
    output.print(f"{folder}{' was finished already' if finished else ''}: {documents:,} documents; tokens: {splits}")
    if not finished and timings["tokens"]:
        speed = timings["tokens"] / timings["seconds"]
        output.print(f"{speed:,.0f} tokens/s; the tokenizer alone {measure_tokenizer(source, file):,.0f}")
    return manifest


def check_folder(folder: Path) -> None:
    """Raise DataError if a folder holds files that are not from an ended call of `prepare_folder`."""
    if any((folder / name).is_file() for name in (JOURNAL, MANIFEST)):
        return
    names = [each.name for each in folder.iterdir()]
    others = [name for name in names if not name.startswith(".") and not is_leftover(name)]
    if others:
        raise DataError(f"--out: {folder} holds {sorted(others)[0]}; wanted a new folder, or one to go on with")


def source_from_argument(path: str, text_key: str) -> Source:
    """Return the source that the argument SRC names. Raises DataError if it is a prepared folder."""
    if path.startswith(PREFIX):
        return HubDataset(path.removeprefix(PREFIX), text_key)
    try:
        is_prepared = (Path(path) / MANIFEST).is_file() and (Path(path) / TOKENIZER).is_file()
    except OSError as error:
        raise DataError(f"{path:.100} cannot be read ({error.strerror}); wanted texts") from error
    if is_prepared:
        raise DataError(f"{path} is prepared already; wanted texts")
    return TextFolder(path, text_key)


def is_leftover(name: str) -> bool:
    """Tell whether a file may be from a call that was killed before its first journal entry."""
    return name == TOKENIZER or name.endswith((".bin", ".bin.crc"))


def measure_tokenizer(source: Source, file: Path) -> float:
    """Measure how many tokens a second the tokenizer's own threads reach on the first texts of a source."""
    tokenizer = tokenizers.make_text_encoder(tokenizers.load_tokenizer(file))
    documents = chain.from_iterable(islice(batch_documents(source.documents(), skip=0), SAMPLED // BATCH_BYTES))
    texts = [text for _, text in documents]
    started = time.perf_counter()
    encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return sum(len(encoding) for encoding in encodings) / (time.perf_counter() - started)
