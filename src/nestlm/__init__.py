"""Nested language models: one set of weights, many sub-networks, any budget."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # heavy to import
    from nestlm.api.nested_model import NestedModel


def load(run: str | Path, *, device: str | None = None, plugins: Sequence[str] = ()) -> NestedModel:
    """Load the nested model of a finished run.

    Args:
        run: the run's folder.
        device: a device as torch names it; None: the device of the run's trainer.
        plugins: packages whose classes the run's config may name, beside those of nestlm. They are imported. The
            environment variable NESTLM_PLUGINS names further ones, separated by commas.

    Raises:
        NestlmError: the folder holds no finished run, or a damaged one, or one of another version of nestlm, or the
            device is absent.
    """
    from nestlm.config.commands import load as load_run

    return load_run(Path(run), device=device, plugins=plugins)
