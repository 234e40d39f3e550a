# SPDX-License-Identifier: Apache-2.0
"""The process that a test imitates: it opens everything with its folder of notes, like `vhdkit serve --remember`.

The library itself has no such state: each file that is opened here is given the folder.
"""

from __future__ import annotations

import os
from pathlib import Path

from vhdkit.chain.names.marks import mark_child
from vhdkit.chain.names.options import OpenOptions
from vhdkit.chain.verbs.create import write_child
from vhdkit.formats import probed
from vhdkit.store import FileStore
from vhdkit.units import SECTOR_SIZE

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


def foreign_child(path: Path, *, first_sector: int | None = None, folder: Path | None = None) -> Path:
    """A child that another program makes of the image, whatever a server has noted; it may write a sector to it."""
    suffix = path.suffix if path.suffix.startswith(".a") else f".a{path.suffix[1:]}"
    child = (folder or path.parent) / f"foreign{suffix}"
    child.touch()
    with FileStore.open(path) as store, FileStore.open(child, writable=True) as made:
        parent = probed(store).open(store)
        write_child(made, str(child), parent, parent.size_bytes)
        if folder is not None:
            mark_child(str(child), made, str(path))
        if first_sector is not None:
            layer = probed(made).open(made, writable=True)
            layer.write(first_sector, memoryview(b"c" * SECTOR_SIZE))
            layer.seal()
    return child
