"""Check that an export's weights are within the range of the type in which they are stored."""

from __future__ import annotations

import math

from torch import Tensor

from nestlm.errors import ExportError


def check_weight_range(value: Tensor, kind: str, bound: float, *, name: str) -> None:
    """Raise ExportError if a weight is not finite, or outside the range of its type.

    Args:
        value: the weight, of any shape.
        kind: name of the type, for the message.
        bound: largest number of the type.
        name: name of the weight, for the message.
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
