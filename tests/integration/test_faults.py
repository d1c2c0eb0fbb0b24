"""Kills, damages and bad overrides, some of each: nothing ends in a traceback, or otherwise without a word."""

import subprocess
import sys
from pathlib import Path

import pytest

FAULTS = Path(__file__).parents[2] / "benchmarks/faults.py"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_short_campaign_finds_nothing_wrong():
    ended = subprocess.run([sys.executable, str(FAULTS), "--short", "--jobs", "1"], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
