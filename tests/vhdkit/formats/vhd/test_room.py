# SPDX-License-Identifier: Apache-2.0
"""A dynamic VHD on a block device: blocks go before the footer at its end."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import vhdkit
from tests.harness.model import SectorModel
from tests.harness.power import BLOCK_SIZE, PowerRun, Scene, child_scene, dynamic_scene
from tests.harness.vhd_builder import pattern
from tests.vmm.kvm.loops import loop_device
from vhdkit import errors
from vhdkit.disk import Disk
from vhdkit.formats.vhd import mend, opening
from vhdkit.store import Store
from vhdkit.units import KIB, MIB, PAGE_SIZE

SIZE, BLOCK, DEVICE = 8 * MIB, 512 * KIB, 6 * MIB


def on_device(path: Path, device: str, *, footer_at_end: bool) -> None:
    """Copy an image of one block to a device full of an earlier owner's bytes, with its footer moved or not."""
    vhdkit.create_image(path, SIZE, block_size_bytes=BLOCK)
    with vhdkit.open_disk(path, writable=True) as disk:
        disk.write(0, b"first")
    raw = path.read_bytes()
    with open(device, "r+b") as file:
        file.write(b"\xaa" * DEVICE)
        file.seek(0)
        file.write(raw[:-512] if footer_at_end else raw)
        if footer_at_end:
            file.seek(DEVICE - 512)
            file.write(raw[-512:])
        file.flush()
        os.fsync(file.fileno())


@pytest.mark.parametrize("footer_at_end", [True, False], ids=["footer at the end", "copied file"])
def test_a_vhd_on_a_device_takes_writes(tmp_path: Path, footer_at_end: bool) -> None:
    """New blocks hold what is written and zeros, nothing of what the device held before; the footer stays at its end;
    if there is no space for another block, the error says so, and nothing is lost."""
    rng = random.Random(1)
    with loop_device(tmp_path / "device", size_bytes=DEVICE) as device:
        on_device(tmp_path / "image.vhd", device, footer_at_end=footer_at_end)
        model = bytearray(b"first".ljust(SIZE, b"\0"))
        with vhdkit.open_disk(device, writable=True) as disk:
            for number in rng.sample(range(1, 16), 9):
                place, data = number * BLOCK + rng.randrange(BLOCK - 5000), rng.randbytes(5000)
                disk.write(place, data)
                model[place : place + 5000] = data
            disk.write_zeroes(0, 3)
            model[:3] = bytes(3)
            disk.flush()
            assert disk.read(0, SIZE) == model
            with pytest.raises(errors.NoSpace, match=r"no space for another block .* before its footer"):
                for number in range(16):
                    disk.write(number * BLOCK, model[number * BLOCK : number * BLOCK + 512])
            assert disk.read(0, SIZE) == model
        with open(device, "rb") as file:
            raw = file.read()
        assert len(raw) == DEVICE and raw[-512:-504] == b"conectix" == raw[:8]
        with vhdkit.open_disk(device) as disk:
            assert disk.read(0, SIZE) == model
        assert not [one for one in vhdkit.check(device) if one.severity > vhdkit.Severity.NOTE]
        with pytest.raises(errors.InvalidArgument, match="is a device"):
            vhdkit.repair(device)
        with pytest.raises(errors.InvalidArgument, match="is a device"):
            vhdkit.rebase(device, tmp_path / "image.vhd")
        shutil.copy(device, tmp_path / "copy.vhd")
    with vhdkit.open_disk(tmp_path / "copy.vhd") as disk:
        assert disk.read(0, SIZE) == model


def test_a_device_that_is_too_short_is_read_only(tmp_path: Path) -> None:
    """Without room for even the footer the image opens read-only, and writing is refused with the reason."""
    image = tmp_path / "image.vhd"
    vhdkit.create_image(image, SIZE, block_size_bytes=BLOCK)
    with vhdkit.open_disk(image, writable=True) as disk:
        disk.write(0, b"first")
    with open(image, "r+b") as file:
        file.truncate(image.stat().st_size - 512)
    before = image.read_bytes()
    with loop_device(image) as device:
        with vhdkit.open_disk(device) as disk:
            assert disk.read(0, 5) == b"first"
        with pytest.raises(errors.NoSpace, match="the device ends before"):
            vhdkit.open_disk(device, writable=True)
    assert image.read_bytes() == before


def test_the_footer_of_an_earlier_image_is_ignored(tmp_path: Path) -> None:
    """INV-PARENT-ID: a child that was copied over another image still has its own parent, whatever footer is at the
    device's end; this is reported, and cleared by the first write."""
    base, child, other = tmp_path / "base.vhd", tmp_path / "child.avhd", tmp_path / "other.vhd"
    vhdkit.create_image(base, SIZE, block_size_bytes=BLOCK)
    with vhdkit.open_disk(base, writable=True) as disk:
        disk.write(0, b"parent")
    vhdkit.create_child(child, base)
    vhdkit.create_image(other, SIZE, block_size_bytes=BLOCK)
    options = vhdkit.OpenOptions(parent_dirs=(str(tmp_path),))
    with loop_device(tmp_path / "device", size_bytes=DEVICE) as device:
        with open(device, "r+b") as file:
            file.write(child.read_bytes())
            file.seek(DEVICE - 512)
            file.write(other.read_bytes()[-512:])
        child.unlink()
        with vhdkit.open_disk(device, options=options) as disk:
            assert disk.read(0, 6) == b"parent"
        messages = [one.message for one in vhdkit.check(device, options=options)]
        assert "of another image, which was on this device before; the other footer is used" in messages
        with vhdkit.open_disk(device, writable=True, options=options) as disk:
            disk.write(BLOCK, b"mine")
        with open(device, "rb") as file:
            raw = file.read()
        assert raw[-512:] == raw[:512]
        with vhdkit.open_disk(device, options=options) as disk:
            assert (disk.read(0, 6), disk.read(BLOCK, 4)) == (b"parent", b"mine")


def test_an_image_copied_over_a_fixed_disk(tmp_path: Path) -> None:
    """The fixed disk counts, as its guest could have written the image; `check` says what to clear, and that helps."""
    child = tmp_path / "child.avhd"
    vhdkit.create_image(tmp_path / "base.vhd", SIZE, block_size_bytes=BLOCK)
    vhdkit.create_child(child, tmp_path / "base.vhd")
    options = vhdkit.OpenOptions(parent_dirs=(str(tmp_path),))
    fixed = tmp_path / "fixed.vhd"
    vhdkit.create_image(fixed, DEVICE - 512, disk_format=vhdkit.DiskFormat.FIXED)
    with loop_device(tmp_path / "device", size_bytes=DEVICE) as device:
        with open(device, "r+b") as file:
            file.seek(DEVICE - 512)
            file.write(fixed.read_bytes()[-512:])
        assert vhdkit.check(device) == []
        with open(device, "r+b") as file:
            file.write(child.read_bytes())
        with vhdkit.open_disk(device, options=options) as disk:
            assert disk.size_bytes == DEVICE - 512 and disk.read(0, 8) == b"conectix"
        (found,) = vhdkit.check(device, options=options)
        assert found.code == "image-inside" and "clear the last sector of the device" in found.message
        with open(device, "r+b") as file:
            file.seek(DEVICE - 512)
            file.write(bytes(512))
        with vhdkit.open_disk(device, options=options) as disk:
            assert disk.size_bytes == SIZE and disk.read(0, 8) == bytes(8)


def as_device(scene: Scene, *, footer_at_end: bool) -> Scene:
    """The scene's image at the start of a device with room for all blocks, full of an earlier owner's bytes."""
    store = scene.leaf
    size = store.size()
    footer = store.pread(size - 512, 512)
    if footer_at_end:
        store.pwrite(size - 512, pattern(512, 3))
    store.pwrite(size, pattern(5 * (BLOCK_SIZE + PAGE_SIZE), 4))
    if footer_at_end:
        store.pwrite(store.size() - 512, footer)
    return scene


def write_new_blocks(disk: Disk, model: SectorModel) -> None:
    """Write part of each block, and flush."""
    for offset in range(0, disk.size_bytes - 4096, BLOCK_SIZE):
        data = random.Random(offset).randbytes(2048)
        model.write(offset + 1024, data)
        disk.write(offset + 1024, data)
        model.flush_begins()
        disk.flush()
        model.flush_ends()


@pytest.mark.parametrize(("make", "footer_at_end"), [(dynamic_scene, False), (child_scene, True)])
def test_every_cut_leaves_flushed_or_newer(
    make: Callable[[int], Scene], footer_at_end: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """INV-FLUSHED-OR-NEWER, INV-FOOTER-COPY, INV-BLOCKS-DISJOINT: they hold on a device, too, wherever the power is
    cut, and nothing of what it held before is ever read."""

    def end_of_room(store: Store) -> int:
        return store.size() - 512

    scene = as_device(make(5), footer_at_end=footer_at_end)
    monkeypatch.setattr(opening, "end_of_room", end_of_room)
    monkeypatch.setattr(mend, "end_of_room", end_of_room)
    size = scene.leaf.size()
    run = PowerRun(scene, 5, cuts=10, second_cuts=False, script=write_new_blocks)
    run.run()
    assert run.operations > run.syncs > 3 and run.judged > run.cuts * run.operations
    assert run.store.size() == size
