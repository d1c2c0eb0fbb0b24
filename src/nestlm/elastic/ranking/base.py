"""The interface of rankings: scores of units, from which the order follows in which units are sorted."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from torch import Tensor

from nestlm.data.batch import Batch
from nestlm.elastic.axes.base import Axis
from nestlm.nn.decoder import Decoder
from nestlm.spec import Site


class Ranking(Protocol):
    """Scores how important each unit of a site is.

    Attributes:
        num_sequences: calibration sequences that `scores` wants to see; 0 for a ranking that needs no text.
    """

    num_sequences: int

    def scores(
        self, decoder: Decoder, *, axes: tuple[Axis, ...], batches: Iterable[Batch], seed: int
    ) -> dict[Site, Tensor]:
        """Return the importance of every unit in every layer: by site (units,) in float32; higher is kept longer.

        Args:
            decoder: the whole model, not sorted yet.
            axes: the axes to rank; each layer has a site of each.
            batches: calibration text; where a batch has `is_counted` False, its tokens do not count.
            seed: of the run, for rankings that draw.
        """
        ...


def order(scores: Tensor) -> Tensor:
    """Return the indices of units by falling importance, (units,); equally important units keep their order."""
    return scores.argsort(descending=True, stable=True)
