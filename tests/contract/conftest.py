"""What contract tests share."""

import pytest

from models import DECODERS, random_decoder
from nestlm.elastic.axes.base import Axis, search_space
from nestlm.nn.decoder import Decoder
from nestlm.router.calibration_data import CalibrationData
from nestlm.spec import SearchSpace
from plugins import build, options
from routers import CONFIG, batches

# Every shipped config of axes, which name every axis, and every kind of decoder; not each with each, for time. Eight
# heads and 32 neurons can be cut by all shipped fractions.
PAIRS = [("mlp_heads", "mha"), *((option, "gqa") for option in options("axes"))]
PAIRS += [("mlp_heads_depth", kind) for kind in DECODERS if kind not in ("mha", "gqa")]


@pytest.fixture(params=PAIRS, ids="-".join)
def pair(request: pytest.FixtureRequest) -> tuple[str, str]:
    return request.param


@pytest.fixture
def axes(pair) -> tuple[Axis, ...]:
    return tuple(build("axes", pair[0]).values())


@pytest.fixture
def decoder(pair) -> Decoder:
    return random_decoder(DECODERS[pair[1]])


@pytest.fixture
def space(axes, decoder) -> SearchSpace:
    return search_space(axes, decoder.config)


@pytest.fixture
def calibration() -> CalibrationData:
    return CalibrationData(random_decoder(CONFIG), batches(0))


@pytest.fixture
def deciding(monkeypatch) -> None:
    """A plan in which no site decides is no answer: otherwise the best one may leave nothing to look at."""
    monkeypatch.setattr("nestlm.router.dynamic.base.LEAST_USED", 1.1)
