"""Allocator settings of glibc for training on CPUs."""

from __future__ import annotations

import ctypes
import sys

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # parameters of mallopt(3)
LARGEST_KEPT = 2**25  # bytes; glibc always maps larger blocks afresh


def keep_freed_blocks(device: torch.device) -> None:
    """Make glibc keep freed memory for reuse instead of returning it to the system, when the device is a CPU.

    Each training step allocates what the last one freed, and a page that was returned takes microseconds to map again:
    up to a fifth of a step's time. On other devices and C libraries this does nothing.
    """
    if device.type != "cpu" or sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT)
        mallopt(M_TRIM_THRESHOLD, -1)
