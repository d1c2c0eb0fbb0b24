"""What a ranking is: scores of units, from which the sorting order follows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from torch import Tensor

from nestlm.data.batch import Batch
from nestlm.elastic.axes.base import Axis
from nestlm.nn.decoder import Decoder
from nestlm.spec import Site


class Ranking(Protocol):
    """Says how important each unit of a site is."""

    num_sequences: int  # calibration sequences that it wants to see; 0: none

    def scores(
        self, decoder: Decoder, *, axes: tuple[Axis, ...], batches: Iterable[Batch], seed: int
    ) -> dict[Site, Tensor]:
        """Importance of every unit in every layer, (units,) in float32 a site; higher stays longer."""
        ...


def order(scores: Tensor) -> Tensor:
    """Units by falling importance; equals keep their order."""
    return scores.argsort(descending=True, stable=True)
