"""What budgets of a nested model are scored on: held-out text, and tasks of the EleutherAI harness."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tokenizers import Tokenizer

from nestlm.context import Context
from nestlm.data.batch import Batch
from nestlm.data.module import DataSettings
from nestlm.data.shards import TOKENIZER, Split
from nestlm.data.special_tokens import SpecialTokens
from nestlm.errors import ConfigError
from nestlm.nn.decoder import Decoder
from nestlm.nn.policy import Policy
from nestlm.settings import Settings, View
from nestlm.stages import prepare_data

RunTasks = Callable[[Policy], dict[str, float]]


@dataclass(frozen=True)
class HeldOut:
    """Text to score on: batches, and what the split holds."""

    loader: Iterable[Batch]
    split: Split

    @classmethod
    def of(cls, context: Context) -> HeldOut:
        """The validation split of what a data stage left."""
        data = context.data(stream="validation")
        return cls(data.heldout_dataloader("validation"), data.prepared.split("validation"))


@contextmanager
def held_out(data: DataSettings | None, *, settings: Settings, context: Context) -> Iterator[HeldOut]:
    """The validation split of a text in the run's tokens. What is not prepared yet is prepared for the while.

    Args:
        data: where it comes from; None: the run's own.
        settings: of the run.
        context: of the run.

    Raises:
        NestlmError: a text that cannot be read, or rows that the model cannot take.
    """
    if data is None:
        yield HeldOut.of(context)
        return
    longest = settings.model.decoder_config().context_length
    if data.sequence_length > longest:
        raise ConfigError(
            f"data.sequence_length: got {data.sequence_length}, wanted at most model.context_length={longest}"
        )
    data = replace(data, tokenizer=str(context.inputs["data"] / TOKENIZER))
    with TemporaryDirectory(prefix="nestlm-evaluate-") as place:
        view = View(replace(settings, data=data), ("data", "model", "seed"))
        other = replace(context, settings=view, folder=Path(place), inputs={"data": Path(place)})
        prepare_data(other)
        yield HeldOut.of(other)


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
    """What runs tasks of the harness under a policy; see `NestedModel.evaluate`.

    Raises:
        ConfigError: the harness is not installed, or has no such task.
    """
    try:
        from nestlm.harness import SHOTS, HarnessModel, load_tasks, run_tasks
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
