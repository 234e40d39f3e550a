# SPDX-License-Identifier: Apache-2.0
"""The process that a test imitates: it opens everything with its folder of notes, like `vhdkit serve --remember`.

The library itself has no such state: each file that is opened here is given the folder.
"""

from __future__ import annotations

import os
from pathlib import Path

from vhdkit.chain.names.options import OpenOptions
from vhdkit.store import FileStore

_folder: list[str] = []


def use_folder(path: str | None) -> None:
    """From now on the test imitates a server with this folder; None: another program."""
    _folder[:] = [] if path is None else [os.path.abspath(path)]


def folder_in_use() -> str | None:
    """The folder of the process that is imitated now."""
    return _folder[0] if _folder else None


def options() -> OpenOptions:
    """How that process opens images."""
    return OpenOptions(notes_folder=folder_in_use())


def opened_file(path: str | Path, *, writable: bool = False) -> FileStore:
    """How it opens a file; no locks are taken here."""
    store = FileStore.open(path, writable=writable)
    store.notes_folder = folder_in_use()
    return store
