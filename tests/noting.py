# SPDX-License-Identifier: Apache-2.0
"""The process that a test plays: it opens everything with its folder of notes, as `vhdkit serve --remember` does.

The library has no such state: each file that is opened here is given the folder.
"""

from __future__ import annotations

import os
from pathlib import Path

from vhdkit.chain.names.options import OpenOptions
from vhdkit.store import FileStore

_folder: list[str] = []


def use_folder(path: str | None) -> None:
    """From now on the test plays a server with this folder; None: another program."""
    _folder[:] = [] if path is None else [os.path.abspath(path)]


def folder_in_use() -> str | None:
    """The folder of the process that is played now."""
    return _folder[0] if _folder else None


def options() -> OpenOptions:
    """How that process opens images."""
    return OpenOptions(notes_folder=folder_in_use())


def opened_file(path: str | Path, *, writable: bool = False) -> FileStore:
    """How it opens a file; nobody looks for locks here."""
    store = FileStore.open(path, writable=writable)
    store.notes_folder = folder_in_use()
    return store
