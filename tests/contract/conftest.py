"""What contract tests share."""

import pytest

from models import DECODERS, random_decoder
from nestlm.axes.base import Axis, search_space
from nestlm.nn.decoder import Decoder
from nestlm.router.trial import Trial
from nestlm.spec import SearchSpace
from plugins import build, options
from routers import CONFIG, batches


@pytest.fixture(params=options("axes"))
def axes(request: pytest.FixtureRequest) -> tuple[Axis, ...]:
    """Every shipped config, which names every axis; eight heads and 32 neurons can be cut by all shipped fractions."""
    return tuple(build("axes", request.param).values())


@pytest.fixture(params=DECODERS)
def decoder(request: pytest.FixtureRequest) -> Decoder:
    """Every kind of decoder."""
    return random_decoder(DECODERS[request.param])


@pytest.fixture
def space(axes, decoder) -> SearchSpace:
    return search_space(axes, decoder.config)


@pytest.fixture
def trial() -> Trial:
    return Trial(random_decoder(CONFIG), batches(0))


@pytest.fixture
def deciding(monkeypatch) -> None:
    """A plan in which no site decides is no answer: otherwise the best one may leave nothing to look at."""
    monkeypatch.setattr("nestlm.router.per_token.LEAST_USED", 1.1)
