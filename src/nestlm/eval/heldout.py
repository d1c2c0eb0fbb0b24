"""What budgets of a nested model are scored on: held-out text, and tasks of the EleutherAI harness."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tokenizers import Tokenizer

from nestlm.data.batch import Batch
from nestlm.data.datamodule import DataSettings, PackedTokens
from nestlm.data.manifest import Split
from nestlm.data.preparation import prepare_source
from nestlm.data.prepared_data import PreparedData
from nestlm.data.sources.base import PreparedSource
from nestlm.data.special_tokens import SpecialTokens
from nestlm.errors import ConfigError
from nestlm.nn.config import DecoderConfig
from nestlm.nn.decoder import Decoder
from nestlm.nn.policy import Policy
from nestlm.utils.console import console

RunTasks = Callable[[Policy], dict[str, float]]


@dataclass(frozen=True)
class HeldOut:
    """Text to score on: batches, and what the split holds."""

    loader: Iterable[Batch]
    split: Split

    @classmethod
    def of(cls, data: PackedTokens) -> HeldOut:
        """Take the validation split of prepared tokens."""
        return cls(data.heldout_dataloader("validation"), data.prepared.split("validation"))


@contextmanager
def held_out(data: DataSettings | None, *, config: DecoderConfig, seed: int, own: PackedTokens) -> Iterator[HeldOut]:
    """Open text in the run's tokens: a validation split, or all of a text that nothing is trained on.

    Args:
        data: where it comes from; None: the run's own. What is not prepared yet is prepared for the while; where its
            `heldout_share` is None, all of it counts, unless it is the very text of the run.
        config: sizes of the model.
        seed: of the run.
        own: the run's tokens.

    Raises:
        NestlmError: a text that cannot be read, or rows that the model cannot take.
    """
    if data is None:
        yield HeldOut.of(own)
        return
    if data.sequence_length > config.context_length:
        raise ConfigError(
            f"data.sequence_length: got {data.sequence_length}, wanted at most model.context_length="
            f"{config.context_length}"
        )
    tokens = partial(PackedTokens, data, seed=seed, stream="validation")
    like_run = {"vocab_size": config.vocab_size, "tokenizer_file": own.prepared.tokenizer_file}
    special = replace(data.special, in_text=own.prepared.manifests[0].special_tokens)
    with TemporaryDirectory(prefix="nestlm-evaluate-") as place:
        if isinstance(data.source, PreparedSource):
            prepared = PreparedData.open(data.source.portions()).with_model_tokens(**like_run, special=data.special)
        elif data.heldout_share is None and data.fingerprint == own.prepared.fingerprint:
            console.print("the text is the run's own: its validation split is scored", highlight=False)
            prepared = own.prepared
        else:
            prepare_source(data.source, Path(place), **like_run, heldout_share=data.heldout_share, special=special)
            prepared = PreparedData.read(Path(place))
        yield HeldOut.of(tokens(prepared))


def task_runner(
    decoder: Decoder,
    tasks: Sequence[str],
    *,
    tokenizer: Tokenizer,
    special_tokens: SpecialTokens,
    precision: Callable[[], AbstractContextManager[Any]],
    files: Path | None,
    shots: Mapping[str, int],
    limit: int | None,
    batch_size: int,
) -> RunTasks:
    """Load tasks of the harness, and return a function that runs them under a policy; see `NestedModel.evaluate`.

    Raises:
        ConfigError: the harness is not installed, or has no such task.
    """
    try:
        from nestlm.eval.lm_harness import SHOTS, HarnessModel, load_tasks, run_tasks
    except ModuleNotFoundError as error:
        raise ConfigError(f"tasks: {error}; wanted the harness, pip install 'nestlm[eval]'") from error
    for name, number in {"batch_size": batch_size, "limit": 1 if limit is None else limit}.items():
        if number <= 0:
            raise ConfigError(f"{name}: got {number}, wanted 1 or more")
    loaded = load_tasks(tasks, files=files, shots={**SHOTS, **shots})

    def run(policy: Policy) -> dict[str, float]:
        model = HarnessModel(
            decoder,
            policy,
            tokenizer=tokenizer,
            special_tokens=special_tokens,
            batch_size=batch_size,
            precision=precision,
        )
        return run_tasks(model, loaded, limit=limit)

    return run
