"""Rankings that need no calibration text: by the norm of weights, at random, and none."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from nestlm.data.batch import Batch
from nestlm.distributed.fsdp import full_tensor
from nestlm.elastic.axes.base import Axis
from nestlm.elastic.ranking.base import Ranking
from nestlm.elastic.surgery import slices_by_site
from nestlm.nn.decoder import Decoder
from nestlm.spec import Site


@dataclass(frozen=True)
class Magnitude(Ranking):
    """Importance of a unit: the L2 norm of all weights that it owns. Blocks all score 0: norms do not rank them."""

    num_sequences: int = 0  # no text is read

    @torch.no_grad()
    @override
    def scores(
        self, decoder: Decoder, *, axes: tuple[Axis, ...], batches: Iterable[Batch], seed: int
    ) -> dict[Site, Tensor]:
        del batches, seed
        squares = {site: torch.zeros(units) for site, units in unit_counts(decoder, axes=axes).items()}
        parameters = dict(decoder.named_parameters())
        for site, part, name in slices_by_site(axes, decoder.config):
            rows = full_tensor(parameters[name].detach()).float().cpu().movedim(part.dim, 0)
            per_unit = rows.pow(2).reshape(len(rows), -1).sum(1).unflatten(0, (-1, part.rows)).sum(1)
            squares[site] += per_unit
        return {site: total.sqrt() for site, total in squares.items()}


@dataclass(frozen=True)
class Random(Ranking):
    """Importance of a unit: a uniform random number. The ablation that shows what sorting is worth."""

    num_sequences: int = 0  # no text is read

    @override
    def scores(
        self, decoder: Decoder, *, axes: tuple[Axis, ...], batches: Iterable[Batch], seed: int
    ) -> dict[Site, Tensor]:
        del batches
        generator = torch.Generator().manual_seed(seed)
        return {site: torch.rand(units, generator=generator) for site, units in unit_counts(decoder, axes=axes).items()}


@dataclass(frozen=True)
class Unsorted(Ranking):
    """Importance of a unit: 0, so that units keep the order of the checkpoint.

    Among equally important blocks, the last ones except the very last may be skipped.
    """

    num_sequences: int = 0  # no text is read

    @override
    def scores(
        self, decoder: Decoder, *, axes: tuple[Axis, ...], batches: Iterable[Batch], seed: int
    ) -> dict[Site, Tensor]:
        del batches, seed
        return {site: torch.zeros(units) for site, units in unit_counts(decoder, axes=axes).items()}


def unit_counts(decoder: Decoder, *, axes: tuple[Axis, ...]) -> dict[Site, int]:
    """Count the units of every axis in every layer."""
    return {
        Site(axis.name, layer): axis.units(block) for axis in axes for layer, block in enumerate(decoder.config.blocks)
    }
