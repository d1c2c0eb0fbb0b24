"""What a model family is: sizes, and weights that come from elsewhere."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nestlm.errors import CheckpointError, ConfigError
from nestlm.nn.config import DecoderConfig
from nestlm.nn.decoder import Decoder


@dataclass(frozen=True, kw_only=True)
class Family(ABC):
    """A named size of a family.

    Attributes:
        weights: folder of a Hugging Face checkpoint; None where there is none.
        init: `random` where the model may be trained from scratch.
        pretraining_tokens: tokens that given weights were trained on, where known.
    """

    weights: str | None
    init: str | None
    pretraining_tokens: float | None

    @abstractmethod
    def decoder_config(self) -> DecoderConfig:
        """Sizes of the decoder."""

    @abstractmethod
    def check_config(self, config: dict[str, Any]) -> None:
        """Raise CheckpointError when the config.json of `weights` is another size, or computes something else."""

    @abstractmethod
    def load_weights(self, decoder: Decoder) -> None:
        """Fill a decoder from `weights`.

        Raises:
            CheckpointError: missing, damaged, left-over or wrongly shaped tensors.
        """

    @property
    def tokenizer_file(self) -> Path | None:
        """The tokenizer that belongs to the weights."""
        return None if self.weights is None else Path(self.weights) / "tokenizer.json"

    def check_weights(self, *, dry_run: bool) -> None:
        """Raise when weights don't suit, or there are neither weights nor leave to train from scratch."""
        if self.init not in (None, "random"):
            raise ConfigError(f"model.init: got {self.init!r}, wanted 'random' or null")
        if self.weights is not None:
            path = Path(self.weights) / "config.json"
            if not path.is_file():
                raise CheckpointError(
                    f"model.weights: {self.weights} holds no config.json; wanted a Hugging Face checkpoint folder"
                )
            try:
                config = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise CheckpointError(f"model.weights: {path} is no JSON ({error}); fetch it again") from error
            self.check_config(config)
        elif self.init is None and not dry_run:
            raise ConfigError(
                "model.weights: this size has none; give a folder with model.weights=FOLDER, "
                "or train from scratch with model.init=random"
            )
