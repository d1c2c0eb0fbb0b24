"""What the data stage left: a prepared folder of its own, or the names of those that a run reads in place."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from nestlm.cache import file_identity
from nestlm.data import tokenizer as tokenizers
from nestlm.data.mixed import MixedRows
from nestlm.data.packed import PackedRows
from nestlm.data.shards import CURE, SPLITS, TOKENIZER, Manifest, Split, render, write_file
from nestlm.data.source.base import Portion
from nestlm.data.special_tokens import SpecialTokens, SpecialTokenSettings
from nestlm.errors import DataError

POINTER = "portions.json"


@dataclass(frozen=True)
class Prepared:
    """Prepared folders of one tokenizer, with their manifests."""

    portions: tuple[Portion, ...]
    manifests: tuple[Manifest, ...]
    special_tokens: SpecialTokens

    @classmethod
    def open(cls, portions: Sequence[Portion]) -> Prepared:
        """Read and check the manifests.

        Raises:
            DataError: a folder is not prepared or damaged, or the tokenizers differ.
        """
        manifests = tuple(Manifest.read(path) for path, _ in portions)
        first = manifests[0]
        for (path, _), manifest in zip(portions, manifests, strict=True):
            tokenizer = path / TOKENIZER
            if not tokenizer.is_file() or file_identity(tokenizer) != manifest.tokenizer_hash:
                raise DataError(f"data: {tokenizer} is not what the manifest says; {CURE}")
            if manifest.tokenizer_hash != first.tokenizer_hash or manifest.vocab_size != first.vocab_size:
                raise DataError(
                    f"data.sources: {path} was prepared with another tokenizer than {portions[0].path}; prepare both "
                    "with one"
                )
            if manifest.begin != first.begin:
                raise DataError(
                    f"data.sources: documents of {path} begin with token {manifest.begin}, those of {portions[0].path} "
                    f"with {first.begin}; prepare both with one --begin-token"
                )
        return cls(tuple(portions), manifests, first.special_token_ids)

    @classmethod
    def read(cls, folder: Path) -> Prepared:
        """What a data stage left in its folder. Raises DataError when a folder has changed since."""
        pointer = folder / POINTER
        if not pointer.is_file():
            return cls.open([Portion(folder, 1.0)])
        content = json.loads(pointer.read_bytes())
        entries = content["portions"]
        prepared = cls.open([Portion(Path(entry["path"]), entry["weight"]) for entry in entries])
        for entry, manifest in zip(entries, prepared.manifests, strict=True):
            if manifest.checksum != entry["checksum"]:
                raise DataError(f"data: {entry['path']} has changed since this run began; start the run again")
        return replace(prepared, special_tokens=SpecialTokens(content["begin"], tuple(content["ends"])))

    def write_pointer(self, folder: Path) -> None:
        """Leave the names of the folders, and their tokenizer, in the data stage's folder."""
        write_file(folder / TOKENIZER, (self.portions[0].path / TOKENIZER).read_bytes())
        entries = [
            {"path": str(path.absolute()), "weight": weight, "checksum": manifest.checksum}
            for (path, weight), manifest in zip(self.portions, self.manifests, strict=True)
        ]
        content = {**asdict(self.special_tokens), "portions": entries}
        write_file(folder / POINTER, render(content).encode())

    def of_model(self, *, vocab_size: int, tokenizer_file: Path | None, special: SpecialTokenSettings) -> Prepared:
        """The same folders with the end tokens of a model, or of the user.

        Args:
            vocab_size: V of the model.
            tokenizer_file: the model's tokenizer, where it has one.
            special: what the user says about special tokens.

        Raises:
            DataError: the tokens are not the model's.
        """
        manifest, path = self.manifests[0], self.portions[0].path
        tokenizer = tokenizers.load(path / TOKENIZER)
        for name in SPLITS:
            largest = self.split(name).bound - 1
            tokenizers.check_ids(tokenizer, [largest], vocab_size=vocab_size, where=f"data.path: {path}")
        if tokenizer_file is not None:
            wanted = tokenizers.tokenizer_hash(tokenizers.load(tokenizer_file))
            if wanted != manifest.tokenizer_hash:
                raise DataError(
                    f"data.path: {path} was prepared with another tokenizer than {tokenizer_file}; prepare it with that"
                )
        if special.in_text and not manifest.special_tokens:
            raise DataError(
                f"data.special_tokens: got true, but {path} was prepared without; prepare it with --special-tokens"
            )
        found = special.read(tokenizer, path if tokenizer_file is None else tokenizer_file.parent)
        if found.begin != manifest.begin:
            made, wanted = (tokenizer.id_to_token(index) for index in (manifest.begin, found.begin))
            raise DataError(
                f"data.path: documents of {path} begin with {made!r}, wanted {wanted!r}; prepare it with --begin-token "
                f"{wanted!r}, or set data.begin_token={made!r}"
            )
        return replace(self, special_tokens=found)

    @property
    def fingerprint(self) -> str:
        """Of all texts."""
        return "+".join(manifest.fingerprint for manifest in self.manifests)

    @property
    def identity(self) -> str:
        """Of all tokens, the order of the folders, and their weights."""
        pairs = zip(self.manifests, self.portions, strict=True)
        return render({"portions": [[manifest.checksum, portion.weight] for manifest, portion in pairs]})

    def split(self, name: str) -> Split:
        """What a split holds, over all folders."""
        splits = [manifest.splits[name] for manifest in self.manifests]
        return Split(
            shards=tuple(shard for split in splits for shard in split.shards),
            documents=sum(split.documents for split in splits),
            tokens=sum(split.tokens for split in splits),
            bytes=sum(split.bytes for split in splits),
            bound=max(split.bound for split in splits),
        )

    def rows(self, split: str, *, sequence_length: int) -> PackedRows | MixedRows:
        """The rows of a split. Held-out rows of several folders follow one another."""
        parts = [PackedRows(path, split, sequence_length=sequence_length) for path, _ in self.portions]
        return parts[0] if len(parts) == 1 else MixedRows(parts, [weight for _, weight in self.portions])

    def check(self, *, sequence_length: int) -> None:
        """Raise DataError now, not when a split is first read, for one that is too short or damaged."""
        for split in SPLITS:
            self.rows(split, sequence_length=sequence_length)
