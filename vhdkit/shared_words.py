# SPDX-License-Identifier: Apache-2.0
"""Numbers in a file in memory, which other processes find after this one has died.

Decides how they are put there. Must not know what they mean.
"""

from __future__ import annotations

import mmap

from vhdkit.folder import NewFile
from vhdkit.wording import translated


class SharedWords:
    """A few numbers in a file, changed without a system call: what was put there outlives this process at once.

    On a file system in memory, that is: nothing is ever synced.
    """

    def __init__(self, path: str, count: int) -> None:
        """Make the file, all numbers 0. Raises AccessDenied, NoSpace, IoFailed."""
        with NewFile(path, replace=True) as new:
            new.store.pwrite(0, bytes(8 * count))
            new.commit()
            with translated(path, "share the memory of"):
                self._mapping = mmap.mmap(new.store.fileno(), 8 * count)
        self.words = memoryview(self._mapping).cast("Q")
