# SPDX-License-Identifier: Apache-2.0
"""The memory of a failed flush or an interrupted write, shared by every format.

Decides one thing: after a flush to the device failed, nothing may be written or flushed through this open image
any more, because the kernel forgets the failed pages and a second fsync would claim success for lost data. The same
holds after Ctrl-C struck in the middle of a write: memory may know half of it, while the file on disk is whole.
"""

from __future__ import annotations

from vhdkit import errors
from vhdkit.store import Store


class SyncGuard:
    """Syncs a store and refuses all further writing once a sync has failed."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.failure: errors.SyncFailed | None = None

    def check(self) -> None:
        """Raise SyncFailed when an earlier flush failed."""
        if self.failure is not None:
            raise errors.SyncFailed(self.failure.problem, path=self.failure.path, hint=self.failure.hint)

    def interrupted(self) -> None:
        """A write or flush was left in the middle by something that is no error of ours, such as Ctrl-C."""
        self.failure = self.failure or errors.SyncFailed(
            "a write to this disk was interrupted",
            path=self._store.name,
            hint="close the disk and open it again: everything that was flushed is there",
        )

    def sync(self) -> None:
        """Sync the store. Raises SyncFailed, now and from now on, when that fails."""
        self.check()
        try:
            self._store.sync()
        except errors.SyncFailed as failure:
            self.failure = failure
            raise
