"""Importance by activation, from forward passes on a little calibration text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nestlm.data.batch import Batch
from nestlm.distributed import collectives
from nestlm.elastic.axes.base import Axis
from nestlm.elastic.ranking.base import Ranking
from nestlm.errors import ConfigError
from nestlm.nn.decoder import Decoder
from nestlm.spec import Site


@dataclass(frozen=True)
class Activation(Ranking):
    """Importance of a unit: how active it is, summed over tokens: |h_i| of a neuron, ||head output||_2 of a head.

    This reconstructs how Flextron ranks: the paper says that it ranks units by importance and sorts them. A block's
    importance is its influence (Men et al., arXiv 2403.03853): 1 less the mean over tokens of the cosine of the hidden
    states before and after it.
    """

    num_sequences: int

    def __post_init__(self) -> None:
        if self.num_sequences <= 0:
            raise ConfigError(f"ranking.num_sequences: got {self.num_sequences}, wanted 1 or more")

    @torch.no_grad()
    def scores(
        self, decoder: Decoder, *, axes: tuple[Axis, ...], batches: Iterable[Batch], seed: int
    ) -> dict[Site, Tensor]:
        """Run the decoder over all batches and sum, in float32, over the batches of all ranks."""
        del seed
        sums: dict[Site, Tensor] = {}
        influences: set[Site] = set()
        ran: set[Site] = set()
        hooks: list[RemovableHandle] = []
        tokens = 0
        for axis in axes:
            for layer, block in enumerate(decoder.config.blocks):
                site = Site(axis.name, layer)
                total = sums[site] = torch.zeros(axis.units(block))
                watched = decoder.get_submodule(f"blocks.{layer}")
                observed = axis.observed(block, config=decoder.config)
                if observed is None:
                    influences.add(site)
                    hooks.append(watch_block(watched, total=total))
                else:
                    name, unit_shape = observed
                    watched = watched.get_submodule(name)
                    hooks.append(watch_units(watched, (len(total), *unit_shape), total=total))
                hooks.append(watched.register_forward_pre_hook(lambda *_, site=site: ran.add(site)))
        try:
            for batch in batches:
                if batch.is_counted:
                    tokens += batch.tokens_BL.numel()
                else:  # the last one
                    remove(hooks)
                decoder(batch.tokens_BL, documents_BL=batch.documents_BL)
        finally:
            remove(hooks)
        assert not tokens or len(ran) == len(sums), f"what is observed at {min(map(str, set(sums) - ran))} never ran"
        device = next(decoder.parameters()).device
        seen = float(collectives.all_reduce_sum(torch.tensor(tokens, dtype=torch.float64, device=device)))
        sums = {site: collectives.all_reduce_sum(total.to(device)).cpu() for site, total in sums.items()}
        return {site: total / seen if site in influences else total for site, total in sums.items()}


def remove(hooks: Iterable[RemovableHandle]) -> None:
    """Remove hooks from their modules."""
    for hook in hooks:
        hook.remove()


def watch_units(module: nn.Module, shape: tuple[int, ...], *, total: Tensor) -> RemovableHandle:
    """Attach a hook to a module, so that each call adds the activity of every unit in its input to `total`, (units,).

    Args:
        module: its input is (B, L, units * parts * entries).
        shape: (units, parts, entries).
        total: float32, on the CPU.
    """

    def record(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        del module
        per_unit = inputs[0].detach().float().unflatten(-1, shape)  # (B, L, units, parts, entries)
        total.add_(per_unit.norm(dim=-1).sum(dim=(0, 1, 3)).cpu())

    return module.register_forward_pre_hook(record)


def watch_block(block: nn.Module, *, total: Tensor) -> RemovableHandle:
    """Attach a hook to a block, so that each call adds 1 less the cosine of every token's states before and after.

    The sum over tokens goes to `total`, (1,), float32 on the CPU.
    """

    def record(block: nn.Module, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, Any]) -> None:
        del block
        cosine_BL = F.cosine_similarity(inputs[0].detach().float(), outputs[0].detach().float(), dim=-1)
        total.add_((1.0 - cosine_BL).sum().cpu())

    return block.register_forward_hook(record)
