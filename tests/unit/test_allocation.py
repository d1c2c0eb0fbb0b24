"""Blocks that are freed and taken again, in a process of their own."""

import subprocess
import sys

import pytest

CODE = """
import ctypes
import torch
from nestlm.utils.malloc import keep_freed_blocks

class Account(ctypes.Structure):  # of mallinfo(3)
    _fields_ = [(name, ctypes.c_int) for name in ("heap", "a", "b", "c", "mapped", "d", "e", "f", "g", "h")]

libc = ctypes.CDLL(None)
libc.mallinfo.restype, libc.malloc.restype, libc.free.argtypes = Account, ctypes.c_void_p, [ctypes.c_void_p]

def held():
    account = libc.mallinfo()
    return account.heap + account.mapped

if {keeps}:
    keep_freed_blocks(torch.device("cpu"))
before = held()
blocks = [libc.malloc(ctypes.c_size_t(2**24)) for _ in range(4)]
while blocks:
    libc.free(blocks.pop())
print(held() - before)
"""


def held(*, keeps: bool) -> int:
    """Bytes of the system's that the C library holds on to, of 2**26 that were taken and freed."""
    code = CODE.format(keeps=keeps)
    return int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc has the setting")
def test_what_a_step_freed_is_there_for_the_next():
    assert held(keeps=False) < 2**24
    assert held(keeps=True) > 3 * 2**24
