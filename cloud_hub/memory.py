"""Memory that is freed in a round is kept for the next update, and given back when the round is over.

Reads and writes nothing; sets the C library's allocator, where that is glibc.
Never needed for the hub to work: elsewhere both calls do nothing.
Source: mallopt(3), malloc_trim(3). Measured: half of an update's time was page faults of fresh memory.
"""

import ctypes
from contextlib import suppress

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT_BYTES = 1 << 28  # freed at the heap's end and not returned at once
MAPPED_FROM_BYTES = 1 << 25  # glibc's largest: what is larger is mapped and unmapped each time

_libc = ctypes.CDLL(None)


def keep_freed() -> None:
    with suppress(AttributeError):  # no glibc
        _libc.mallopt(M_MMAP_THRESHOLD, MAPPED_FROM_BYTES)
        _libc.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


def give_back() -> None:
    with suppress(AttributeError):
        _libc.malloc_trim(0)
