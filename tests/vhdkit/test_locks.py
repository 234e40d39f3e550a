# SPDX-License-Identifier: Apache-2.0
"""File systems without locks: what works, what is reported, what is refused. With locks: `test_store`."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import Any

import pytest

import vhdkit
from vhdkit import locks
from vhdkit.units import MIB

SIZE = 4 * MIB


@pytest.fixture(params=[errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS])
def image(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An image on a file system that answers every request for a lock with this error."""
    path = tmp_path / "d.vhd"
    vhdkit.create_image(path, SIZE)
    with vhdkit.open_disk(path, writable=True) as disk:
        disk.write(0, b"there")
    call = fcntl.fcntl

    def without_locks(fd: int, command: int, argument: Any = 0) -> Any:
        if command in (locks._F_OFD_GETLK, locks._F_OFD_SETLK):
            raise OSError(request.param, os.strerror(request.param))
        return call(fd, command, argument)

    monkeypatch.setattr(fcntl, "fcntl", without_locks)
    return path


def test_reading_works_and_check_warns(image: Path) -> None:
    """A disk and its children are read, checked and copied; `check` warns that other programs are not excluded."""
    with vhdkit.open_disk(image) as disk:
        assert disk.read(0, 5) == b"there"
    child = vhdkit.snapshot(image)
    with vhdkit.open_disk(child) as disk:
        assert disk.read(0, 5) == b"there"
    for path in (image, child):
        said = [one for one in vhdkit.check(path) if one.code == "no-locks"]
        assert said and all(one.severity is vhdkit.Severity.WARNING for one in said)
    vhdkit.convert(child, image.with_name("copy.raw"), vhdkit.DiskFormat.RAW)
    assert image.with_name("copy.raw").read_bytes()[:5] == b"there"


def test_writing_is_refused_without_lock_false(image: Path) -> None:
    """Without locks nothing is written by default; a program that takes responsibility passes `lock=False`."""
    for verb in (
        lambda: vhdkit.open_disk(image, writable=True),
        lambda: vhdkit.resize(image, 2 * SIZE),
        lambda: vhdkit.compact(image),
        lambda: vhdkit.create_image(image, SIZE, replace=True),
    ):
        with pytest.raises(vhdkit.Unprotected, match=r"d\.vhd: its file system has no locks.*lock=False"):
            verb()
    with vhdkit.open_disk(image, writable=True, options=vhdkit.OpenOptions(lock=False)) as disk:
        disk.write(0, b"THERE")
    with vhdkit.open_disk(image) as disk:
        assert disk.read(0, 5) == b"THERE"


def test_no_garbage_is_removed(image: Path) -> None:
    """`gc` cannot know which images are open there, and keeps all."""
    keep = image.with_name("keep.vhd")
    vhdkit.create_image(keep, SIZE)
    items = vhdkit.collect_garbage(image.parent, [keep], delete=True)
    assert [one.path for one in items] == [str(image)] and not items[0].removed and image.exists()
