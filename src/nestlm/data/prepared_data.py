"""The prepared folders of a run: the data stage's own, or those of the user with copies of their held-out parts."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from nestlm.data import tokenizer as tokenizers
from nestlm.data.manifest import CURE, SPLITS, TOKENIZER, Manifest, Split, path_inside, render_json, write_file
from nestlm.data.mixed_rows import MixedRows
from nestlm.data.packed_rows import PackedRows
from nestlm.data.sources.base import Portion
from nestlm.data.special_tokens import SpecialTokens, SpecialTokenSettings
from nestlm.errors import DataError
from nestlm.utils.json_files import read_json

POINTER = "portions.json"
PORTION = "portion-{}"  # folder with the held-out splits of a portion


@dataclass(frozen=True)
class PreparedData:
    """Prepared folders with one tokenizer.

    Attributes:
        portions: the folders and their sampling weights.
        manifests: the manifest of each folder.
        tokenizer_file: the tokenizer.json that all of them share.
        special_tokens: ids of the tokens that begin and end a text.
    """

    portions: tuple[Portion, ...]
    manifests: tuple[Manifest, ...]
    tokenizer_file: Path
    special_tokens: SpecialTokens

    @classmethod
    def open(cls, portions: Sequence[Portion]) -> PreparedData:
        """Open complete prepared folders.

        Raises:
            DataError: a folder is not prepared or is damaged, or the tokenizers differ.
        """
        return cls.open_checked(portions, [path_inside(path, TOKENIZER) for path, _ in portions])

    @classmethod
    def open_checked(cls, portions: Sequence[Portion], tokenizer_files: Sequence[Path]) -> PreparedData:
        """Read the manifests and compare their tokenizers.

        Args:
            portions: the folders.
            tokenizer_files: the tokenizer.json of each folder.

        Raises:
            DataError: a folder is not prepared or is damaged, or tokenizers or begin tokens differ.
        """
        manifests = tuple(Manifest.read(path) for path, _ in portions)
        first = manifests[0]
        for (path, _), manifest, file in zip(portions, manifests, tokenizer_files, strict=True):
            if not file.is_file() or tokenizers.hash_tokenizer_file(file) != manifest.tokenizer_hash:
                raise DataError(f"data: {file} is not what the manifest says; {CURE}")
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
        return cls(tuple(portions), manifests, tokenizer_files[0], first.special_token_ids)

    @classmethod
    def read(cls, folder: Path) -> PreparedData:
        """Open the output of a data stage: its prepared folder, or the held-out splits of folders that stay elsewhere.

        Raises:
            DataError: a file is missing or damaged.
        """
        pointer = folder / POINTER
        if not pointer.is_file():
            return cls.open([Portion(folder, 1.0)])
        content = read_json(pointer, cure="do the run again")
        try:
            portions = [
                Portion(folder / PORTION.format(number), float(weight))
                for number, weight in enumerate(content["weights"])
            ]
            special = SpecialTokens(int(content["begin"]), tuple(map(int, content["ends"])))
            prepared = cls.open_checked(portions, [folder / TOKENIZER] * len(portions))
        except (KeyError, TypeError, ValueError, IndexError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"data: {pointer} is damaged ({error!r:.100}); do the run again") from error
        return replace(prepared, special_tokens=special)

    def copy_heldout(self, folder: Path) -> None:
        """Copy everything but the training shards into the data stage's folder, as hard links where possible.

        Later stages can evaluate with it even if the prepared folders are gone.
        """
        for number, ((path, _), manifest) in enumerate(zip(self.portions, self.manifests, strict=True)):
            place = folder / PORTION.format(number)
            shutil.rmtree(place, ignore_errors=True)  # left by an interrupted call
            place.mkdir()
            for split, held in manifest.splits.items():
                if split != "train":
                    for shard in held.shards:
                        link_or_copy(path_inside(path, shard.name), place / shard.name)
                        link_or_copy(path_inside(path, f"{shard.name}.crc"), place / f"{shard.name}.crc")
            manifest.write(place)
        write_file(folder / TOKENIZER, self.tokenizer_file.read_bytes())
        content = {**asdict(self.special_tokens), "weights": [weight for _, weight in self.portions]}
        write_file(folder / POINTER, render_json(content).encode())

    def with_model_tokens(
        self, *, vocab_size: int, tokenizer_file: Path | None, special: SpecialTokenSettings
    ) -> PreparedData:
        """Check the folders against a model, and take the end tokens of the model or of the user.

        Args:
            vocab_size: vocabulary size of the model, V.
            tokenizer_file: the model's tokenizer.json; None if it has none.
            special: the user's settings for special tokens.

        Raises:
            DataError: token ids, the tokenizer or the begin token do not match the model or the settings.
        """
        manifest, path = self.manifests[0], self.portions[0].path
        tokenizer = tokenizers.load_tokenizer(self.tokenizer_file)
        for name in SPLITS:
            largest = self.split(name).bound - 1
            tokenizers.check_token_ids(tokenizer, [largest], vocab_size=vocab_size, where=f"data.path: {path}")
        if tokenizer_file is not None:
            wanted = tokenizers.hash_tokenizer(tokenizers.load_tokenizer(tokenizer_file))
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

    def check_same(self, other: PreparedData) -> None:
        """Check that other folders have the content of these. Raises DataError, naming a folder that has changed."""
        for number, (path, _) in enumerate(other.portions):
            if number >= len(self.manifests) or self.manifests[number].checksum != other.manifests[number].checksum:
                raise DataError(f"data: {path} has changed since this run began; start the run again")

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the texts that the folders were made from."""
        return "+".join(manifest.fingerprint for manifest in self.manifests)

    @property
    def identity(self) -> str:
        """A text that changes with the tokens, the order of the folders or their weights."""
        pairs = zip(self.manifests, self.portions, strict=True)
        return render_json({"portions": [[manifest.checksum, portion.weight] for manifest, portion in pairs]})

    def split(self, name: str) -> Split:
        """Combine the manifests' entries for a split over all folders."""
        splits = [manifest.splits[name] for manifest in self.manifests]
        return Split(
            shards=tuple(shard for split in splits for shard in split.shards),
            documents=sum(split.documents for split in splits),
            tokens=sum(split.tokens for split in splits),
            bytes=sum(split.bytes for split in splits),
            bound=max(split.bound for split in splits),
        )

    def rows(self, split: str, *, sequence_length: int) -> PackedRows | MixedRows:
        """Open the rows of a split; rows of several folders are concatenated, and sampled by weight in training."""
        parts = [PackedRows(path, split, sequence_length=sequence_length) for path, _ in self.portions]
        return parts[0] if len(parts) == 1 else MixedRows(parts, [weight for _, weight in self.portions])

    def check(self, *, sequence_length: int) -> None:
        """Open every split once. Raises DataError for one that is too short or damaged, before anything is trained."""
        for split in SPLITS:
            self.rows(split, sequence_length=sequence_length)


def link_or_copy(source: Path, target: Path) -> None:
    """Create a hard link, or a copy where the file system allows no link."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
