# SPDX-License-Identifier: Apache-2.0
"""The state home and the runtime folder that a call uses: those of the object that it is called on, or those of the
environment.

    with Folders.given(home="/srv/vmm").used():
          paths.home()                                 "/srv/vmm", in this thread or task only

Decides that folders given to `vmm.Manager` hold for everything done on its behalf, including the objects that it
returns and the processes that it starts (`environment`), and for nothing else: managers with different folders can be
used side by side, also in threads. Must not know what the folders contain.
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
    """Absolute paths. None: taken from the environment ($VMM_HOME, $VMM_RUNTIME)."""

    home: str | None = None
    runtime: str | None = None

    @classmethod
    def given(
        cls, home: str | os.PathLike[str] | None = None, runtime: str | os.PathLike[str] | None = None
    ) -> Folders:
        """The given folders; for each one that is not given, the one in use now."""
        now = _IN_USE.get()
        return cls(
            now.home if home is None else os.path.abspath(os.fspath(home)),
            now.runtime if runtime is None else os.path.abspath(os.fspath(runtime)),
        )

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """Use these folders in this thread or task while the block runs."""
        before = _IN_USE.set(self)
        try:
            yield
        finally:
            _IN_USE.reset(before)

    def environment(self) -> dict[str, str]:
        """The environment variables that make another process use these folders."""
        found = {"VMM_HOME": self.home, "VMM_RUNTIME": self.runtime}
        return {name: path for name, path in found.items() if path is not None}


_IN_USE: ContextVar[Folders] = ContextVar("vmm_folders", default=Folders())  # noqa: B039 (frozen)


def in_use() -> Folders:
    """The folders in use now."""
    return _IN_USE.get()


class HasFolders(Protocol):
    """An object with folders of its own."""

    folders: Folders


Class = TypeVar("Class", bound=type[HasFolders])


def uses_own_folders(cls: Class) -> Class:
    """Class decorator: every public method runs with `self.folders` in use, so no method can forget it."""
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
