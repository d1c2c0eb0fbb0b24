"""The first pass over a source: which documents there are, and which split each belongs to."""

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

LARGEST_HELDOUT = 0.2  # of a held-out split, for one document
HELDOUT = ("validation", "calibration")  # in the order in which they are filled


@dataclass(frozen=True)
class DocumentScan:
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
    def of(cls, documents: Iterable[Document]) -> DocumentScan:
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

    def splits(self, *, heldout_share: float | None) -> np.ndarray:
        """Split by document, in the order of their names' hashes, so that adding one moves few others.

        Args:
            heldout_share: share of all bytes that each of validation and calibration is filled up to. A document
                larger than a fifth of that goes to training, so that none dominates what is measured, unless too few
                are smaller; where nothing would be left to train on, less is held out. None: all is validation.

        Returns:
            Each document's split, as an index into SPLITS.

        Raises:
            DataError: there are too few documents to split.
        """
        if heldout_share is None:
            return np.full(len(self.sizes), SPLITS.index("validation"), dtype=np.uint8)
        if len(self.sizes) < len(SPLITS):
            raise DataError(
                f"data: got {len(self.sizes)} documents, wanted at least {len(SPLITS)}: each belongs to one of "
                f"{', '.join(SPLITS)}; cut the text into more files, or lines of a .jsonl file"
            )
        share, splits = heldout_share, self.split_at(heldout_share)
        while len(np.unique(splits)) != len(SPLITS):
            share /= 2
            splits = self.split_at(share, largest_last=True)
        if share != heldout_share:
            console.print(
                f"data: a share of {share:.3g} is held out for validation, and for calibration, instead of "
                f"{heldout_share} (heldout_share): large documents leave no more beside a training text",
                highlight=False,
            )
        return splits

    def split_at(self, share: float, *, largest_last: bool = False) -> np.ndarray:
        """Each document's split with so much held out; perhaps nothing is left to train on."""
        target = share * self.num_bytes
        is_last = (np.arange(len(self.sizes)) == np.argmax(self.sizes)) & largest_last
        order = np.lexsort((self.ranks, self.sizes > target * LARGEST_HELDOUT, is_last))  # large ones last
        splits, start = np.zeros(len(order), dtype=np.uint8), 0
        for split in HELDOUT:
            filled = np.cumsum(self.sizes[order[start:]])
            stop = start + int(np.searchsorted(filled, target)) + 1
            splits[order[start:stop]] = SPLITS.index(split)
            start = stop
        return splits
