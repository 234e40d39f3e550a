# SPDX-License-Identifier: Apache-2.0
"""Notes count whichever call of a flush, or of their own recovery, a process was killed at, and in every version."""

from __future__ import annotations

import contextlib
import os
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import noting
from tests.support import daily_or_nightly
from tests.vhdkit.formats.test_recall import SIZE, write
from tests.vhdkit.formats.test_remember import VHD_ONLY, found_in, image, killed, notes, opened
from vhdkit.formats import probed, remember
from vhdkit.store import FileStore
from vhdkit.units import SECTOR_SIZE

# A killed process closes no file: the images that stand for one are dropped.
pytestmark = pytest.mark.filterwarnings("ignore:.*was never closed:ResourceWarning")

__all__ = ["image", "notes"]


@contextlib.contextmanager
def dying(image: Path, after: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Kill the process at a call that changes the image's file, after so many others; yields how many are left."""
    left = [after]

    def dies(call: Callable[..., None]) -> Callable[..., None]:
        def wrapped(store: FileStore, *arguments: object) -> None:
            left[0] -= store.name == str(image)
            if left[0] < 0:
                raise KeyboardInterrupt
            call(store, *arguments)

        return wrapped

    with monkeypatch.context() as patch:
        for name in ("sync", "pwrite", "truncate"):
            patch.setattr(FileStore, name, dies(getattr(FileStore, name)))
        yield left


def test_killed_at_every_call_of_a_flush(notes: Path, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """INV-ANSWERED-SURVIVES: whichever part of a flush was done when the process was killed, all writes are there."""
    after, left = 0, [-1]
    while left[0] < 0:
        copy, model = image.with_name(f"{after}{image.suffix}"), bytearray(SIZE)
        shutil.copy(image, copy)
        one = opened(copy)
        for first in (5, 2000, 6000, 50):  # the last one sets bits of a block that is there
            write(one, model, first, b"x" * SECTOR_SIZE)
        with dying(copy, after, monkeypatch) as left, contextlib.suppress(KeyboardInterrupt):
            one.flush()
        killed(one)
        assert found_in(copy) == model
        after += 1
    assert after > 3


CALLS = {"dynamic": 6, "differencing": 6, "vhdx": 15, "vhdx child": 18}  # of the file, to write its notes
STEPS = [
    (kind, after)
    for kind, count in CALLS.items()
    for after in range(0, count, 1 if "vhdx" not in kind else daily_or_nightly(3, 1))
]


@pytest.mark.parametrize(("image", "after"), STEPS, indirect=["image"])
def test_killed_while_notes_are_written(notes: Path, image: Path, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """INV-ANSWERED-SURVIVES: a process may also be killed while it writes the notes to the image."""
    one, model = opened(image), bytearray(SIZE)
    for first in (5, 2000, 6000):
        write(one, model, first, b"x" * SECTOR_SIZE)
    killed(one)
    with (
        dying(image, after, monkeypatch),
        pytest.raises(KeyboardInterrupt),
        noting.opened_file(image, writable=True) as store,
    ):
        probed(store).open(store, writable=True)
    assert found_in(image) == model


def as_then(notes: bytes) -> bytes:
    """Notes of a VHD with the size of the file and the length of the bitmap after the fields."""
    found, position = b"", 0
    while position < len(notes):
        _, size, length = remember.NOTE.unpack_from(notes, position)
        position += remember.NOTE.size
        body = notes[position : position + length]
        position += length
        framed = body[:28] + struct.pack(">QI", size, length - 28) + body[28:]
        found += struct.pack(">I", zlib.crc32(framed)) + framed
    return found


@VHD_ONLY
@pytest.mark.parametrize("version", [2, 3])
def test_notes_of_earlier_versions(notes: Path, image: Path, version: int) -> None:
    """Notes of vhdkit 0.1.0, without label and witness, and of those after it, are read as they were written."""
    one = opened(image)
    write(one, bytearray(SIZE), 5, b"x" * SECTOR_SIZE)
    killed(one)
    header = struct.Struct(">8sQ36s16sQQ")
    for path in list(notes.iterdir()):
        raw = path.read_bytes()
        if path.suffix == ".time":
            if version == 2:
                path.unlink()
        else:
            first = header.size if version == 2 else remember.HEADER.size
            path.write_bytes(b"vhdkeep%d" % version + raw[8:first] + as_then(raw[remember.HEADER.size :]))
    if version == 2:
        os.removexattr(image, "user.vhdkit.notes")
    assert found_in(image)[5 * SECTOR_SIZE] == ord("x")
