"""Runs of the whole pipeline, small enough for a test."""

from collections.abc import Callable
from pathlib import Path

import pytest

from nestlm import pipeline
from nestlm.compose import build, compose
from plugins import NANO

Run = Callable[..., Path]


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One stage cache for all tests of a process: stages that they share run once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def run(tmp_path: Path, shared_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the pipeline in this process; returns the run's folder."""
    monkeypatch.chdir(tmp_path)

    def run_with(*overrides: str, name: str = "run", cache: Path = shared_cache) -> Path:
        plain = compose([*NANO, f"run_dir={tmp_path / name}", f"cache_dir={cache}", *overrides])
        finished = pipeline.run(build(plain), config=plain)
        assert finished is not None
        return finished.folder

    return run_with
