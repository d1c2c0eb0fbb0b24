"""Shard files: token ids, with CRC-32 checksums of their blocks in a second file."""

from __future__ import annotations

import hashlib
import zlib
from pathlib import Path

import numpy as np

from nestlm.data.manifest import CURE, Shard, path_inside, write_file
from nestlm.errors import DataError

BLOCK_BYTES = 2**14  # bytes that one checksum covers


def write_shard(folder: Path, name: str, tokens: np.ndarray) -> Shard:
    """Write NAME with the token ids and NAME.crc with the checksums of its blocks; returns the manifest's entry."""
    content = memoryview(tokens.tobytes())
    sums = [zlib.crc32(content[start : start + BLOCK_BYTES]) for start in range(0, len(content), BLOCK_BYTES)]
    checksums = np.array(sums, dtype="<u4").tobytes()
    write_file(folder / name, content)
    write_file(folder / f"{name}.crc", checksums)
    return Shard(name, len(tokens), hashlib.sha256(checksums).hexdigest())


class ShardReader:
    """Reads token ids of a shard. The constructor checks its size and its checksum file; `read` checks the blocks.

    Args:
        folder: the prepared folder.
        shard: the shard's entry in the manifest.
        dtype: dtype of a token id, `<u2` or `<u4`.
        vocab_size: all token ids are below this.

    Raises:
        DataError: a file is missing, has another size, or has other checksums than the manifest says.
    """

    def __init__(self, folder: Path, shard: Shard, *, dtype: str, vocab_size: int) -> None:
        self.path, self.tokens = path_inside(folder, shard.name), shard.tokens
        self.dtype, self.vocab_size = np.dtype(dtype), vocab_size
        try:
            size = self.path.stat().st_size
            checksums = path_inside(folder, f"{shard.name}.crc").read_bytes()
        except OSError as error:
            raise DataError(f"data: cannot read {error.filename} ({error.strerror}); {CURE}") from error
        if size != shard.tokens * self.dtype.itemsize:
            raise DataError(
                f"data: {self.path} has {size} bytes, wanted {shard.tokens * self.dtype.itemsize}: it was cut or "
                f"exchanged; {CURE}"
            )
        if hashlib.sha256(checksums).hexdigest() != shard.checksums:
            raise DataError(f"data: {self.path}.crc is not what the manifest says: damaged or exchanged; {CURE}")
        self.checksums = np.frombuffer(checksums, dtype="<u4")

    def open(self) -> np.ndarray:
        """Map the shard into memory, as an array of uint8."""
        try:
            return np.memmap(self.path, dtype=np.uint8, mode="r", shape=(self.tokens * self.dtype.itemsize,))
        except (OSError, ValueError) as error:
            raise DataError(f"data: cannot map {self.path} ({error}); {CURE}") from error

    def read(self, mapped: np.ndarray, start: int, stop: int) -> np.ndarray:
        """Copy the tokens from `start` up to `stop` out of the array that `open` returned.

        Raises:
            DataError: a block with these tokens is damaged, or a token id is not in the vocabulary.
        """
        size = self.dtype.itemsize
        first, last = start * size // BLOCK_BYTES, (stop * size - 1) // BLOCK_BYTES
        offset = first * BLOCK_BYTES
        content = mapped[offset : (last + 1) * BLOCK_BYTES].tobytes()  # check and use the same copy
        for block in range(first, last + 1):
            begin = block * BLOCK_BYTES - offset
            if zlib.crc32(content[begin : begin + BLOCK_BYTES]) != self.checksums[block]:
                raise DataError(
                    f"data: {self.path} is damaged in bytes {block * BLOCK_BYTES} to {(block + 1) * BLOCK_BYTES}; "
                    f"{CURE}"
                )
        tokens = np.frombuffer(content, dtype=self.dtype)[start - offset // size : stop - offset // size]
        if tokens.size and int(tokens.max()) >= self.vocab_size:
            raise DataError(
                f"data: {self.path} holds token {int(tokens.max())}, the vocabulary has {self.vocab_size}; "
                "prepare it again with the model's tokenizer"
            )
        return tokens
