# SPDX-License-Identifier: Apache-2.0
"""What the type checker accepts and refuses from a library's user: paths, sizes, formats, and one name for several.

This program is never run. If mypy stops refusing a line, it complains about the comment that expects the error.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

import vhdkit


def right(path: Path) -> None:
    """Paths of every kind, sizes as numbers of any library and as text, formats as text."""
    vhdkit.create_image(b"d.vhd", "10M", disk_format="fixed", block_size_bytes=np.int64(1 << 21))
    vhdkit.convert(path, b"d.raw", "raw")
    vhdkit.clone("base.vhd", ["a.avhd", b"b.avhd", path])
    vhdkit.clone("base.vhd", (path,))
    vhdkit.snapshot_many([("a.avhd", None), (b"b.avhd", path)])
    vhdkit.find_children({"a.vhd"}, folders=[path])
    options = vhdkit.OpenOptions(parent_dirs=[path, b"x"], format_name="raw")
    with vhdkit.open_disk(path, options=options) as disk:
        disk.read(np.uint64(0), "4K")


def wrong(path: Path) -> None:
    """One name where several are expected, and values that are not numbers."""
    vhdkit.clone("base.vhd", "name.avhd")  # type: ignore[arg-type]
    vhdkit.clone("base.vhd", b"name.avhd")  # type: ignore[arg-type]
    vhdkit.clone("base.vhd", path)  # type: ignore[arg-type]
    vhdkit.find_children("a.vhd")  # type: ignore[arg-type]
    vhdkit.collect_garbage(".", "leaf.avhd")  # type: ignore[arg-type]
    vhdkit.OpenOptions(parent_dirs="/srv/x")  # type: ignore[arg-type]
    vhdkit.create_image(path, 1.5)  # type: ignore[arg-type]
    vhdkit.open_disk(5)  # type: ignore[arg-type]
