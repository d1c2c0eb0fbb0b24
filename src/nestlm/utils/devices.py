"""Device names for reports, and synchronization before a clock is read."""

from __future__ import annotations

import platform
from pathlib import Path

import torch


def device_name(device: torch.device) -> str:
    """Return a readable device name; for a CPU with the number of threads, which its speed depends on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {torch.get_num_threads()} threads"


def cpu_name() -> str:
    """Return the CPU's model name, or its architecture where the system does not tell the model."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def synchronize(device: torch.device) -> None:
    """Wait until all kernels queued on a CUDA device have finished; a no-op for CPUs."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
