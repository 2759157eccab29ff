"""How glibc's allocator spreads a process's memory."""

import ctypes

ARENAS = 2
M_ARENA_MAX = -8  # malloc.h


def limit_arenas(count: int = ARENAS) -> bool:
    """At most ``count`` arenas from now on; to be called before threads begin. False where the C library has no such.

    glibc gives threads arenas of their own, up to eight for each core, and each keeps the largest labels that its
    thread has had in hand: up to a quarter more resident memory for each student that reads slowly (``slow_readers``).
    """
    try:
        return bool(ctypes.CDLL(None).mallopt(M_ARENA_MAX, count))
    except (AttributeError, OSError, TypeError):
        return False
