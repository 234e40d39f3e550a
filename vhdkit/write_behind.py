# SPDX-License-Identifier: Apache-2.0
"""The device writes what a program has written, while the program writes more.

Decides when the device is asked to start, so that the sync at the end has little left to wait for. Must not know what
the bytes mean. Asking orders nothing and promises nothing: the sync does that, and it reports what failed.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading

from vhdkit.units import MIB

BEHIND_BYTES = 16 * MIB  # written before the device is asked; measured on ext4, XFS and Btrfs: 8 to 32 MiB are alike
WAIT_BEFORE, WRITE = 1, 2  # flags of sync_file_range(2)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]


def sync_file_range(fd: int, flags: int) -> bool:
    """sync_file_range(2) on a whole file; False if it failed."""
    return not _libc.sync_file_range(fd, 0, 0, flags)


class WriteBehind:
    """For one open file, whose descriptor remains the caller's. Any thread may call it."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._lock = threading.Lock()
        self._behind_bytes = 0
        self._writing: threading.Thread | None = None

    def wrote(self, size_bytes: int) -> None:
        """Note that this many bytes were written somewhere in the file. Never waits for the device."""
        self._behind_bytes += size_bytes
        if self._behind_bytes < BEHIND_BYTES:
            return
        with self._lock:
            if self._writing is not None and self._writing.is_alive():
                return
            self._behind_bytes = 0
            # In a thread, because the call waits while the device's queue is full.
            self._writing = threading.Thread(
                target=sync_file_range, args=(self._fd, WRITE), name="write-behind", daemon=True
            )
            with contextlib.suppress(RuntimeError):  # no thread available: the sync writes it later
                self._writing.start()

    def close(self) -> None:
        """Wait for pending work; call this before closing the descriptor, when nothing more is written."""
        writing = self._writing  # without the lock, which may be held forever in a forked process
        if writing is not None and writing.is_alive():
            writing.join()
