"""The allocator's arenas, counted by glibc itself."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, sys, threading
from teacher_server.arenas import limit_arenas
if sys.argv[1] == "limited":
    assert limit_arenas()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
meeting = threading.Barrier(8)
def allocate():
    meeting.wait()
    libc.malloc(1000)
    meeting.wait()
threads = [threading.Thread(target=allocate) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
libc.malloc_info(0, ctypes.c_void_p.in_dll(libc, "stdout"))
libc.fflush(None)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has arenas")
def test_threads_share_two_arenas() -> None:
    assert _arenas("limited") == 2
    assert _arenas("as it comes") > 2


def _arenas(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", PROGRAM, how], check=True, capture_output=True, text=True)
    return done.stdout.count("<heap nr=")
