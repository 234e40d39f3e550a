# SPDX-License-Identifier: Apache-2.0
"""The lifetime of a file descriptor: no call uses its number without holding it, and it does not outlive its owner.

Decides when a descriptor is closed. Must not know what is read or written through it.

`INV-DESCRIPTOR-HELD`: the system reuses the number of a closed descriptor for the next file opened in any thread. So
every use is first recorded in `inside`, and the descriptor is closed only when no use is left. Calls after `close`
find the number -1.

`INV-FORK-APART`: a forked process shares the locks and the position in the file with its parent, but not what the
parent knows about the image. Its copies of the descriptors are closed at once; nothing of the parent's is released.

A signal handler can raise an exception when one of our Python calls returns, but never inside a call into C. This is
the reason for some unusual constructs below: steps that belong together are made in one call into C.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Concatenate, ParamSpec, Protocol, TypeVar, cast

from vhdkit import errors

_LOOK_SECONDS = 0.001  # a call in progress usually leaves within microseconds
_CLOSERS = 8  # files closed at once
_P = ParamSpec("_P")
_R = TypeVar("_R")
_D = TypeVar("_D", bound="Descriptor")

_open: weakref.WeakSet[Descriptor] = weakref.WeakSet()
_passing_on: list[None] = []  # not empty: a forked process takes over the open files


class Owned(list[int]):
    """An open descriptor until `close_owned` closes it; closed when garbage-collected."""

    def __del__(self) -> None:
        with contextlib.suppress(OSError):
            close_owned(self)


def opened(path: str, flags: int, mode: int = 0o600, *, dir_fd: int | None = None) -> Owned:
    """`os.open`, but the number has an owner before any exception can arrive. Raises OSError, ValueError."""
    owned = Owned()
    call = os.open if dir_fd is None else functools.partial(os.open, dir_fd=dir_fd)
    owned.extend(map(call, (path,), (flags,), (mode,)))
    return owned


def close_owned(owned: list[int]) -> None:
    """Close the descriptor in the list and empty the list; later callers find nothing to close. Raises OSError."""
    with contextlib.suppress(IndexError):  # `pop` raises it when nothing is left
        for _ in map(os.close, iter(owned.pop, None)):
            pass


def held(method: Callable[Concatenate[_D, _P], _R]) -> Callable[Concatenate[_D, _P], _R]:
    """Wrap a method that uses the descriptor, which stays open until the method returns. Raises DiskClosed."""

    @functools.wraps(method)
    def holding(self: _D, *arguments: _P.args, **keywords: _P.kwargs) -> _R:
        inside = self.inside
        try:
            inside.append(None)
            if self._fd < 0:
                raise self.closed_error()
            return method(self, *arguments, **keywords)
        finally:
            inside.pop()
            if self._fd < 0:
                self.let_go()

    return cast("Callable[Concatenate[_D, _P], _R]", holding)


class Descriptor:
    """A descriptor and the calls that use it. `_fd` is its number until closing begins, then -1."""

    def __init__(self, owned: list[int], path: str, *, writable: bool) -> None:
        """Take over the descriptor in the list, which `opened` made."""
        self._owned = owned
        self._fd = owned[0]
        self._path = path
        self.writable = writable
        self.inside: list[None] = []  # one entry for each call in progress
        self.is_left_by_fork = False  # it belongs to the parent process; our copy was closed
        _open.add(self)

    def closed_error(self) -> errors.DiskClosed:
        """The error for a use after the end, with the reason."""
        if self.is_left_by_fork:
            return errors.DiskClosed(
                "was opened before this process was forked",
                path=self._path,
                hint="open it in this process, after the parent process has closed it",
            )
        return errors.DiskClosed("the disk is closed", path=self._path)

    def let_go(self) -> None:
        """Close the descriptor, now or when the last call in progress leaves. Raises OSError."""
        if not self.inside:
            close_owned(self._owned)

    def close_descriptor(self) -> None:
        """Refuse new calls, wait for those in progress, close. Called again, it resumes where an exception struck.

        Called from inside one of its own calls (a signal handler), it does not wait: that call closes on leaving.
        """
        self._fd = -1
        self.let_go()
        while self._owned and not self._is_entered_here():
            time.sleep(_LOOK_SECONDS)  # without a limit, and in a form that an exception at any line leaves whole
            self.let_go()

    def _is_entered_here(self) -> bool:
        """True when this thread is inside one of the calls in progress."""
        frame = sys._getframe(1)
        while frame.f_back is not None:
            frame = frame.f_back
            if frame.f_locals.get("inside") is self.inside:
                return True
        return False

    def __del__(self) -> None:
        if getattr(self, "_owned", None):
            lost = "; what was written since its last flush may be lost" if self.writable else ""
            with contextlib.suppress(OSError):
                close_owned(self._owned)
            warnings.warn(f"{self._path!r} was never closed{lost}", ResourceWarning, stacklevel=2, source=self)


class Closable(Protocol):
    """Anything with open files."""

    def close(self) -> None:
        """Close them."""
        ...


def close_all(stores: Iterable[Closable]) -> None:
    """Close several stores concurrently: closing the last descriptor of an unlinked file frees its space
    synchronously, and that is slow on a device mounted with `discard`."""
    from concurrent.futures import ThreadPoolExecutor  # a slow import that few callers need

    closings, left = [], []
    with ThreadPoolExecutor(_CLOSERS, thread_name_prefix="vhdkit-close") as pool:
        for store in stores:
            try:
                closings.append(pool.submit(store.close))
            except RuntimeError:  # the system allows no more threads
                left.append(store)
    with contextlib.ExitStack() as here:  # a thread that did start may have closed them, too
        for store in left:
            here.callback(store.close)
    for closing in closings:
        closing.result()


@contextlib.contextmanager
def passing_on() -> Iterator[None]:
    """A process forked in the block takes over the open descriptors, because the parent stops using them."""
    _passing_on.append(None)
    try:
        yield
    finally:
        _passing_on.pop()


def when_forked(act: Callable[[], object]) -> None:
    """Register `act` for every forked process that does not take over the open descriptors. `act` must not wait:
    locks may be held by threads that do not exist there.
    """
    os.register_at_fork(after_in_child=lambda: None if _passing_on else act())


def _forked() -> None:
    """Close this process's copies. Only this thread exists here; calls of other threads never leave."""
    for one in list(_open):
        one.is_left_by_fork = True
        one._fd = -1
        with contextlib.suppress(OSError):
            close_owned(one._owned)


when_forked(_forked)
