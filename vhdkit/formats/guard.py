# SPDX-License-Identifier: Apache-2.0
"""What an image remembers of a failed flush or an interrupted write; shared by every format.

Decides two things. After a flush to the device failed, nothing may be written or flushed through this open image any
more, because the kernel forgets the failed pages and a second fsync would claim success for lost data. And after
Ctrl-C, or an exception of a signal handler, in the middle of a write, nothing more is written, because the state in
memory may reflect only half of that write. What was written before it is whole, so a flush and closing make it
durable.

`INV-CLOSE-REPORTS`: `close` returns without an error only if every write that returned is on the device.
"""

from __future__ import annotations

from collections.abc import Callable

from vhdkit import errors
from vhdkit.store import Store


class SyncGuard:
    """Syncs a store and refuses all further writing once a sync has failed, or a write was interrupted."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.failure: errors.SyncFailed | None = None
        self.is_interrupted = False  # the failure is an interrupted write: what was written before it can be flushed
        self._is_refused = False  # the failure is not one of a flush: everything was flushed
        self._has_ended = False
        self._has_lost = False

    def check(self) -> None:
        """Raise SyncFailed when an earlier flush failed, or a write was interrupted."""
        if self.failure is not None:
            raise errors.SyncFailed(self.failure.problem, path=self.failure.path, hint=self.failure.hint)

    def interrupted(self) -> None:
        """A write was interrupted by an exception that is not ours, such as that of Ctrl-C."""
        if self.failure is None:
            self.is_interrupted = True
            self.failure = errors.SyncFailed(
                "a write to this disk was interrupted, so further writes are refused",
                path=self._store.name,
                hint="close the disk and open it again: earlier writes are kept",
            )

    def refuse(self) -> None:
        """The file was changed through another opening: this one, which was flushed, must not write any more."""
        if self.failure is None or self.is_interrupted:
            self.is_interrupted, self._is_refused = False, True
            self.failure = errors.SyncFailed(
                "the image was changed through another open handle",
                path=self._store.name,
                hint="close the disk and open it again: everything that was flushed is there",
            )

    def sync(self) -> None:
        """Sync the store. Raises SyncFailed if that fails, now and on every later call."""
        if not self.is_interrupted:
            self.check()
        try:
            self._store.sync()
        except errors.SyncFailed as failure:
            self.failure, self.is_interrupted = failure, False
            raise

    def finish(self, work: Callable[[], None]) -> None:
        """Make everything durable with `work` before the image is closed. If an exception that is not ours interrupts
        `work`, it runs once more. If that fails too, the next call reports the loss; otherwise further calls do
        nothing.

        Raises what `work` raises, and SyncFailed for an image whose flush had failed.
        """
        if self._has_ended:
            if self._has_lost:
                self._has_lost = False
                raise errors.SyncFailed(
                    "closing this disk was interrupted: what was written since the last flush is lost",
                    path=self._store.name,
                )
            return
        self._has_ended = self._has_lost = True
        if self._is_refused:
            self._has_lost = False
            return
        try:
            if not self.is_interrupted:
                self.check()
            try:
                work()
            except errors.VhdkitError:
                raise
            except BaseException:
                work()
                self._has_lost = False
                raise
        except errors.VhdkitError:  # the caller of `close` gets the error
            self._has_lost = False
            raise
        self._has_lost = False


class WholeWrite:
    """The context of a write: if an exception other than our errors ends it midway, nothing more is written.

    `ended` is called in any case. One object serves all writes of an image.
    """

    def __init__(self, guard: SyncGuard, ended: Callable[[], None]) -> None:
        self._guard = guard
        self._ended = ended

    def __enter__(self) -> None:
        """The write begins."""

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """The write ends."""
        try:
            if kind is not None and not issubclass(kind, errors.VhdkitError):
                self._guard.interrupted()
        finally:
            self._ended()
