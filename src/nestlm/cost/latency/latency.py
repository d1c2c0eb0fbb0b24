"""Cost: time, from a table that was measured on a device (Flextron's lookup table)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import ClassVar, Literal

from nestlm.cost.latency.table_file import LatencyTable, Phase
from nestlm.cost.table import CostTable, TokenTable, price_inside_blocks
from nestlm.elastic.axes.base import Axis
from nestlm.errors import ConfigError, NestlmError
from nestlm.nn.config import DecoderConfig
from nestlm.spec import SearchSpace


@dataclass(frozen=True)
class Latency:
    """Milliseconds of a forward pass. Without a table file, a run measures a table before it trains.

    Attributes:
        phase: `prefill`, the time of a batch of whole prompts; or `decode`, that of one token for each of its
            sequences, with a full KV cache.
        batch_size: sequences at once.
        context_length: tokens of a prompt, or in the cache once the step is done.
        dtype: of weights and activations, when measuring.
        repeats: times of which the median counts, when measuring.
        table: a table that was measured before, or elsewhere.
        device: refuse a table that was measured elsewhere, or in another dtype; None takes what the file says.
    """

    prices_tokens: ClassVar[bool] = True
    phase: Phase
    batch_size: int
    context_length: int
    dtype: Literal["float32", "bfloat16", "float16"]
    repeats: int
    table: str | None
    device: str | None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and value <= 0:
                raise ConfigError(f"cost.{field.name}: got {value}, wanted a positive number")

    @property
    def unit(self) -> str:
        """What the times are of, in words."""
        rows = f"{self.batch_size} prompt{'s' if self.batch_size > 1 else ''} of {self.context_length} tokens"
        step = f"1 token each of {self.batch_size}, {self.context_length} tokens in the cache"
        return f"ms for {rows if self.phase == 'prefill' else step}"

    def with_table(self, path: Path, *, device: str | None) -> Latency:
        """Return the cost with prices from a table file; with a device, the table must have been measured on it."""
        return replace(self, table=str(path), device=device)

    def tabulate(
        self, space: SearchSpace, *, axes: tuple[Axis, ...], config: DecoderConfig, per_token: bool = False
    ) -> CostTable:
        """Price every choice.

        Raises:
            ConfigError: there is no table, or it is not one of what the settings ask for.
            BudgetError: it holds no prices per token.
        """
        del axes, config
        measured = self.read()
        with named(f"latency table {self.table}"):
            alone = dict(zip(space.sites, measured.rows(space), strict=True))
            tokens = measured.tokens() if per_token else None
            rows = None if tokens is None else dict(zip(space.sites, tokens.rows(space), strict=True))
        fixed = price_inside_blocks(alone, space)
        whole = measured.constant + sum(row[-1] for row in fixed)
        if tokens is None or rows is None:
            return CostTable("latency", self.unit, space, constant=measured.constant, prices=fixed, whole=whole)
        # what the narrowest width takes at a site that decides is taken whatever is decided; but a token that skips the
        # block saves what that width takes where all tokens run it
        saved = {site: alone[site][0] for site in space.enclosing}
        shared = tuple(max(0.0, row[0] - saved.get(site, 0.0)) for site, row in rows.items())
        added = {site: tuple(price - row[0] + saved.get(site, 0.0) for price in row) for site, row in rows.items()}
        router = tokens.router
        return TokenTable(
            "latency",
            self.unit,
            space,
            constant=measured.constant + sum(shared),
            prices=price_inside_blocks(added, space),
            whole=whole,
            shared=shared,
            fixed=fixed,
            router=((router.per_unit / len(rows), router.constant / len(rows)),) * len(rows),
        )

    def read(self) -> LatencyTable:
        """Read the table file. Raises ConfigError where there is none, or it does not fit the settings."""
        if self.table is None:
            raise ConfigError(
                "cost: latency has no table yet: a run measures one; or nestlm profile --out FILE does, and "
                "cost.table=FILE takes it"
            )
        measured = LatencyTable.read(Path(self.table))
        wanted = ["phase", "batch_size", "context_length", *(["device", "dtype"] if self.device is not None else [])]
        for name in wanted:
            got, asked = getattr(measured, name), getattr(self, name)
            if got != asked:
                raise ConfigError(
                    f"latency table {self.table}: got {name}={got}, wanted cost.{name}={asked}; measure that with "
                    f"nestlm profile, or set cost.{name}={got}"
                )
        return measured


@contextmanager
def named(where: str) -> Iterator[None]:
    """Prefix the message of any NestlmError that is raised inside with a place."""
    try:
        yield
    except NestlmError as error:
        raise type(error)(f"{where}: {error}") from None
