"""Runs of the whole pipeline, small enough for a test."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from filelock import FileLock

from nestlm.api.run_and_report import run_and_report
from nestlm.config.compose import build, compose
from nestlm.distributed import sharded_checkpoint as checkpoint
from nestlm.train.callbacks.timed_checkpoint import complete
from plugins import NANO

Run = Callable[..., Path]


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this test session, the same in all of its worker processes."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def shared_cache(shared_folder: Path) -> Path:
    """One stage cache for all tests and workers: stages that they share run once, since a stage's folder is locked."""
    return shared_folder / "cache"


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
    """Return a finished run without its cache, to be read only; the first worker that asks for it makes it."""
    with FileLock(place.with_suffix(".lock")):
        if not (place / "SHA256SUMS").is_file():  # which a run writes last
            cache = place.with_name(f"{place.name}-cache")
            small = ["router.steps=3", "router.num_sequences=4", f"run_dir={place}", f"cache_dir={cache}"]
            plain = compose([*NANO, *small, *overrides])
            assert run_and_report(build(plain), config=plain) is not None
            shutil.rmtree(cache)
    return place


@pytest.fixture(scope="session")
def static_run(shared_folder: Path) -> Path:
    """The folder of a run whose router names one sub-network for a budget."""
    return whole_run(shared_folder / "static", *STATIC)


@pytest.fixture(scope="session")
def dynamic_run(shared_folder: Path) -> Path:
    """The folder of a run whose router decides for each token."""
    return whole_run(shared_folder / "dynamic", *DYNAMIC)


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
