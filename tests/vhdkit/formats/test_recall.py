# SPDX-License-Identifier: Apache-2.0
"""Notes are applied to exactly the state in which they were taken, and to no other."""

from __future__ import annotations

import contextlib
import os
import random
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import noting
from tests.support import daily_or_nightly
from tests.vhdkit.formats.test_remember import (
    HARMLESS,
    KINDS,
    VHD_ONLY,
    Image,
    content,
    found_in,
    image,
    killed,
    notes,
    opened,
)
from vhdkit.chain.verbs.check import check
from vhdkit.chain.verbs.live import freezing
from vhdkit.chain.verbs.repair import repair
from vhdkit.disk import open_disk
from vhdkit.errors import ImageInUse, NotesUnwritten
from vhdkit.formats import probed, remember
from vhdkit.formats.vhd.dynamic import DynamicImage
from vhdkit.formats.vhdx.blocks import VhdxImage
from vhdkit.store import FileStore
from vhdkit.units import KIB, MIB, SECTOR_SIZE, whole_sectors

# A killed process closes no file: the images that stand for one are dropped.
pytestmark = pytest.mark.filterwarnings("ignore:.*was never closed:ResourceWarning")

__all__ = ["image", "notes"]
SIZE = 4 * MIB
SECTORS = whole_sectors(SIZE)
Meanwhile = Callable[[Path, bytes, os.stat_result], object]


@contextlib.contextmanager
def without_notes() -> Iterator[None]:
    """As in another process, which has no folder of notes."""
    folder = noting.folder_in_use()
    noting.use_folder(None)
    yield
    noting.use_folder(folder)


def write(one: Image, model: bytearray, first: int, data: bytes) -> None:
    """Write sectors to the image and to the model."""
    one.write(first, memoryview(data))
    model[first * SECTOR_SIZE : first * SECTOR_SIZE + len(data)] = data


def write_randomly(one: Image, model: bytearray, rng: random.Random, count: int) -> None:
    """Writes and a few flushes in the first half of the disk."""
    for _ in range(count):
        first, size = rng.randrange(SECTORS // 2 - 300), rng.randrange(1, 300)
        write(one, model, first, rng.randbytes(SECTOR_SIZE) * size)
        if rng.random() < 0.2:
            one.flush()


def after_a_tick(path: Path) -> None:
    """Wait until the file system gives a later time than the image has: the clock of old kernels ticks slowly."""
    probe, end = path.with_suffix(".probe"), time.monotonic() + 10
    while time.monotonic() < end:
        probe.write_bytes(b"x")
        if probe.stat().st_mtime_ns > path.stat().st_mtime_ns:
            break
    probe.unlink()


def copied_over(path: Path, backup: bytes, status: os.stat_result) -> None:
    """`cp backup image`: the file stays, its content is replaced."""
    after_a_tick(path)
    path.write_bytes(backup)


def copied_over_with_times(path: Path, backup: bytes, status: os.stat_result) -> None:
    """`cp -p`, `rsync -t --inplace`: the time is the backup's."""
    path.write_bytes(backup)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def updated_in_place(path: Path, backup: bytes, status: os.stat_result) -> None:
    """`rsync --inplace`: differing parts are written, the rest is cut off."""
    after_a_tick(path)
    old = path.read_bytes()
    with path.open("r+b") as file:
        for offset in range(0, len(backup), 4 * KIB):
            if backup[offset : offset + 4 * KIB] != old[offset : offset + 4 * KIB]:
                file.seek(offset)
                file.write(backup[offset : offset + 4 * KIB])
        file.truncate(len(backup))


def cut_and_back(path: Path, backup: bytes, status: os.stat_result) -> None:
    """The last sector is cut off and written again."""
    after_a_tick(path)
    raw = path.read_bytes()
    with path.open("r+b") as file:
        file.truncate(len(raw) - SECTOR_SIZE)
        file.seek(0, os.SEEK_END)
        file.write(raw[-SECTOR_SIZE:])


def opened_for_writing(path: Path, backup: bytes, status: os.stat_result) -> None:
    """A session of vhdkit that writes nothing, once the notes are given up."""
    repair(path, accept_data_loss=True)
    open_disk(path, writable=True, options=noting.options()).close()


def written_by_us(path: Path, backup: bytes, status: os.stat_result) -> None:
    """A session of vhdkit that writes at once, over owned and other sectors, once the notes are given up."""
    repair(path, accept_data_loss=True)
    with open_disk(path, writable=True, options=noting.options()) as disk:
        disk.write(0, b"z" * SECTOR_SIZE)
        disk.write(3 * MIB, b"z" * MIB)


def repaired(path: Path, backup: bytes, status: os.stat_result) -> None:
    """A repair that gives the notes up, even if none is needed."""
    repair(path, accept_data_loss=True)


CHANGES = (
    copied_over, copied_over_with_times, updated_in_place, cut_and_back, opened_for_writing, written_by_us, repaired,
)  # fmt: skip


def left_alone(path: Path, backup: bytes, status: os.stat_result) -> None:
    """Nothing happens."""


def touched(path: Path, backup: bytes, status: os.stat_result) -> None:
    """Other permissions, another name, other readers: the content is unchanged."""
    path.chmod(0o640)
    os.link(path, path.with_suffix(".second"))
    check(path)
    open_disk(path, options=noting.options()).close()


def cases() -> Iterator[Any]:
    """(kind of image, what happens, seed)."""
    for kind in KINDS:
        is_vhdx = "vhdx" in kind
        for meanwhile in (*CHANGES, left_alone, touched):
            for seed in range(daily_or_nightly(1, 3) if is_vhdx else 3):
                yield pytest.param(kind, meanwhile, seed, id=f"{kind}-{meanwhile.__name__}-{seed}")


@pytest.mark.parametrize(("image", "meanwhile", "seed"), list(cases()), indirect=["image"])
def test_notes_are_applied_exactly_or_left_out(
    notes: Path, image: Path, meanwhile: Meanwhile, seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    """INV-ANSWERED-SURVIVES: random writes, a backup at some point, a kill, then something happens to the file: all
    answered writes are there or, if the file was changed, it reads as the change left it, with a warning."""
    rng = random.Random(seed)
    model = bytearray(SIZE)
    one = opened(image)
    write_randomly(one, model, rng, rng.randrange(8))
    one.flush()
    backup, status = image.read_bytes(), image.stat()
    write_randomly(one, model, rng, rng.randrange(8))
    write(one, model, SECTORS // 2, b"n" * SECTOR_SIZE)  # a new block
    if seed % 2:
        write(one, model, SECTORS // 2, b"m" * SECTOR_SIZE)  # over what has been noted
    killed(one)
    with without_notes():
        meanwhile(image, backup, status)
        file = noting.opened_file(image)
        left = probed(file).open(file)
        assert isinstance(left, DynamicImage | VhdxImage)
        expected = content(left) if meanwhile in CHANGES else bytes(model)
        killed(left)
    again = opened(image)
    assert content(again) == expected
    again.close()
    findings = [one for one in check(image) if one.code == "notes-left-out"]
    if meanwhile not in CHANGES:
        assert list(notes.iterdir()) == [] and not findings
        return
    assert [path.suffix[:6] for path in notes.iterdir()] == [".kept-"] * 3
    assert len(findings) == 1 and ".kept-" in findings[0].message
    assert any("left out" in record.message for record in caplog.records)
    with without_notes():
        repair(image)
    assert not [one for one in check(image) if one.code == "notes-left-out"]


def test_check_reports_unwritten_notes(notes: Path, image: Path, caplog: pytest.LogCaptureFixture) -> None:
    """While notes wait for their server `check` names their folder; so does what refuses to write without them."""
    one = opened(image)
    write(one, bytearray(SIZE), 5, b"x" * SECTOR_SIZE)
    killed(one)
    with without_notes():
        [finding] = [one for one in check(image) if one.code == "notes-unwritten"]
        assert str(notes) in finding.message and "--remember" in finding.message
        with pytest.raises(NotesUnwritten, match=str(notes)):
            open_disk(image, writable=True, options=noting.options())
        assert [one.code for one in check(image) if one.code.startswith("notes")] == ["notes-unwritten"]
    assert not caplog.records


def test_a_repair_writes_the_notes_of_its_folder_first(notes: Path, image: Path) -> None:
    """INV-ANSWERED-SURVIVES: a repair that is given the folder of notes first writes them to the image."""
    one, model = opened(image), bytearray(SIZE)
    for first in (5, 2000, 6000):
        write(one, model, first, b"x" * SECTOR_SIZE)
    killed(one)
    for dry_run in (True, False):
        with without_notes(), pytest.raises(NotesUnwritten):
            repair(image, options=noting.options(), dry_run=dry_run)
    repair(image, options=noting.options(), dry_run=True)
    assert list(notes.iterdir())
    repair(image, options=noting.options())
    assert list(notes.iterdir()) == []
    with without_notes(), open_disk(image) as disk:
        assert disk.read(0, SIZE) == model


@VHD_ONLY
def test_a_repair_of_an_unwritable_image_keeps_the_notes(notes: Path, image: Path) -> None:
    """An image that cannot be opened for writing is repaired without its notes, which stay in their folder."""
    one, model = opened(image), bytearray(SIZE)
    write(one, model, 5, b"x" * SECTOR_SIZE)
    write(one, model, 6000, b"x" * SECTOR_SIZE)
    one.flush()
    write(one, model, 5, b"y" * SECTOR_SIZE)
    write(one, model, 4200, b"y" * SECTOR_SIZE)
    killed(one)
    before = sorted(path.name for path in notes.iterdir())
    assert isinstance(one, DynamicImage)
    table = one.metadata.header.table_offset if one.metadata.header is not None else 0
    with image.open("r+b") as file:  # two overlapping blocks
        file.seek(table)
        entry = file.read(4)
        file.seek(table + 4)
        file.write(entry)
    assert before
    done = repair(image, options=noting.options())
    assert done.fixes and [path.name.partition(".kept-")[0] for path in sorted(notes.iterdir())] == before


@pytest.mark.parametrize("moment", ["prepared", "frozen"])
@pytest.mark.parametrize("writable", [True, False])
def test_killed_while_a_leaf_gets_a_child(notes: Path, image: Path, moment: str, writable: bool) -> None:
    """INV-ANSWERED-SURVIVES: if the server dies after the leaf became a parent and before it was flushed, its notes
    are written to it before the chain is read, and then removed."""
    disk, model = open_disk(image, writable=True, options=noting.options()), bytearray(SIZE)
    with (
        pytest.raises(KeyboardInterrupt),
        freezing([(disk.chain, str(image.with_name(f"new{image.suffix}")))]) as prepared,
    ):
        for first in (5, 2000, 6000):
            disk.write(first * SECTOR_SIZE, b"x" * SECTOR_SIZE)
            model[first * SECTOR_SIZE : (first + 1) * SECTOR_SIZE] = b"x" * SECTOR_SIZE
        if moment == "frozen":
            [chain] = prepared.freeze()
            chain.write(7000, memoryview(b"y" * SECTOR_SIZE))
            model[7000 * SECTOR_SIZE : 7001 * SECTOR_SIZE] = b"y" * SECTOR_SIZE
        prepared.is_kept = True  # killed: nothing is undone
        raise KeyboardInterrupt
    for layer in (*disk.chain.layers, *prepared.children):
        if isinstance(layer, DynamicImage | VhdxImage):
            killed(layer)
    with open_disk(image.with_name(f"new{image.suffix}"), writable=writable, options=noting.options()) as again:
        assert again.read(0, SIZE) == model
    assert list(notes.iterdir()) == []
    with without_notes(), open_disk(image.with_name(f"new{image.suffix}"), options=noting.options()) as other:
        assert other.read(0, SIZE) == model
    assert [one.code for one in check(image) if one.code not in HARMLESS] == []


def test_image_with_notes_is_in_use(notes: Path, image: Path) -> None:
    """If another program reads a layer with notes, they cannot be written: the chain is not opened without them."""
    one = opened(image)
    write(one, bytearray(SIZE), 5, b"x" * SECTOR_SIZE)
    killed(one)
    with without_notes():
        child = noting.foreign_child(image)
        with open_disk(image, options=noting.options()), pytest.raises(ImageInUse):
            noting.use_folder(str(notes))
            open_disk(child, writable=True, options=noting.options())
    noting.use_folder(str(notes))
    with open_disk(child, writable=True, options=noting.options()) as disk:
        assert disk.read(5 * SECTOR_SIZE, SECTOR_SIZE) == b"x" * SECTOR_SIZE


@pytest.mark.parametrize(
    ("begun", "later", "believed"),
    [(True, 1_000_000, True), (True, -1, False), (True, 1 << 40, False), (False, 1, False), (False, 0, True)],
    ids=["in the middle", "an older file", "long after", "a little after", "at rest"],
)
def test_died_in_the_middle_of_a_change(notes: Path, image: Path, begun: bool, later: int, believed: bool) -> None:
    """The last change of a process that died in it has no noted file time: a time shortly after its beginning is
    accepted; without such a change only the noted time is."""
    one = opened(image)
    write(one, bytearray(SIZE), 5, b"x" * SECTOR_SIZE)
    killed(one)
    [witness] = notes.glob("*.time")
    words = list(struct.unpack("=6Q", witness.read_bytes()))
    words[0] = words[2] + 1000 if begun else 0
    witness.write_bytes(struct.pack("=6Q", *words))
    os.utime(image, ns=(words[1], words[1] + later))
    assert (found_in(image)[5 * SECTOR_SIZE] == ord("x")) == believed


@pytest.mark.parametrize("spoil", ["gone", "cut", "empty"])
def test_notes_without_a_valid_witness_are_left_out(notes: Path, image: Path, spoil: str) -> None:
    """Notes whose witness is missing or damaged belong to an unknown state."""
    one = opened(image)
    write(one, bytearray(SIZE), 5, b"x" * SECTOR_SIZE)
    killed(one)
    [witness] = notes.glob("*.time")
    if spoil == "gone":
        witness.unlink()
    else:
        witness.write_bytes(witness.read_bytes()[:-1] if spoil == "cut" else b"")
    assert found_in(image) == bytes(SIZE)


@pytest.mark.parametrize(
    "value", [b"", b"\xff\xfe", b"zz top", b"\0" * 2000, b"x " + remember.boot_id() + b" ours\n" * 300]
)
def test_a_foreign_label_makes_the_notes_invalid(notes: Path, image: Path, value: bytes) -> None:
    """Any user can write a label: notes with a foreign one are left out, and the message about it is bounded."""
    one = opened(image)
    write(one, bytearray(SIZE), 5, b"x" * SECTOR_SIZE)
    killed(one)
    os.setxattr(image, "user.vhdkit.notes", value)
    with without_notes():
        findings = [one for one in check(image) if one.code == "notes-unwritten"]
        assert len(findings) == (b"ours" in value)
        assert all(len(one.message) < 4000 and one.message.isprintable() for one in findings)
        if findings:  # the folder that it names is cut off, so it may hold notes
            with pytest.raises(NotesUnwritten):
                open_disk(image, writable=True)
            repair(image, accept_data_loss=True)
    assert found_in(image) == bytes(SIZE)


def test_without_labels_the_witness_decides(notes: Path, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the file system has no labels, all answered writes are there, and a later write is noticed."""
    monkeypatch.setattr(FileStore, "set_label", lambda store, name, value: False)
    one = opened(image)
    write(one, bytearray(SIZE), 5, b"x" * SECTOR_SIZE)
    killed(one)
    again = opened(image)
    assert content(again)[5 * SECTOR_SIZE] == ord("x")
    write(again, bytearray(SIZE), 6000, b"y" * SECTOR_SIZE)
    killed(again)
    after_a_tick(image)
    with without_notes(), open_disk(image, writable=True, options=noting.options()) as disk:
        disk.write(5 * SECTOR_SIZE, b"z" * SECTOR_SIZE)
    assert found_in(image)[6000 * SECTOR_SIZE] == 0
