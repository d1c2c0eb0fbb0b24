"""The first pass over a source: which documents there are, and which split each belongs to."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from nestlm.data.shards import SPLITS
from nestlm.data.source.base import Document, Fingerprint
from nestlm.errors import DataError

LARGEST_HELDOUT = 0.2  # of a held-out split, for one document
HELDOUT = ("validation", "calibration")  # in the order in which they are filled


@dataclass(frozen=True)
class Survey:
    """All documents of a source, 16 bytes each.

    Attributes:
        ranks: the first 64 bits of the hash of each name.
        sizes: bytes of each text.
        fingerprint: of all names and texts.
    """

    ranks: np.ndarray
    sizes: np.ndarray
    fingerprint: str

    @classmethod
    def of(cls, documents: Iterable[Document]) -> Survey:
        """Go through the documents once."""
        ranks, sizes, fingerprint = array("Q"), array("Q"), Fingerprint()
        for name, text in documents:
            ranks.append(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big"))
            sizes.append(fingerprint.add(name, text))
        return cls(np.array(ranks, np.uint64), np.array(sizes, np.uint64), fingerprint.hexdigest())

    @property
    def num_bytes(self) -> int:
        """Of all texts."""
        return int(self.sizes.sum())

    def splits(self, *, heldout_share: float) -> np.ndarray:
        """Split by document, in the order of their names' hashes, so that adding one moves few others.

        Args:
            heldout_share: share of all bytes that each of validation and calibration is filled up to. A document
                larger than a fifth of that goes to training, so that none dominates what is measured, unless too few
                are smaller.

        Returns:
            Each document's split, as an index into SPLITS.

        Raises:
            DataError: nothing would be left to train on.
        """
        target = heldout_share * self.num_bytes
        order = np.lexsort((self.ranks, self.sizes > target * LARGEST_HELDOUT))  # large ones last
        splits, start = np.zeros(len(order), dtype=np.uint8), 0
        for split in HELDOUT:
            filled = np.cumsum(self.sizes[order[start:]])
            stop = start + int(np.searchsorted(filled, target)) + 1
            splits[order[start:stop]] = SPLITS.index(split)
            start = stop
        if len(np.unique(splits)) != len(SPLITS):
            raise DataError(f"data: {len(order)} documents don't split into {', '.join(SPLITS)}; bring more files")
        return splits
