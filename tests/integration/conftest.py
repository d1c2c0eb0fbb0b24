"""Runs of the whole pipeline, small enough for a test."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from nestlm.api.run_and_report import run_and_report
from nestlm.config.compose import build, compose
from nestlm.distributed import sharded_checkpoint as checkpoint
from nestlm.train.callbacks.timed_checkpoint import complete
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
        finished = run_and_report(build(plain), config=plain)
        assert finished is not None
        return finished.folder

    return run_with


# Small enough, and wide enough that deciding for each token pays.
STATIC = ["budget=[1.0,0.8,[0.7,0.9params]]"]
DYNAMIC = ["router=surrogate", "router.policy=dynamic", "model.mlp_width=384", "budget=[1.0,0.8,0.7]"]


def whole_run(place: Path, *overrides: str) -> Path:
    """A finished run, to be read only; its stages lie beside it."""
    small = ["router.steps=3", "router.num_sequences=4", f"run_dir={place / 'run'}", f"cache_dir={place / 'cache'}"]
    plain = compose([*NANO, *small, *overrides])
    finished = run_and_report(build(plain), config=plain)
    assert finished is not None
    return finished.folder


@pytest.fixture(scope="session")
def static_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run whose router names one sub-network for a budget. Its cache is gone."""
    folder = whole_run(tmp_path_factory.mktemp("static"), *STATIC)
    shutil.rmtree(folder.with_name("cache"))
    return folder


@pytest.fixture(scope="session")
def dynamic_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run whose router decides for each token. Its cache is gone."""
    folder = whole_run(tmp_path_factory.mktemp("dynamic"), *DYNAMIC)
    shutil.rmtree(folder.with_name("cache"))
    return folder


@pytest.fixture
def sharded_checkpoint(tmp_path: Path) -> Path:
    """A checkpoint as ranks write it, of one rank; beside it the model's weights, expected.pt."""
    model = torch.nn.ModuleDict({"decoder": torch.nn.Linear(3, 2), "router": torch.nn.Linear(2, 1)})
    optimizer = torch.optim.AdamW(model.parameters())
    folder = tmp_path / "step=00000001.ckpt"
    dcp.save(checkpoint.state_of(model, optimizer), checkpoint_id=folder, no_dist=True)
    torch.save({"epoch": 0}, folder / checkpoint.LOOPS)
    complete(folder, None)
    torch.save(model.state_dict(), tmp_path / "expected.pt")
    return folder
