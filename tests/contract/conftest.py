"""What router tests share."""

import pytest

from models import random_decoder
from nestlm.router.trial import Trial
from routers import CONFIG, batches


@pytest.fixture
def trial() -> Trial:
    return Trial(random_decoder(CONFIG), batches(0))


@pytest.fixture
def deciding(monkeypatch) -> None:
    """A plan in which no site decides is no answer: otherwise the best one may leave nothing to look at."""
    monkeypatch.setattr("nestlm.router.per_token.LEAST_USED", 1.1)
