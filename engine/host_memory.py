"""What a worker's process asks of its C library."""

from __future__ import annotations

import contextlib
import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGEST = 32 << 20  # bytes; glibc refuses more


def keep_freed_memory() -> None:
    """Let glibc keep what a step frees for the next one, instead of giving it back to the system.

    A step on the CPU allocates and frees tens of megabytes of activations. Given back each time, they come back as
    pages that the kernel must find and zero first: a quarter of a prefill's time was spent on that
    (docs/benchmarks.md). Costs as much memory as the largest step, and does nothing with another C library.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, _LARGEST)
        mallopt(_M_TRIM_THRESHOLD, 1 << 30)
