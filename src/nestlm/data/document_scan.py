"""The first pass over a source: sizes and name hashes of its documents, and the split of each."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from nestlm.data.manifest import SPLITS
from nestlm.data.sources.base import Document, Fingerprint
from nestlm.errors import DataError
from nestlm.utils.console import console

LARGEST_HELDOUT = 0.2  # share of a held-out split that one document may have
HELDOUT = ("validation", "calibration")  # filled in this order


@dataclass(frozen=True)
class DocumentScan:
    """Sizes and name hashes of a source's documents, in their order: 16 bytes a document.

    Attributes:
        name_hashes: the first 64 bits of the SHA-256 of each name, uint64.
        sizes: bytes of each text in UTF-8, uint64.
        fingerprint: SHA-256 over all names and texts.
    """

    name_hashes: np.ndarray
    sizes: np.ndarray
    fingerprint: str

    @classmethod
    def of(cls, documents: Iterable[Document]) -> DocumentScan:
        """Read all documents once."""
        hashes, sizes, fingerprint = array("Q"), array("Q"), Fingerprint()
        for name, text in documents:
            hashes.append(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big"))
            sizes.append(fingerprint.add(name, text))
        return cls(np.array(hashes, np.uint64), np.array(sizes, np.uint64), fingerprint.hexdigest())

    @property
    def num_bytes(self) -> int:
        """Bytes of all texts together."""
        return int(self.sizes.sum())

    def splits(self, *, heldout_share: float | None) -> np.ndarray:
        """Assign each document to a split, in the order of the name hashes, so that adding a document moves few others.

        Args:
            heldout_share: share of all bytes in each of validation and calibration. A document larger than a fifth of
                such a split goes to training, so that none dominates an evaluation, unless too few are smaller. If no
                training text were left, less is held out. None puts all documents into validation.

        Returns:
            The split of each document as an index into SPLITS, uint8.

        Raises:
            DataError: there are fewer documents than splits.
        """
        if heldout_share is None:
            return np.full(len(self.sizes), SPLITS.index("validation"), dtype=np.uint8)
        if len(self.sizes) < len(SPLITS):
            raise DataError(
                f"data: got {len(self.sizes)} documents, wanted at least {len(SPLITS)}: each belongs to one of "
                f"{', '.join(SPLITS)}; cut the text into more files, or lines of a .jsonl file"
            )
        share, splits = heldout_share, self.fill_splits(heldout_share)
        while len(np.unique(splits)) != len(SPLITS):
            share /= 2
            splits = self.fill_splits(share, largest_last=True)
        if share != heldout_share:
            console.print(
                f"data: a share of {share:.3g} is held out for validation, and for calibration, instead of "
                f"{heldout_share} (heldout_share): large documents leave no more beside a training text",
                highlight=False,
            )
        return splits

    def fill_splits(self, share: float, *, largest_last: bool = False) -> np.ndarray:
        """Fill validation, then calibration, up to `share` of all bytes; the rest, which may be nothing, is training.

        Args:
            share: share of all bytes in each held-out split.
            largest_last: hold out the largest document only after all others.

        Returns:
            The split of each document as an index into SPLITS, uint8.
        """
        target = share * self.num_bytes
        is_last = (np.arange(len(self.sizes)) == np.argmax(self.sizes)) & largest_last
        order = np.lexsort((self.name_hashes, self.sizes > target * LARGEST_HELDOUT, is_last))  # large ones last
        splits, start = np.zeros(len(order), dtype=np.uint8), 0
        for split in HELDOUT:
            filled = np.cumsum(self.sizes[order[start:]])
            stop = start + int(np.searchsorted(filled, target)) + 1
            splits[order[start:stop]] = SPLITS.index(split)
            start = stop
        return splits
