# SPDX-License-Identifier: Apache-2.0
"""Whether a file is a VHDX at all.

Decides that by its first bytes, which are never written again after it was made. It is asked of every file that is
opened, so nothing else of VHDX is imported here.

Source: [MS-VHDX] 2.2.1.
"""

from __future__ import annotations

from vhdkit.store import ReadStore

FORMAT_NAME = "vhdx"
FILE_IDENTIFIER = b"vhdxfile"


def has_identifier(store: ReadStore) -> bool:
    """True for a file that begins as every VHDX does. Raises IoFailed."""
    return store.pread(0, len(FILE_IDENTIFIER)) == FILE_IDENTIFIER
