"""Rankings that need no text: by weight magnitude, at random, and none."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from nestlm.data.batch import Batch
from nestlm.distributed.fsdp import whole
from nestlm.elastic.axes.base import Axis
from nestlm.elastic.surgery import cuts_by_site
from nestlm.nn.decoder import Decoder
from nestlm.spec import Site


@dataclass(frozen=True)
class Magnitude:
    """L2 norm of all weights that a unit owns. Blocks are all alike: magnitude does not tell what they do."""

    num_sequences: int

    @torch.no_grad()
    def scores(
        self, decoder: Decoder, *, axes: tuple[Axis, ...], batches: Iterable[Batch], seed: int
    ) -> dict[Site, Tensor]:
        del batches, seed
        squares = {site: torch.zeros(units) for site, units in unit_counts(decoder, axes=axes).items()}
        parameters = dict(decoder.named_parameters())
        for site, cut, name in cuts_by_site(axes, decoder.config):
            rows = whole(parameters[name].detach()).float().cpu().movedim(cut.dim, 0)
            per_unit = rows.pow(2).reshape(len(rows), -1).sum(1).unflatten(0, (-1, cut.rows)).sum(1)
            squares[site] += per_unit
        return {site: total.sqrt() for site, total in squares.items()}


@dataclass(frozen=True)
class Random:
    """A random order: the ablation that shows what sorting is worth."""

    num_sequences: int

    def scores(
        self, decoder: Decoder, *, axes: tuple[Axis, ...], batches: Iterable[Batch], seed: int
    ) -> dict[Site, Tensor]:
        del batches
        generator = torch.Generator().manual_seed(seed)
        return {site: torch.rand(units, generator=generator) for site, units in unit_counts(decoder, axes=axes).items()}


@dataclass(frozen=True)
class Unsorted:
    """All units alike: the order of the checkpoint stays. Of equal blocks the last but the very last may be skipped."""

    num_sequences: int

    def scores(
        self, decoder: Decoder, *, axes: tuple[Axis, ...], batches: Iterable[Batch], seed: int
    ) -> dict[Site, Tensor]:
        del batches, seed
        return {site: torch.zeros(units) for site, units in unit_counts(decoder, axes=axes).items()}


def unit_counts(decoder: Decoder, *, axes: tuple[Axis, ...]) -> dict[Site, int]:
    """Number of units at every site."""
    return {
        Site(axis.name, layer): axis.units(block) for axis in axes for layer, block in enumerate(decoder.config.blocks)
    }
