# SPDX-License-Identifier: Apache-2.0
"""A file with the memory and devices of a machine, as QEMU wrote it (its migration stream).

Decides the minimum requirements for such a file: that it begins like a migration stream, and is not shorter than the
amount of memory that QEMU reports to have written. Must not know who writes or reads it, nor where it is stored.

INV-MEMORY-WHOLE: no memory is reported as saved or captured, and none is restored, before its file is examined here.

Source: QEMU's migration/savevm.c (QEMU_VM_FILE_MAGIC and QEMU_VM_FILE_VERSION, which is 3 since 2006).
"""

from __future__ import annotations

import os

MAGIC = b"QEVM"
VERSION = 3
HEADER = MAGIC + VERSION.to_bytes(4, "big")


def problem_of(descriptor: int, size_bytes: int, *, memory_bytes: int = 0) -> str | None:
    """Why the first `size_bytes` of this file cannot be a machine's memory; None if they can.

    `memory_bytes`: the amount of memory alone that QEMU reports to have written. Raises OSError.
    """
    found = os.fstat(descriptor).st_size
    if found < size_bytes:
        return f"the file has {found} bytes instead of {size_bytes}"
    if size_bytes <= len(HEADER):
        return f"the file has only {size_bytes} bytes"
    if os.pread(descriptor, len(HEADER), 0) != HEADER:
        return "the file does not begin like memory that QEMU wrote"
    if size_bytes < memory_bytes:
        return f"the file has {size_bytes} bytes, and QEMU says that it wrote {memory_bytes} of the memory alone"
    return None
