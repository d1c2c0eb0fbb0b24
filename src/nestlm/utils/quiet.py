"""Keep other libraries' messages off the terminal while a block calls them."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# torchao warns at its import of kernels that it cannot load, and torch of how torchao registers its enums.
TORCHAO_LOGGERS = ("torchao", "torch.utils._pytree")


@contextmanager
def quiet_loggers(*names: str, level: int = logging.ERROR) -> Iterator[None]:
    """Let the named loggers say nothing below a level inside the block; each level is restored after it."""
    before = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(level)
    try:
        yield
    finally:
        for name, known in before.items():
            logging.getLogger(name).setLevel(known)


@contextmanager
def ignored_warnings(*messages: str) -> Iterator[None]:
    """Ignore warnings that match one of these regular expressions inside the block."""
    with warnings.catch_warnings():
        for message in messages:
            warnings.filterwarnings("ignore", message=message)
        yield
