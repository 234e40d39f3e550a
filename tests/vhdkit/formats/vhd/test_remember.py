# SPDX-License-Identifier: Apache-2.0
"""A process that is killed loses nothing that its clients were told is written, when its successor has the notes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from vhdkit.chain.check import check
from vhdkit.chain.create import create_child, create_image
from vhdkit.formats.vhd import remember
from vhdkit.formats.vhd.dynamic import DynamicImage, open_dynamic
from vhdkit.image import ExtentKind
from vhdkit.store import FileStore
from vhdkit.units import KIB, MIB, SECTOR_SIZE, whole_sectors

SIZE = 4 * MIB


@pytest.fixture
def notes(tmp_path: Path) -> Iterator[Path]:
    """A folder for notes, used by this process while the test runs."""
    folder = tmp_path / "notes"
    folder.mkdir()
    remember.use_folder(str(folder))
    yield folder
    remember.use_folder(None)


@pytest.fixture(params=["dynamic", "differencing"])
def image(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """An image with small blocks."""
    base, child = tmp_path / "base.vhd", tmp_path / "child.avhd"
    create_image(base, SIZE, block_size_bytes=512 * KIB)
    create_child(child, base)
    return child if request.param == "differencing" else base


def opened(path: Path) -> DynamicImage:
    """The image, open for writing as by a server; nobody looks for locks here."""
    return open_dynamic(FileStore.open(path, writable=True), writable=True)


def content(image: DynamicImage) -> bytes:
    """What the image owns; zeros elsewhere."""
    found = bytearray(SIZE)
    for extent in image.extents(0, whole_sectors(SIZE)):
        if extent.kind is ExtentKind.DATA:
            assert extent.store_offset_bytes is not None
            first, size = extent.sector_index * SECTOR_SIZE, extent.sector_count * SECTOR_SIZE
            found[first : first + size] = image.store.pread(extent.store_offset_bytes, size)
    return bytes(found)


@pytest.mark.parametrize("seed", range(8))
def test_nothing_is_lost(notes: Path, image: Path, seed: int) -> None:
    """Random writes and flushes, killed at random moments, again and again: all that was written is there."""
    rng = random.Random(seed)
    model = bytearray(SIZE)
    for _ in range(5):
        one = opened(image)
        assert content(one) == model
        for _ in range(rng.randrange(40)):
            first, count = rng.randrange(whole_sectors(SIZE) - 300), rng.randrange(1, 300)
            data = rng.randbytes(SECTOR_SIZE) * count
            one.write(first, memoryview(data))
            model[first * SECTOR_SIZE : first * SECTOR_SIZE + len(data)] = data
            if rng.random() < 0.1:
                one.flush()
        one.store.close()  # killed: nothing is flushed
    one = opened(image)
    assert content(one) == model
    one.close()
    assert list(notes.iterdir()) == []
    assert check(image) == []


def test_without_notes_it_would_be_lost(image: Path) -> None:
    """Self-test: the scene of the other test loses data where nobody takes notes."""
    one = opened(image)
    one.write(5, memoryview(b"x" * SECTOR_SIZE))
    one.store.close()
    assert content(opened(image)) == bytes(SIZE)


def test_killed_during_a_flush(notes: Path, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flush that fails leaves the notes of what it was to write, and of what came after it."""
    one = opened(image)
    one.write(5, memoryview(b"x" * SECTOR_SIZE))

    def killed() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(one._commit.guard, "sync", killed)
        with pytest.raises(KeyboardInterrupt):
            one._commit.flush()
    one._commit.guard.failure = None
    one.write(5000, memoryview(b"y" * SECTOR_SIZE))
    one.store.close()
    found = content(opened(image))
    assert found[5 * SECTOR_SIZE] == ord("x") and found[5000 * SECTOR_SIZE] == ord("y")


@pytest.mark.parametrize("spoil", ["boot", "cut", "byte", "other image", "empty", "folder"])
def test_what_is_not_believed(notes: Path, image: Path, tmp_path: Path, spoil: str) -> None:
    """Notes of another boot, of another file, damaged or cut ones: left out, and the image is as its file says."""
    one = opened(image)
    one.write(5, memoryview(b"x" * SECTOR_SIZE))
    one.store.close()
    target = image
    for path in notes.iterdir():
        raw = bytearray(path.read_bytes())
        if spoil == "boot":
            raw[20] ^= 1
        elif spoil == "cut":
            raw = raw[:-1]
        elif spoil == "byte":
            raw[-1] ^= 1
        elif spoil == "empty":
            raw.clear()
        path.write_bytes(raw)
        if spoil == "folder":
            path.unlink()
            path.mkdir()
    if spoil == "other image":
        target = tmp_path / "copy.vhd"
        target.write_bytes(image.read_bytes())
    other = opened(target)
    assert content(other) == bytes(SIZE)
    other.close()
    assert [one.code for one in check(target) if one.code != "leaked-space"] == []


def test_notes_that_contradict_the_image(notes: Path, image: Path) -> None:
    """A note of a block that lies outside the file, or of one there is not, is left out."""
    store = FileStore.open(image, writable=True)
    one = open_dynamic(store, writable=True)
    taken = one._commit._notes
    assert taken is not None
    taken.note(0, 1 << 30, None)
    taken.note(10_000, 4096, None)
    store.close()
    assert content(opened(image)) == bytes(SIZE)


def test_full_folder_does_not_stop_writing(
    notes: Path, image: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where notes cannot be written any more, writing goes on and the server's log says so once."""
    one = opened(image)
    taken = one._commit._notes
    assert taken is not None
    for file in taken._files:
        file.close()
    one.write(5, memoryview(b"x" * SECTOR_SIZE))
    one.write(500, memoryview(b"x" * SECTOR_SIZE))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    one.flush()
    assert content(one)[5 * SECTOR_SIZE] == ord("x")
