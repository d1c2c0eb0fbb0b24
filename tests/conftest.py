"""The environment of all tests, and their small models as fixtures."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two test processes share two cores
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"

import pytest
import torch


@pytest.fixture
def tokens_BL() -> torch.Tensor:  # noqa: N802 (its shape)
    return torch.randint(0, 50, (2, 20), generator=torch.Generator().manual_seed(1))
