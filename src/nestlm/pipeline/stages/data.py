"""Stage `data`: tokenize the source into packed shards, or check the shards that it names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from typing_extensions import override

from nestlm.data.preparation import prepare_source
from nestlm.data.prepared_data import PreparedData
from nestlm.data.sources.base import PreparedSource
from nestlm.pipeline.cache import file_identity
from nestlm.pipeline.runtime import StageRuntime
from nestlm.pipeline.settings import TextSettings
from nestlm.pipeline.stages.base import Stage, StageResult


@dataclass(frozen=True, kw_only=True)
class DataResult(StageResult):
    """Result of the data stage: identity and size of the prepared text.

    Attributes:
        fingerprint: hash of all texts.
        tokenizer: hash of the tokenizer.
        train_tokens: tokens of the training split.
        calibration_tokens: tokens of the calibration split.
        validation_tokens: tokens of the validation split.
    """

    fingerprint: str
    tokenizer: str
    train_tokens: int
    calibration_tokens: int
    validation_tokens: int


@dataclass(frozen=True, kw_only=True)
class DataStage(TextSettings, Stage[DataResult]):
    """Leaves the tokenizer, and tokens of the three splits, for all other stages."""

    name = "data"
    is_alone = True

    @override
    def outside_identity(self, cache: Path) -> str:
        """Identify the text, the tokenizer and the special tokens by their contents."""
        tokenizer = self.tokenizer_file
        tokenizer_hash = file_identity(tokenizer) if tokenizer and tokenizer.is_file() else ""
        return self.data.identity + tokenizer_hash + repr(self.special_tokens)

    @override
    def run(self, runtime: StageRuntime) -> DataResult:
        data, vocab_size = self.data, self.model.decoder_config().vocab_size
        prepared = data.prepared
        if prepared is not None:
            prepared = prepared.with_model_tokens(
                vocab_size=vocab_size, tokenizer_file=self.tokenizer_file, special=data.special
            )
            prepared.check(sequence_length=data.sequence_length)
            prepared.copy_heldout(runtime.folder)
        else:
            assert not isinstance(data.source, PreparedSource), "the source has documents"
            prepare_source(
                data.source,
                runtime.folder,
                vocab_size=vocab_size,
                tokenizer_file=self.tokenizer_file,
                heldout_share=data.heldout_share,
                special=data.special,
            )
            prepared = PreparedData.read(runtime.folder)
            prepared.check(sequence_length=data.sequence_length)
        return DataResult(
            fingerprint=prepared.fingerprint,
            tokenizer=prepared.manifests[0].tokenizer_hash,
            train_tokens=prepared.split("train").tokens,
            calibration_tokens=prepared.split("calibration").tokens,
            validation_tokens=prepared.split("validation").tokens,
        )
