"""Latency tables as files: `nestlm profile` writes them, and measurements of other engines can be filled in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, Field, ValidationError

from nestlm.cost.table import Rows
from nestlm.errors import BudgetError, ConfigError
from nestlm.spec import SearchSpace, Site

Phase = Literal["prefill", "decode"]
Time = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


class Prices(BaseModel, frozen=True, extra="forbid"):
    """The time of each width by axis: one mapping for all layers, or a list of mappings, one a layer.

    Of `depth`, width 1 is the time of a block without its sites that have prices of their own. It takes one mapping for
    all layers, since the ranking decides which blocks may be skipped.
    """

    prices: dict[str, dict[int, Time] | list[dict[int, Time]]]

    def rows(self, space: SearchSpace) -> Rows:
        """Look up the prices of a space's choices, in the order of a cost table.

        Raises:
            ConfigError: a choice has no price, or a wider one is cheaper.
        """
        return tuple(
            self.row(site, widths, layers=len(space.axes[site.axis])) for site, widths in space.choices.items()
        )

    def row(self, site: Site, widths: Sequence[int], *, layers: int) -> tuple[float, ...]:
        """Look up the prices of one site's choices. Raises ConfigError as `rows` does."""
        by_layer = self.prices.get(site.axis)
        if by_layer is None:
            raise ConfigError(
                f"no prices for the axis {site.axis}, wanted them beside {', '.join(self.prices) or 'none'}; add them, "
                "or leave the axis out of axes"
            )
        if isinstance(by_layer, list) and site.is_block:
            raise ConfigError(
                f"prices.{site.axis}: got a list of layers, wanted one mapping for all, since the ranking says "
                "which blocks may be skipped"
            )
        if isinstance(by_layer, list) and len(by_layer) != layers:
            raise ConfigError(
                f"prices.{site.axis}: got a list of {len(by_layer)} layers, wanted {layers}, or one mapping for all"
            )
        found = by_layer[site.layer] if isinstance(by_layer, list) else by_layer
        for width in widths:
            if width not in found:
                raise ConfigError(
                    f"prices.{site.axis}: no price of width {width} in layer {site.layer}, only of "
                    f"{', '.join(map(str, sorted(found)))}; add it, or change axes.{site.axis}.fractions"
                )
        row = tuple(found[width] for width in widths)
        for (narrow, less), (wide, more) in pairwise(zip(widths, row, strict=True)):
            if more < less:
                raise ConfigError(
                    f"prices.{site.axis}: got {more:g} ms for width {wide} in layer {site.layer}, wanted at least the "
                    f"{less:g} ms of width {narrow}; measure again, or raise it to that"
                )
        return row

    @staticmethod
    def of(space: SearchSpace, rows: Rows) -> dict[str, object]:
        """Write prices in the form that `rows` reads; blocks that may be skipped share the highest price."""
        by_site = dict(zip(space.sites, rows, strict=True))
        prices: dict[str, object] = {
            axis: [dict(zip(space.choices[site], by_site[site], strict=True)) for site in sites]
            for axis, sites in space.axes.items()
        }
        if space.block_sites:
            blocks = [by_site[site] for site in space.block_sites]
            prices[space.block_sites[0].axis] = dict(enumerate(map(max, zip(*blocks, strict=True))))
        return prices


class RouterTime(BaseModel, frozen=True, extra="forbid"):
    """Time of a router that decides for each token: a constant, and a time a unit of its networks' hidden width."""

    constant: Time
    per_unit: Time


class TokenPrices(Prices, frozen=True, extra="forbid"):
    """Prices of a site where each token decides: the time of the site, K and V of all tokens and sorting included,
    when all of its tokens take a width; less where they differ in proportion. Sites that do not decide cost what they
    cost in a sub-network.
    """  # noqa: D205

    router: RouterTime


class FitErrors(BaseModel, frozen=True, extra="forbid"):
    """Mean absolute errors of summed prices, relative to times measured end to end.

    Attributes:
        specs: number of sub-networks that were compared.
        mape: their error.
        mixes: number of mixes of widths by token that were compared.
        mixes_mape: their error.
    """

    specs: int
    mape: float
    mixes: int
    mixes_mape: float


class LatencyTable(Prices, frozen=True, extra="forbid"):
    """A file's content. Times are in milliseconds: of a whole batch of prompts, or of one step of the batch.

    Attributes:
        constant: embedding, norms and head.
        device: where it was measured, in words.
        versions: of what it was measured with.
        per_token: None where no choices per token were measured: such a table serves static routers only.
    """

    format: Literal[1]
    constant: Time
    unit: Literal["ms"]
    phase: Phase
    device: str
    dtype: str
    batch_size: int
    context_length: int
    versions: Mapping[str, str] = {}
    per_token: TokenPrices | None = None
    check: FitErrors | None = None

    @classmethod
    def read(cls, path: Path) -> LatencyTable:
        """Read a file.

        Raises:
            ConfigError: no such file, no JSON, or not of this form.
        """
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise ConfigError(
                f"cost.table: cannot read {path} ({error.strerror}); nestlm profile --out FILE makes one"
            ) from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"] if "[" not in str(part) and part != "[key]")
            got = "" if first["type"] in ("missing", "json_invalid") else f"got {first['input']!r}; "
            raise ConfigError(
                f"latency table {path}: {where}{': ' if where else ''}{got}{first['msg']}; "
                "docs/howto/fill-a-latency-table.md shows the form"
            ) from error

    def to_json(self) -> dict[str, object]:
        """Convert to plain values for JSON."""
        return self.model_dump(mode="json")

    def tokens(self) -> TokenPrices:
        """Return the prices per token.

        Raises:
            BudgetError: the table has none.
        """
        if self.per_token is None:
            raise BudgetError(
                "no prices per token (per_token), which a dynamic router needs; measure with nestlm profile, or try "
                "router.policy=static"
            )
        return self.per_token

    def summary(self) -> list[str]:
        """Format the table as lines: constants, prices by axis, and the errors of the fit."""
        lines = [
            f"{self.phase}, ms for a batch of {self.batch_size} at {self.context_length} tokens, {self.dtype}, "
            f"on {self.device}"
        ]
        lines.append(f"constant {self.constant:.4g}")
        for name, part in (("", self), ("per token: ", self.per_token)):
            if part is not None:
                lines += [name + line for line in price_lines(part)]
        if self.per_token is not None:
            router = self.per_token.router
            lines.append(f"per token: router {router.constant:.4g}, and {router.per_unit:.3g} a unit of hidden width")
        return [*lines, *([fit_line(self.check)] if self.check is not None else [])]


def price_lines(part: Prices) -> list[str]:
    """Format prices by axis; layers of equal prices share a line."""
    lines = []
    for axis, by_layer in part.prices.items():
        layers = by_layer if isinstance(by_layer, list) else [by_layer]
        for prices, numbers in groupby(range(len(layers)), key=lambda layer: layers[layer]):
            alike = list(numbers)
            shown = f"{alike[0]}" if len(alike) == 1 else f"{alike[0]}-{alike[-1]}"
            where = f"layers {shown}" if isinstance(by_layer, list) else "all layers"
            lines.append(f"{axis} ({where}) " + ", ".join(f"{width}: {price:.4g}" for width, price in prices.items()))
    return lines


def fit_line(check: FitErrors) -> str:
    """Format the errors of a table's fit."""
    return (
        f"against {check.specs} other sub-networks, timed end to end: {check.mape:.1%} mean absolute error; against "
        f"{check.mixes} mixes per token: {check.mixes_mape:.1%}"
    )
