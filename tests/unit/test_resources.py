"""Errors about missing resources become one line; other errors pass through."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nestlm.errors import ConfigError, ResourceError
from nestlm.utils.resources import check_writable, resource_error, resource_errors

FULL = Path("/dev/full")  # every write to it fails as on a full disk


def write_by_hand(path: Path) -> None:
    with path.open("w") as file:
        file.write("a")


def save_by_torch(path: Path) -> None:
    with path.open("wb") as file:
        torch.save({"a": torch.ones(10)}, file)


@pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("write", [write_by_hand, save_by_torch])
def test_a_full_disk_is_named(write):
    with pytest.raises(ResourceError) as found, resource_errors(Path("PLACE")):
        write(FULL)
    assert "cannot write PLACE (No space left on device); free some space" in str(found.value)
    assert "\n" not in str(found.value)


def test_limits_of_files_and_memory_are_named(tmp_path):
    """Each case runs in a process with a small limit."""
    script = """
import resource, sys, torch
from safetensors.torch import save_file
from nestlm.utils.resources import resource_errors
kind, limit, code = sys.argv[1:]
resource.setrlimit(getattr(resource, kind), (int(limit), int(limit)))
try:
    with resource_errors():
        exec(code)
except Exception as error:
    print(type(error).__name__, error)
"""
    cases = {
        "raise the limit of file sizes": ("RLIMIT_FSIZE", 1000, "save_file({'a': torch.ones(1000)}, 'weights')"),
        "raise the limit of open files": ("RLIMIT_NOFILE", 8, "files = [open('a', 'w') for _ in range(9)]"),
        "free some memory": ("RLIMIT_AS", 2**33, "torch.ones(2**34)"),
        "or take a smaller model": ("RLIMIT_AS", 2**33, "bytearray(2**35)"),
    }
    jobs = {
        cure: subprocess.Popen(
            [sys.executable, "-c", script, *map(str, case)], cwd=tmp_path, stdout=subprocess.PIPE, text=True
        )
        for cure, case in cases.items()
    }
    told = {cure: job.communicate()[0] for cure, job in jobs.items()}
    for cure, said in told.items():
        assert said.startswith("ResourceError"), said
        assert cure in said


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("unable to write to file </torch_1>: No space left on device (28)"),
        RuntimeError("[enforce fail at inline_container.cc:664] . PytorchStreamWriter failed writing file data/3"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.\nMore"),
        ImportError("libtorch.so: failed to map segment from shared object"),
        RuntimeError("can't start new thread"),
        PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/a" * 3000),
        MemoryError(),
    ],
)
def test_what_libraries_say_is_understood(error):
    try:
        raise KeyError("afterwards") from error
    except KeyError as late:
        found = resource_error(late)
    assert found is not None
    assert len(str(found)) < 400
    assert "\n" not in str(found)


@pytest.mark.parametrize("error", [KeyError("a"), RuntimeError("shapes differ"), FileNotFoundError(2, "none", "a")])
def test_a_bug_stays_a_bug(error):
    assert resource_error(error) is None
    with pytest.raises(type(error)), resource_errors():
        raise error


def test_places_are_looked_at_before_anything_is_made(tmp_path):
    check_writable(tmp_path / "new/folder", setting="run_dir")
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"run_dir: cannot write to .*file \(Not a directory\)"):
        check_writable(tmp_path / "file/folder", setting="run_dir")
    (tmp_path / "nowhere").symlink_to(tmp_path / "absent")
    with pytest.raises(ConfigError, match="Not a directory"):
        check_writable(tmp_path / "nowhere", setting="run_dir")
