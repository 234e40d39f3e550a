# SPDX-License-Identifier: Apache-2.0
"""Whether a file is a VHDX at all.

Decides that by its first bytes, which are never rewritten after creation. Every file that is opened is examined here,
so this module imports nothing else of VHDX.

Source: [MS-VHDX] 2.2.1.
"""

from __future__ import annotations

from vhdkit.store import ReadStore

FORMAT_NAME = "vhdx"
FILE_IDENTIFIER = b"vhdxfile"


def has_identifier(store: ReadStore) -> bool:
    """Whether the file begins with the file type identifier of a VHDX. Raises IoFailed."""
    return store.pread(0, len(FILE_IDENTIFIER)) == FILE_IDENTIFIER
