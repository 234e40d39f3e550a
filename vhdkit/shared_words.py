# SPDX-License-Identifier: Apache-2.0
"""Numbers in a memory-backed file, which other processes can read after this one has died.

Decides how they are stored. Must not know what they mean.
"""

from __future__ import annotations

import mmap

from vhdkit.folder import NewFile
from vhdkit.wording import translated


class SharedWords:
    """A few numbers in a file, changed without a system call: a stored number outlives this process immediately.

    The file must be on a memory file system, because nothing is ever synced.
    """

    def __init__(self, path: str, count: int) -> None:
        """Create the file with all numbers 0. Raises AccessDenied, NoSpace, IoFailed."""
        with NewFile(path, replace=True) as new:
            new.store.pwrite(0, bytes(8 * count))
            new.commit()
            with translated(path, "share the memory of"):
                self._mapping = mmap.mmap(new.store.fileno(), 8 * count)
        self.words = memoryview(self._mapping).cast("Q")
