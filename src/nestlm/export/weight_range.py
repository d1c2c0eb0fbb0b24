"""Whether the numbers of an export's weights fit into the type that they are stored in."""

from __future__ import annotations

import math

from torch import Tensor

from nestlm.errors import ExportError


def check_weight_range(value: Tensor, kind: str, bound: float, *, name: str) -> None:
    """Raise ExportError where a weight is not finite, or larger than its type holds.

    Args:
        value: the weight.
        kind: name of the type.
        bound: largest number of the type.
        name: of the weight.
    """
    low, high = (float(each) for each in value.detach().aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ExportError(f"export: {name} holds numbers that are not finite; train the run again, with a lower lr")
    most = max(-low, high)
    if most > bound:
        raise ExportError(
            f"export: {name} holds a weight of size {most:.6g}, and {kind} ends at {bound:.6g}; "
            "wanted a dtype of larger range: --dtype bf16 or f32"
        )
