# SPDX-License-Identifier: Apache-2.0
"""Callers' buffers as plain bytes (`INV-FLAT-BUFFERS`).

Decides which buffers are accepted, and that their bytes are those of `bytes(buffer)`. Must not know what they are for.
"""

from __future__ import annotations

import numpy as np

from vhdkit import errors


def flat(buffer: bytes | bytearray | memoryview, *, writable: bool = False) -> memoryview:
    """The bytes of a buffer of any shape and format, contiguous: its own memory, or a copy if it has gaps.

    A writable one must be without gaps. Raises InvalidArgument, and TypeError if it is not a buffer.
    """
    view = memoryview(buffer)
    if writable and view.readonly:
        raise errors.InvalidArgument("the buffer to read into is read-only")
    if view.nbytes == 0:
        return memoryview(bytearray())
    if view.c_contiguous:
        return np.frombuffer(view, dtype=np.uint8).data
    if writable:
        raise errors.InvalidArgument("the buffer to read into has gaps", hint="pass a contiguous buffer")
    return memoryview(view.tobytes())
