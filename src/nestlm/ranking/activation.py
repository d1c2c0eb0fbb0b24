"""Importance by activation, from forward passes on a little calibration text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nestlm.axes.base import Axis
from nestlm.data.batch import Batch
from nestlm.errors import ConfigError
from nestlm.nn.decoder import Decoder
from nestlm.spec import Site


@dataclass(frozen=True)
class Activation:
    """Sum over tokens of a unit's activation: |h_i| of a neuron, ||head output||_2 of a head.

    A reconstruction of how Flextron ranks; the paper says that it ranks by importance, then sorts.
    """

    num_sequences: int

    def __post_init__(self) -> None:
        if self.num_sequences <= 0:
            raise ConfigError(f"ranking.num_sequences: got {self.num_sequences}, wanted 1 or more")

    @torch.no_grad()
    def scores(
        self, decoder: Decoder, *, axes: tuple[Axis, ...], batches: Iterable[Batch], seed: int
    ) -> dict[Site, Tensor]:
        """Accumulated in float32 over all batches."""
        del seed
        config = decoder.config
        sums: dict[Site, Tensor] = {}
        hooks = []
        for axis in axes:
            for layer, block in enumerate(config.blocks):
                site, units = Site(axis.name, layer), axis.units(block)
                sums[site] = torch.zeros(units)
                module_name, unit_shape = axis.observed(block, config=config)

                def record(
                    module: nn.Module,
                    inputs: tuple[Tensor, ...],
                    *,
                    shape: tuple[int, ...] = (units, *unit_shape),
                    site: Site = site,
                ) -> None:
                    per_unit = inputs[0].detach().float().unflatten(-1, shape)  # (B, L, units, parts, entries)
                    sums[site] += per_unit.norm(dim=-1).sum(dim=(0, 1, 3)).cpu()

                module = decoder.get_submodule(f"blocks.{layer}.{module_name}")
                hooks.append(module.register_forward_pre_hook(record))
        try:
            for batch in batches:
                decoder(batch.tokens_BL, documents_BL=batch.documents_BL)
        finally:
            for hook in hooks:
                hook.remove()
        return sums
