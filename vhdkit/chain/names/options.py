# SPDX-License-Identifier: Apache-2.0
"""What a caller can specify about opening a chain.

Decides which options there are and what their defaults mean; acting on them is left to `parents`,
`children` and `opening`.

`INV-OPTIONS-CHECKED`: an invalid option is refused when it is given.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vhdkit import arguments
from vhdkit.arguments import AnyPath, Several
from vhdkit.formats.probe import FormatName
from vhdkit.uncached import CacheMode


@dataclass(frozen=True, slots=True)
class OpenOptions:
    """Options for opening a chain.

    `parent_dirs` are further folders in which parents may lie. `allow_raw_parent` accepts a raw base under a child
    that records no id. `ignore_bitmaps` reads a dynamic disk's sectors under clear bits as data. `format_name` is
    the leaf's format, which is then not detected. `lock` False opens without locking the files: for `info` and
    `chain`, and for writing on a file system without locks, in a program that excludes others by itself.
    `known_images` are paths of images, in any folder, that may be children of the opened one: if one of them is, the
    opened one is not opened for writing, merged, resized, moved or replaced.
    `notes_folder`, in memory (tmpfs), receives notes of changes that an open image holds only in memory until its next
    flush: the successor of a killed process opens the image with the same folder and loses nothing that was written.
    If a note cannot be written, that is logged.
    `cache`: "none" keeps little of the images, and of the parents that no other program holds, in the page cache: for
    a guest, which caches its disk itself. What a flush promises is the same.

    Raises InvalidArgument for values of another type, a single path where several are expected, and an empty one.
    `format_name` may be a plain string such as "raw" or "vhd", and so may `cache`.
    """

    parent_dirs: tuple[str, ...] = ()
    allow_raw_parent: bool = False
    ignore_bitmaps: bool = False
    format_name: FormatName | None = None
    lock: bool = True
    known_images: tuple[str, ...] = ()
    notes_folder: str | None = None
    cache: CacheMode = CacheMode.WRITEBACK

    if TYPE_CHECKING:  # the constructor accepts more types than the fields have

        def __init__(
            self,
            parent_dirs: Several[AnyPath] = (),
            allow_raw_parent: bool = False,
            ignore_bitmaps: bool = False,
            format_name: FormatName | str | None = None,
            lock: bool = True,
            known_images: Several[AnyPath] = (),
            notes_folder: AnyPath | None = None,
            cache: CacheMode | str = CacheMode.WRITEBACK,
        ) -> None: ...

    def __post_init__(self) -> None:
        for name in ("parent_dirs", "known_images"):
            object.__setattr__(self, name, arguments.paths(name, getattr(self, name)))
        for name in ("allow_raw_parent", "ignore_bitmaps", "lock"):
            arguments.flag(name, getattr(self, name))
        if self.format_name is not None:
            object.__setattr__(self, "format_name", arguments.choice(FormatName, "format_name", self.format_name))
        object.__setattr__(self, "cache", arguments.choice(CacheMode, "cache", self.cache))
        if self.notes_folder is not None:
            folder = os.path.abspath(arguments.path("notes_folder", self.notes_folder))
            object.__setattr__(self, "notes_folder", folder)
