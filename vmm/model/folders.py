# SPDX-License-Identifier: Apache-2.0
"""Which state home and which runtime folder a call works with: those of the object that it was made on, else those of
the environment.

    with Folders.given(home="/srv/vmm").used():
        paths.home()                                 "/srv/vmm", in this thread or task alone

Decides that folders given to `vmm.Manager` hold for everything that is done on its behalf, also by the objects that it
hands out and by the processes that it starts (`environment`), and for nothing else: two managers with different
folders may be used side by side, in threads, too. Must not know what lies in the folders.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar


@dataclass(frozen=True, slots=True)
class Folders:
    """Absolute paths; None: as the environment says ($VMM_HOME, $VMM_RUNTIME)."""

    home: str | None = None
    runtime: str | None = None

    @classmethod
    def given(
        cls, home: str | os.PathLike[str] | None = None, runtime: str | os.PathLike[str] | None = None
    ) -> Folders:
        """These, and where one is not given, the one in use now."""
        now = _IN_USE.get()
        return cls(
            now.home if home is None else os.path.abspath(os.fspath(home)),
            now.runtime if runtime is None else os.path.abspath(os.fspath(runtime)),
        )

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """They are in use while the block runs, in this thread or task."""
        before = _IN_USE.set(self)
        try:
            yield
        finally:
            _IN_USE.reset(before)

    def environment(self) -> dict[str, str]:
        """The variables with which another process uses them, too."""
        found = {"VMM_HOME": self.home, "VMM_RUNTIME": self.runtime}
        return {name: path for name, path in found.items() if path is not None}


_IN_USE: ContextVar[Folders] = ContextVar("vmm_folders", default=Folders())  # noqa: B039 (frozen)


def in_use() -> Folders:
    """The folders in use now."""
    return _IN_USE.get()


class HasFolders(Protocol):
    """An object that works with folders of its own."""

    folders: Folders


Class = TypeVar("Class", bound=type[HasFolders])


def uses_own_folders(cls: Class) -> Class:
    """A class whose public methods all run with `self.folders` in use; no method can forget it."""
    for name, method in list(vars(cls).items()):
        if inspect.isfunction(method) and not name.startswith("_"):
            setattr(cls, name, _with_folders(method))
    return cls


def _with_folders(method: Callable[..., Any]) -> Callable[..., Any]:
    assert not inspect.isgeneratorfunction(method), "its body would run later, with other folders"

    @functools.wraps(method)
    def called(self: HasFolders, *words: Any, **named: Any) -> Any:
        with self.folders.used():
            return method(self, *words, **named)

    return called
