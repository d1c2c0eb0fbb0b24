"""Blocks that are freed and taken again, in a process of their own."""

import subprocess
import sys

import pytest

LOOP = """
import resource
import torch
from nestlm.allocation import keep_freed_blocks

if {keeps}:
    keep_freed_blocks(torch.device("cpu"))
for step in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(2**22) for _ in range(4)]
    while blocks:
        blocks.pop()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(*, keeps: bool) -> int:
    """Pages that the last of several alike steps fetched from the system; its blocks take 2**14 of 4 KiB."""
    code = LOOP.format(keeps=keeps)
    return int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc has the setting")
def test_a_step_fetches_no_pages_that_the_one_before_had():
    assert faults(keeps=False) > 2**13
    assert faults(keeps=True) < 2**8
