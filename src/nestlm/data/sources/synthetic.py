"""A source of random text with a little structure, for tests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from typing_extensions import override

from nestlm.data.sources.base import Document, Source

NOUNS = ("cat", "dog", "house", "tree", "river", "boat", "hill", "road")
WORDS = ("the", "a", "old", "new", "red", "sees", "finds", "eats", "under", "over", "and", "then", *NOUNS)


@dataclass(frozen=True)
class Synthetic(Source):
    """Random documents in which each word mostly determines the next one.

    Attributes:
        num_documents: number of documents.
        num_words: number of words of each document.
        seed: seed of all random draws.
    """

    num_documents: int
    num_words: int
    seed: int

    @override
    def documents(self) -> Iterator[Document]:
        for number in range(self.num_documents):
            random = Random(f"{self.seed}/{number}")
            words = [random.choice(WORDS)]
            for _ in range(self.num_words - 1):
                # mostly a fixed successor, so that there is something to learn
                follower = WORDS[(WORDS.index(words[-1]) * 7 + 3) % len(WORDS)]
                words.append(follower if random.random() < 0.8 else random.choice(WORDS))
            yield Document(f"synthetic-{number:05d}", " ".join(words) + ".\n")
