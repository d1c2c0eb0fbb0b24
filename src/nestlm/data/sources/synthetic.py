"""Made-up text with a little structure, for tests: no file is read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from nestlm.data.sources.base import Document

NOUNS = ("cat", "dog", "house", "tree", "river", "boat", "hill", "road")
WORDS = ("the", "a", "old", "new", "red", "sees", "finds", "eats", "under", "over", "and", "then", *NOUNS)


@dataclass(frozen=True)
class Synthetic:
    """`num_documents` documents of `num_words` words each, drawn by a two-word memory that the seed sets."""

    num_documents: int
    num_words: int
    seed: int

    def documents(self) -> Iterator[Document]:
        for number in range(self.num_documents):
            random = Random(f"{self.seed}/{number}")
            words = [random.choice(WORDS)]
            for _ in range(self.num_words - 1):
                # Mostly a fixed successor, so that there is something to learn.
                follower = WORDS[(WORDS.index(words[-1]) * 7 + 3) % len(WORDS)]
                words.append(follower if random.random() < 0.8 else random.choice(WORDS))
            yield Document(f"synthetic-{number:05d}", " ".join(words) + ".\n")
