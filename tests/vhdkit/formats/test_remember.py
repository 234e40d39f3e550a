# SPDX-License-Identifier: Apache-2.0
"""A killed process loses no write that its clients were promised, if its successor has the notes."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import noting
from vhdkit.chain.names.options import OpenOptions
from vhdkit.chain.verbs.check import check
from vhdkit.chain.verbs.compact import compact
from vhdkit.chain.verbs.create import create_child, create_image
from vhdkit.chain.verbs.repair import repair
from vhdkit.disk import open_disk
from vhdkit.formats import probed, remember
from vhdkit.formats.vhd.dynamic import DynamicImage
from vhdkit.formats.vhd.recall import note_of
from vhdkit.formats.vhdx.blocks import VhdxImage
from vhdkit.image import ExtentKind
from vhdkit.units import KIB, MIB, SECTOR_SIZE, whole_sectors

# A killed process closes no file: the images that stand for one are dropped.
pytestmark = pytest.mark.filterwarnings("ignore:.*was never closed:ResourceWarning")

SIZE = 4 * MIB
Image = DynamicImage | VhdxImage
# format, block size, whether the image has a parent
KINDS = {
    "dynamic": ("vhd", 512 * KIB, False),
    "differencing": ("vhd", 512 * KIB, True),
    "vhdx": ("vhdx", MIB, False),
    "vhdx child": ("vhdx", MIB, True),
}
HARMLESS = ("leaked-space", "space-unused")  # left by what a killed process was adding
VHD_ONLY = pytest.mark.parametrize("image", ["dynamic", "differencing"], indirect=True)


@pytest.fixture
def notes(tmp_path: Path) -> Iterator[Path]:
    """A folder for notes, used by this process during the test."""
    folder = tmp_path / "notes"
    folder.mkdir()
    noting.use_folder(str(folder))
    yield folder
    noting.use_folder(None)


@pytest.fixture(params=KINDS)
def image(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """An image with small blocks."""
    suffix, block_size, has_parent = KINDS[request.param]
    base, child = tmp_path / f"base.{suffix}", tmp_path / f"child.a{suffix}"
    disk_format = "vhdx" if suffix == "vhdx" else "dynamic"
    create_image(base, SIZE, disk_format=disk_format, block_size_bytes=block_size)
    if not has_parent:
        return base
    create_child(child, base)
    return child


def opened(path: Path) -> Image:
    """The image, open for writing as in a server, without locks."""
    store = noting.opened_file(path, writable=True)
    layer = probed(store).open(store, writable=True)
    assert isinstance(layer, DynamicImage | VhdxImage)
    return layer


def commit_of(image: Image) -> Any:
    """What the image must still write."""
    assert image._commit is not None
    return image._commit


def notes_of(image: Image) -> remember.Notes:
    """The notes that are taken of an image."""
    notes = commit_of(image)._notes
    assert isinstance(notes, remember.Notes)
    return notes


def killed(image: Image) -> None:
    """What the kernel does to the files of a killed process: nothing is flushed."""
    if image._commit is not None and image._commit._notes is not None:
        image._commit._notes.leave()
    image.store.close()


def found_in(path: Path) -> bytes:
    """What a program reads that opens the image for writing."""
    image = opened(path)
    try:
        return content(image)
    finally:
        killed(image)


def content(image: Image) -> bytes:
    """What the image owns; zeros elsewhere."""
    found = bytearray(SIZE)
    for extent in image.extents(0, whole_sectors(SIZE)):
        if extent.kind is ExtentKind.DATA:
            assert extent.store_offset_bytes is not None
            first, size = extent.sector_index * SECTOR_SIZE, extent.sector_count * SECTOR_SIZE
            found[first : first + size] = image.store.pread(extent.store_offset_bytes, size)
    return bytes(found)


@pytest.mark.parametrize("seed", range(8))
def test_no_answered_write_is_lost(notes: Path, image: Path, seed: int) -> None:
    """INV-ANSWERED-SURVIVES: random writes and flushes, killed at random moments, repeatedly: all data is kept."""
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
        killed(one)
    one = opened(image)
    assert content(one) == model
    one.close()
    assert list(notes.iterdir()) == []
    assert check(image) == []


def test_without_notes_data_would_be_lost(image: Path) -> None:
    """Self-test: without notes the scene of the test above loses data."""
    one = opened(image)
    one.write(5, memoryview(b"x" * SECTOR_SIZE))
    killed(one)
    assert found_in(image) == bytes(SIZE)


def test_killed_during_a_flush(notes: Path, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failing flush keeps the notes of what it was to write and of what came after it."""
    one = opened(image)
    one.write(5, memoryview(b"x" * SECTOR_SIZE))

    def struck() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(commit_of(one).guard, "sync", struck)
        with pytest.raises(KeyboardInterrupt):
            one.flush()
    commit_of(one).guard.failure = None
    one.write(5000, memoryview(b"y" * SECTOR_SIZE))
    killed(one)
    found = found_in(image)
    assert found[5 * SECTOR_SIZE] == ord("x") and found[5000 * SECTOR_SIZE] == ord("y")


@pytest.mark.parametrize("spoil", ["boot", "cut", "byte", "other image", "empty", "folder"])
def test_unusable_notes_are_left_out(notes: Path, image: Path, tmp_path: Path, spoil: str) -> None:
    """Notes of another boot, of another file, damaged or cut ones are left out; the image is as its file says."""
    one = opened(image)
    one.write(5, memoryview(b"x" * SECTOR_SIZE))
    killed(one)
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
    assert [one.code for one in check(target) if one.code not in (*HARMLESS, "notes-left-out")] == []


@VHD_ONLY
@pytest.mark.parametrize("body", [note_of(0, 1 << 30, -1, MIB, b""), note_of(10_000, 4096, -1, MIB, b""), b"short"])
def test_notes_that_contradict_the_image(notes: Path, image: Path, body: bytes) -> None:
    """A note of a block outside the file, of one that does not exist, or without all its fields, is left out."""
    one = opened(image)
    notes_of(one).note(body)
    killed(one)
    assert found_in(image) == bytes(SIZE)


def test_full_folder_does_not_stop_writing(
    notes: Path, image: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """If notes can no longer be written, writing continues and the server's log says so once."""
    one = opened(image)
    taken = notes_of(one)
    one.write(50, memoryview(b"x" * SECTOR_SIZE))
    for file in taken._files:
        file.close()
    one.write(1500, memoryview(b"x" * SECTOR_SIZE))
    one.write(2500, memoryview(b"x" * SECTOR_SIZE))
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_full_folder_does_not_stop_a_flush(notes: Path, image: Path, caplog: pytest.LogCaptureFixture) -> None:
    """If notes fail when a flush begins or ends, the flush is complete; later changes are noted again."""
    one = opened(image)
    taken = notes_of(one)
    one.write(5, memoryview(b"x" * SECTOR_SIZE))
    for file in taken._files:
        file.close()
    one.flush()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    one.write(1500, memoryview(b"y" * SECTOR_SIZE))
    killed(one)
    found = found_in(image)
    assert found[5 * SECTOR_SIZE] == ord("x") and found[1500 * SECTOR_SIZE] == ord("y")


def test_small_writes_do_not_fill_the_folder(notes: Path, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without flushes by the client, the notes flush before they become too long."""
    monkeypatch.setattr(remember, "FLUSH_NOTES_BYTES", 8 * KIB)
    one = opened(image)
    lengths = {path.name: 0 for path in notes.iterdir()}
    for sector in range(0, 2000, 2):
        one.write(sector, memoryview(b"x" * SECTOR_SIZE))
        lengths |= {path.name: path.stat().st_size for path in notes.iterdir()}
        assert all(length < 10 * KIB for length in lengths.values())
    assert lengths
    one.close()


def test_sealed_images_hold_nothing(notes: Path, image: Path) -> None:
    """After a flush there are no files or descriptors of notes: a leaf becomes a parent without being closed."""
    one = opened(image)
    before = os.listdir("/proc/self/fd")
    for block in range(3):
        one.write(block * 2048, memoryview(b"x" * SECTOR_SIZE))
        assert len(list(notes.iterdir())) == 3  # two files that alternate, and their witness
        one.seal()
        assert list(notes.iterdir()) == [] and os.listdir("/proc/self/fd") == before
    one.close()


# -- another program wrote to the image meanwhile --------------------------------------------------------------------


def writes(offset_bytes: int) -> Callable[[Path], object]:
    """What another program does once the notes are given up: write a sector."""

    def change(path: Path) -> None:
        with open_disk(path, writable=True, options=noting.options()) as disk:
            disk.write(offset_bytes, b"z" * SECTOR_SIZE)

    return change


def left_aside(notes: Path) -> bool:
    """Whether the notes were kept aside, where no program reads them again."""
    return [path.suffix[:6] for path in notes.iterdir()] == [".kept-"] * 3


CHANGES: dict[str, Callable[[Path], object]] = {
    "the noted block": writes(MIB + 6 * SECTOR_SIZE),
    "another block": writes(3 * MIB),
    "a bit": writes(2 * MIB + 9 * SECTOR_SIZE),
    "compact": compact,
}


@pytest.mark.parametrize("change", CHANGES)
def test_notes_are_left_out_after_a_foreign_change(
    notes: Path, image: Path, change: str, caplog: pytest.LogCaptureFixture
) -> None:
    """INV-ANSWERED-SURVIVES: what was noted before is left out for good and kept aside, with a warning; the image is
    as that program left it."""
    one = opened(image)
    one.write(0, memoryview(bytes(SECTOR_SIZE)))
    one.write(whole_sectors(2 * MIB), memoryview(b"a" * SECTOR_SIZE))
    one.close()
    one = opened(image)
    one.write(whole_sectors(2 * MIB) + 5, memoryview(b"x" * SECTOR_SIZE))
    one.write(whole_sectors(MIB) + 5, memoryview(b"x" * SECTOR_SIZE))
    killed(one)
    noting.use_folder(None)
    repair(image, accept_data_loss=True)
    CHANGES[change](image)
    changed = opened(image)
    left = content(changed)
    killed(changed)
    noting.use_folder(str(notes))
    again = opened(image)
    assert content(again) == left
    assert len([record for record in caplog.records if "left out" in record.message]) == 1
    assert left_aside(notes)
    again.close()
    assert [one.code for one in check(image) if one.code not in HARMLESS] == ["notes-left-out"]


@VHD_ONLY
def test_another_block_in_the_place_of_a_noted_one(notes: Path, image: Path, caplog: pytest.LogCaptureFixture) -> None:
    """If another program reused the noted block's place, the notes are left out and the image opens."""
    one = opened(image)
    one.write(5, memoryview(b"x" * SECTOR_SIZE))
    assert isinstance(one, DynamicImage)
    start, entry = one.bat.block_start(0), one.bat.table_offset_bytes + 4
    one.store.pwrite(entry, (start // SECTOR_SIZE).to_bytes(4, "big"))
    killed(one)
    again = opened(image)
    assert isinstance(again, DynamicImage)
    assert again.bat.block_start(0) < 0 and again.bat.block_start(1) == start
    assert any("left out" in record.message for record in caplog.records) and left_aside(notes)
    again.close()


def test_each_image_has_its_own_folder(tmp_path: Path) -> None:
    """The folder of notes is an option of each open: two folders in one process, and an image without one."""
    folders = [tmp_path / "one", tmp_path / "two", None]
    disks = []
    for number, folder in enumerate(folders):
        path = tmp_path / f"{number}.vhd"
        create_image(path, SIZE)
        if folder is not None:
            folder.mkdir()
        disks.append(open_disk(path, writable=True, options=OpenOptions(notes_folder=folder)))
        disks[-1].write(5 * SECTOR_SIZE, b"x" * SECTOR_SIZE)
    assert [len(list(folder.iterdir())) for folder in folders if folder is not None] == [3, 3]
    for disk in disks:
        assert isinstance(disk.chain.leaf, DynamicImage)
        killed(disk.chain.leaf)
    found = []
    for number, folder in enumerate(folders):
        with open_disk(tmp_path / f"{number}.vhd", options=OpenOptions(notes_folder=folder)) as disk:
            found.append(disk.read(5 * SECTOR_SIZE, 1))
    assert found == [b"x", b"x", b"\0"]
    assert not any(list(folder.iterdir()) for folder in folders if folder is not None)
