"""Bars on a terminal, lines elsewhere."""

import os
import pty
import subprocess
import sys
from pathlib import Path

import processes
from plugins import NANO

TRAIN = Path(__file__).parents[2] / "train.py"


def test_bars_on_a_terminal_and_quiet_elsewhere(tmp_path):
    arguments = [sys.executable, str(TRAIN), *NANO, "pretrain.steps=150", "budget=0.9"]
    leader, follower = pty.openpty()
    shown = subprocess.Popen(
        [*arguments, f"run_dir={tmp_path / 'a'}", f"cache_dir={tmp_path / 'ca'}"],
        stdout=follower, stderr=follower, env=os.environ | {"TERM": "xterm-256color", "COLUMNS": "120"},
    )  # fmt: skip
    os.close(follower)
    seen = b""
    try:
        while chunk := os.read(leader, 65536):
            seen += chunk
    except OSError:  # the other end was closed
        pass
    assert shown.wait() == 0
    for part in (b"pretrain", b"loss", b"tokens/s", b"/150"):
        assert part in seen
    quiet = processes.run([*arguments, f"run_dir={tmp_path / 'b'}", f"cache_dir={tmp_path / 'ca'}"], check=True)
    assert "tokens/s" not in quiet.stderr
    assert len(quiet.stderr.splitlines()) == 7, "one line a stage"
