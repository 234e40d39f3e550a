# SPDX-License-Identifier: Apache-2.0
"""Giving memory back to the system. Decides nothing.

What many clients made the server keep was allocated by several threads, small and large in turn. glibc gives back only
what lies at the end of each of its heaps (mallopt(3), M_TRIM_THRESHOLD), so the rest stays with the process until
`malloc_trim(3)`. Other C libraries have no such function.
"""

from __future__ import annotations


def trim() -> None:
    """Give free memory back. On a worker: it takes some milliseconds, in which others can run."""
    import ctypes  # rarely needed

    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(ctypes.c_size_t(0))
