"""Nested language models: one set of weights, many sub-networks, any budget."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # heavy to import
    from nestlm.api.nested_model import NestedModel


def load(run: str | Path, *, device: str | None = None, plugins: Sequence[str] = ()) -> NestedModel:
    """The nested model that a finished run left.

    Args:
        run: the run's folder.
        device: as torch names it; None: that of the run's trainer.
        plugins: packages whose classes the run's config may name, beside those of nestlm; they are imported. The
            environment variable NESTLM_PLUGINS names them, too, separated by commas.

    Raises:
        NestlmError: it is no finished run, of another version of nestlm, damaged, or the device is not there.
    """
    from nestlm.config.compose import load as load_run

    return load_run(Path(run), device=device, plugins=plugins)
