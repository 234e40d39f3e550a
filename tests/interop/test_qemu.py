# SPDX-License-Identifier: Apache-2.0
"""qemu: fixed and dynamic images in both directions, and locks that keep qemu and vhdkit apart."""

from __future__ import annotations

from pathlib import Path

import pytest

import vhdkit
from tests.harness.vhd_builder import DYNAMIC as DYNAMIC_TYPE
from tests.harness.vhd_builder import FIXED, Vhd
from tests.interop.disks import (
    DYNAMIC_SHAPES,
    FIXED_SHAPES,
    KIB,
    MIB,
    SECTOR,
    Shape,
    content_of,
    create_with_content,
    scribble,
)
from tests.interop.qemu import held_by_qemu, qemu_content, qemu_create, qemu_io, qemu_virtual_size, refusal, tell
from tests.support import require_tool, run
from vhdkit.chain.verbs.describe import describe_image

pytestmark = pytest.mark.interop

DYNAMIC = Shape(vhdkit.DiskFormat.DYNAMIC, 9 * MIB + 5 * SECTOR)
LARGEST_BYTES = 2040 * 1024 * MIB
ODD_BYTES = 7 * MIB + 3 * SECTOR
LOCK_MESSAGE = 'Failed to get {}"write" lock'
SUBFORMATS = ("fixed", "dynamic")


def _assert_same_in_qemu(path: Path, expected: bytes) -> None:
    """qemu has the same size and content for the image, by `convert` and by `compare`."""
    assert qemu_virtual_size(path) == len(expected)
    assert qemu_content(path, path.parent) == expected
    raw = path.with_suffix(".expected")
    raw.write_bytes(expected)
    run([require_tool("qemu-img"), "compare", "-f", "vpc", "-F", "raw", str(path), str(raw)])


@pytest.mark.parametrize("shape", FIXED_SHAPES + DYNAMIC_SHAPES, ids=str)
def test_what_we_create_reads_the_same_in_qemu(tmp_path: Path, shape: Shape) -> None:
    """Written, zeroed and trimmed sectors, with odd sizes and many block sizes, are the same to qemu and to us.

    qemu ignores the bitmap of a dynamic disk, so this also proves that the rest of each block is zeros.
    """
    path = tmp_path / "ours.vhd"
    expected = create_with_content(path, shape)
    assert content_of(path) == expected
    _assert_same_in_qemu(path, expected)


@pytest.mark.parametrize("disk_format", [vhdkit.DiskFormat.FIXED, vhdkit.DiskFormat.DYNAMIC])
@pytest.mark.parametrize("size", [SECTOR, 65 * MIB - SECTOR, 130 * 1024 * MIB, LARGEST_BYTES])
def test_qemu_sees_our_size(tmp_path: Path, disk_format: vhdkit.DiskFormat, size: int) -> None:
    """From one sector to the largest disk, also beyond the limit of CHS, the size is exact."""
    path = tmp_path / "ours.vhd"
    vhdkit.create_image(path, size, disk_format=disk_format)
    assert qemu_virtual_size(path) == size


def test_the_end_of_the_largest_disk_reads_the_same_in_qemu(tmp_path: Path) -> None:
    """Data that we write to the last block of a disk of 2040 GiB is there for qemu."""
    path, data = tmp_path / "ours.vhd", bytes(range(256)) * 256
    vhdkit.create_image(path, LARGEST_BYTES)
    with vhdkit.open_disk(path, writable=True) as disk:
        disk.write(LARGEST_BYTES - len(data), data)
    assert qemu_content(path, tmp_path, offset=LARGEST_BYTES - len(data), size=len(data)) == data


@pytest.mark.parametrize("disk_format", [vhdkit.DiskFormat.FIXED, vhdkit.DiskFormat.DYNAMIC])
def test_images_converted_from_raw_read_the_same_in_qemu(tmp_path: Path, disk_format: vhdkit.DiskFormat) -> None:
    """A raw disk with data and holes that we converted to a VHD is the same disk to qemu."""
    raw, path = tmp_path / "disk.img", tmp_path / "ours.vhd"
    expected = create_with_content(tmp_path / "source.vhd", DYNAMIC)
    raw.write_bytes(expected)
    vhdkit.convert(raw, path, disk_format, sync=False)
    _assert_same_in_qemu(path, expected)


@pytest.mark.parametrize("creator", [b"vpc ", b"qemu", b"qem2", b"win ", b"d2v ", b"tap\0", b"CTXS"], ids=repr)
@pytest.mark.parametrize("disk_type", [FIXED, DYNAMIC_TYPE], ids=["fixed", "dynamic"])
def test_the_size_of_each_creator_is_as_in_qemu(tmp_path: Path, creator: bytes, disk_type: int) -> None:
    """If geometry and current size differ, the creator decides which one counts, for qemu as for us."""
    path, geometry = tmp_path / "odd.vhd", (60, 4, 17)
    Vhd(size=4 * MIB, creator=creator, chs=geometry, disk_type=disk_type).build().write(path)
    size = 60 * 4 * 17 * SECTOR if creator in (b"vpc ", b"qemu") else 4 * MIB
    assert describe_image(path).virtual_size_bytes == size
    assert qemu_virtual_size(path) == size


@pytest.mark.parametrize("force_size", [False, True], ids=["chs", "forced"])
@pytest.mark.parametrize("subformat", SUBFORMATS)
@pytest.mark.parametrize("size", [MIB + SECTOR, ODD_BYTES, 64 * MIB])
def test_qemus_images_read_correctly(tmp_path: Path, subformat: str, force_size: bool, size: int) -> None:
    """qemu's new image has the size that qemu reports, and only the content that qemu-io wrote."""
    path = tmp_path / "theirs.vhd"
    qemu_create(path, size, subformat, force_size=force_size)
    virtual_size = qemu_virtual_size(path)
    model = bytearray(virtual_size)
    commands = []
    for byte, offset, length in (
        (0x11, 0, SECTOR),
        (0x22, 300 * KIB + SECTOR, 70 * KIB),
        (0x33, virtual_size - 3 * SECTOR, 3 * SECTOR),
    ):
        commands.append(f"write -P {byte} {offset} {length}")
        model[offset : offset + length] = bytes([byte]) * length
    qemu_io(path, *commands)
    assert describe_image(path).virtual_size_bytes == virtual_size
    assert describe_image(path).kind == subformat
    assert content_of(path) == bytes(model)
    assert [one for one in vhdkit.check(path) if one.severity is vhdkit.Severity.ERROR] == []


@pytest.mark.parametrize("force_size", [False, True], ids=["chs", "forced"])
@pytest.mark.parametrize("subformat", SUBFORMATS)
def test_qemus_conversions_read_correctly(tmp_path: Path, subformat: str, force_size: bool) -> None:
    """A raw disk of odd size that qemu-img converted to a VHD has its content, and zeros where qemu rounded up."""
    raw, path = tmp_path / "disk.img", tmp_path / "theirs.vhd"
    content = create_with_content(tmp_path / "source.vhd", Shape(vhdkit.DiskFormat.DYNAMIC, ODD_BYTES))
    raw.write_bytes(content)
    options = f"subformat={subformat},force_size={'on' if force_size else 'off'}"
    run([require_tool("qemu-img"), "convert", "-f", "raw", "-O", "vpc", "-o", options, str(raw), str(path)])
    size = qemu_virtual_size(path)
    assert (size == ODD_BYTES) == force_size
    assert content_of(path) == content.ljust(size, b"\0")


@pytest.mark.parametrize("shape", [FIXED_SHAPES[2], DYNAMIC, DYNAMIC_SHAPES[1]], ids=str)
def test_both_write_to_our_image_in_turn(tmp_path: Path, shape: Shape) -> None:
    """We write, then qemu, then we again: each finds what the other wrote, in old blocks and in new ones."""
    path = tmp_path / "ours.vhd"
    model = bytearray(create_with_content(path, shape))
    for offset, length in ((SECTOR, SECTOR), (shape.size - 300 * KIB, 299 * KIB), (2 * MIB - SECTOR, 2 * SECTOR)):
        qemu_io(path, f"write -P 0x5a {offset} {length}")
        model[offset : offset + length] = b"\x5a" * length
    assert content_of(path) == bytes(model)
    with vhdkit.open_disk(path, writable=True) as disk:
        scribble(disk, model, 2)
    assert content_of(path) == bytes(model)
    _assert_same_in_qemu(path, bytes(model))
    assert [one for one in vhdkit.check(path) if one.severity is vhdkit.Severity.ERROR] == []


def test_we_write_to_qemus_dynamic_image(tmp_path: Path) -> None:
    """Blocks that we add to an image made by qemu, with its data not on page boundaries, are correct for qemu."""
    path = tmp_path / "theirs.vhd"
    qemu_create(path, ODD_BYTES, "dynamic", force_size=True)
    qemu_io(path, "write -P 1 1M 4k")
    model = bytearray(ODD_BYTES)
    model[MIB : MIB + 4 * KIB] = b"\1" * 4 * KIB
    with vhdkit.open_disk(path, writable=True) as disk:
        scribble(disk, model, 3)
    qemu_io(path, "write -P 2 6M 64k")
    model[6 * MIB : 6 * MIB + 64 * KIB] = b"\2" * 64 * KIB
    assert content_of(path) == bytes(model)
    _assert_same_in_qemu(path, bytes(model))


@pytest.fixture(params=[vhdkit.DiskFormat.FIXED, vhdkit.DiskFormat.DYNAMIC])
def image(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Our small image that begins with a known sector."""
    path = tmp_path / "locked.vhd"
    vhdkit.create_image(path, 4 * MIB, disk_format=request.param)
    with vhdkit.open_disk(path, writable=True) as disk:
        disk.write(0, b"\x77" * SECTOR)
    return path


READERS = (
    ["qemu-img", "info", "-f", "vpc"],
    ["qemu-img", "map", "-f", "vpc"],
    ["qemu-io", "-r", "-f", "vpc", "-c", "read -P 0x77 0 512"],
)
WRITER = ["qemu-io", "-f", "vpc", "-c", "write -P 0x99 0 512"]


def _with_path(command: list[str], image: Path) -> list[str]:
    return [require_tool(command[0]), *command[1:], str(image)]


def test_while_we_write_qemu_is_locked_out(image: Path) -> None:
    """Every program of qemu fails with its own lock message, and works again when we have closed the disk."""
    with vhdkit.open_disk(image, writable=True):
        for command in READERS:
            assert LOCK_MESSAGE.format("shared ") in refusal(_with_path(command, image))
        assert LOCK_MESSAGE.format("") in refusal(_with_path(WRITER, image))
        run([require_tool("qemu-img"), "info", "-U", "-f", "vpc", str(image)])
    assert content_of(image)[:SECTOR] == b"\x77" * SECTOR
    for command in (*READERS, WRITER):
        run(_with_path(command, image))
    assert content_of(image)[:SECTOR] == b"\x99" * SECTOR


def test_while_we_read_qemu_reads_and_cannot_write(image: Path) -> None:
    """Readers share the image; qemu's writer fails with its own lock message and changes nothing."""
    before = image.read_bytes()
    with vhdkit.open_disk(image) as disk:
        for command in READERS:
            run(_with_path(command, image))
        assert LOCK_MESSAGE.format("") in refusal(_with_path(WRITER, image))
        assert disk.read(0, SECTOR) == b"\x77" * SECTOR
    assert image.read_bytes() == before
    run(_with_path(WRITER, image))


def test_a_base_is_held_while_its_child_is_open(tmp_path: Path) -> None:
    """qemu cannot write to the parent of a disk that we have open, for writing or for reading."""
    base, child = tmp_path / "base.vhd", tmp_path / "child.vhd"
    vhdkit.create_image(base, 4 * MIB)
    vhdkit.create_child(child, base)
    for writable in (True, False):
        with vhdkit.open_disk(child, writable=writable):
            assert LOCK_MESSAGE.format("") in refusal(_with_path(WRITER, base))
            run(_with_path(READERS[0], base))
    run(_with_path(WRITER, base))


def test_while_qemu_writes_we_are_locked_out(image: Path) -> None:
    """Opening, even for reading, and checking raise ImageInUse; `info` works and reports it; then everything is free
    again."""
    with held_by_qemu(image, writable=True) as process:
        for writable in (True, False):
            with pytest.raises(vhdkit.ImageInUse) as caught:
                vhdkit.open_disk(image, writable=writable)
            assert caught.value.path == str(image)
        with pytest.raises(vhdkit.ImageInUse):
            vhdkit.check(image)
        assert describe_image(image).in_use
        # A refused open must not have removed qemu's locks or left ours behind.
        assert "wrote 512/512" in tell(process, "write -P 0x44 512 512")
        assert LOCK_MESSAGE.format("") in refusal(_with_path(WRITER, image))
    assert not describe_image(image).in_use
    assert content_of(image)[: 2 * SECTOR] == b"\x77" * SECTOR + b"\x44" * SECTOR


def test_while_qemu_reads_we_read_and_cannot_write(image: Path) -> None:
    """A reader of qemu keeps our writers out and admits our readers."""
    with held_by_qemu(image, writable=False) as process:
        with pytest.raises(vhdkit.ImageInUse):
            vhdkit.open_disk(image, writable=True)
        assert content_of(image)[:SECTOR] == b"\x77" * SECTOR
        assert not describe_image(image).in_use
        assert "read 512/512" in tell(process, "read -P 0x77 0 512")
    with vhdkit.open_disk(image, writable=True):
        pass


def test_a_parent_that_qemu_writes_to_refuses_the_child(tmp_path: Path) -> None:
    """A chain is not opened while qemu changes a layer below, and the error names that layer."""
    base, child = tmp_path / "base.vhd", tmp_path / "child.vhd"
    vhdkit.create_image(base, 4 * MIB)
    vhdkit.create_child(child, base)
    with held_by_qemu(base, writable=True):
        with pytest.raises(vhdkit.ImageInUse) as caught:
            vhdkit.open_disk(child)
        assert caught.value.path == str(base)
    assert content_of(child) == bytes(4 * MIB)


def test_an_image_in_use_by_qemu_is_not_replaced(image: Path, tmp_path: Path) -> None:
    """Neither create nor convert replaces an image that qemu holds, even with the option to replace."""
    source, before = tmp_path / "source.img", image.read_bytes()
    source.write_bytes(b"\x13" * (64 * KIB))
    with held_by_qemu(image, writable=True):
        with pytest.raises(vhdkit.ImageInUse):
            vhdkit.create_image(image, 4 * MIB, replace=True)
        with pytest.raises(vhdkit.ImageInUse):
            vhdkit.convert(source, image, vhdkit.DiskFormat.DYNAMIC, replace=True)
    assert image.read_bytes() == before
