"""The environment of all tests, and their small models as fixtures."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two test processes share two cores
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"

import pytest
import torch

from models import AXES, decoder_config, random_decoder
from nestlm.axes.base import search_space
from nestlm.nn.decoder import Decoder


@pytest.fixture(params=[4, 2], ids=["mha", "gqa"])
def decoder(request: pytest.FixtureRequest) -> Decoder:
    return random_decoder(decoder_config(num_kv_groups=request.param))


@pytest.fixture
def space(decoder: Decoder):
    return search_space(AXES, decoder.config)


@pytest.fixture
def tokens_BL() -> torch.Tensor:  # noqa: N802 (its shape)
    return torch.randint(0, 50, (2, 20), generator=torch.Generator().manual_seed(1))
