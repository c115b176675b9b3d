"""The host's memory allocator: whether freed memory goes back to the system.

By default glibc returns large blocks at once and gets them anew, zeroed page by page, at the next call. For a forward on the
CPU that is 5,000 to 56,000 page faults, a number that depends on what the process has done before: timings of the same model
differ by a quarter between processes. Allocators made for servers (jemalloc, tcmalloc) keep their memory, and glibc can be told to.
"""

from __future__ import annotations

import ctypes
import os
import sys

# Parameters of mallopt(3), from malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
TOP_PAD = 64 << 20  # bytes by which the heap grows at least

_kept = False


def keep_memory() -> None:
    """Lets this process keep what it frees, from now on. Does nothing where the allocator is not glibc's."""
    global _kept
    if not sys.platform.startswith("linux") or os.environ.get("LD_PRELOAD"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # musl, say
        return
    _kept = bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1) and mallopt(M_TOP_PAD, TOP_PAD))


def described() -> str:
    """For records: "kept", "default", or the libraries that are loaded before all others and may bring an allocator of their own."""
    return "kept" if _kept else os.environ.get("LD_PRELOAD") or "default"
