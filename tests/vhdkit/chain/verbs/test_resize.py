# SPDX-License-Identifier: Apache-2.0
"""Resizing whole images: what prevents it, and what becomes of files of every kind."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import vhdkit
from tests.harness.killing import killings
from tests.harness.stores import MemStore
from tests.harness.vhd_builder import Block, Vhd, child, pattern
from tests.support import daily_or_nightly, require_tool, run
from tests.vhdkit.formats.test_partitions import mbr, write_gpt
from vhdkit.chain.names.parents import linkage_id_of
from vhdkit.chain.records.pending import undo_path
from vhdkit.store import FileStore
from vhdkit.units import GIB, KIB, MIB, PAGE_SIZE, SECTOR_SIZE, TIB

SIZE = 4 * MIB
# The command that makes it, its size in MiB, and what the refusal to cut it says.
FILE_SYSTEMS = {
    "ext2": (["mke2fs", "-q", "-F", "-t", "ext2"], 8, "resize2fs"),
    "ext4": (["mke2fs", "-q", "-F", "-t", "ext4"], 16, "resize2fs"),
    "xfs": (["mkfs.xfs", "-q"], 320, "copy the files"),
    "vfat": (["mkfs.fat"], 8, "fatresize"),
    "ntfs": (["mkntfs", "-Q", "-F"], 8, "ntfsresize"),
    "swap": (["mkswap"], 8, "mkswap"),
    "swap-of-large-pages": (["mkswap", "-p", "65536"], 8, "mkswap"),
}
FORMATS = {"fixed": vhdkit.DiskFormat.FIXED, "dynamic": vhdkit.DiskFormat.DYNAMIC, "raw": vhdkit.DiskFormat.RAW}
VHDX = ["vhdx", "vhdx-fixed"]
CHILDREN = {"differencing": "vhd", "vhdx-child": "vhdx"}


def make(folder: Path, kind: str, content: bytes, name: str = "disk") -> Path:
    """Make an image of a kind, with content; a differencing one over a base of the same size with its own data."""
    suffix = "img" if kind == "raw" else "vhdx" if kind.startswith("vhdx") else "vhd"
    path = folder / f"{name}.{suffix}"
    block_size = MIB if suffix == "vhdx" else 512 * KIB
    if kind in CHILDREN:
        base = folder / f"base.{suffix}"
        whole = "vhdx" if suffix == "vhdx" else "dynamic"
        vhdkit.create_image(base, len(content), disk_format=whole, block_size_bytes=block_size)
        with vhdkit.open_disk(base, writable=True) as disk:
            disk.write(0, b"base" * 1000)
        vhdkit.create_child(path, base, block_size_bytes=block_size)
    elif kind in ("dynamic", "vhdx"):
        vhdkit.create_image(path, len(content), disk_format=kind, block_size_bytes=block_size)
    else:
        vhdkit.create_image(path, len(content), disk_format=FORMATS.get(kind, kind))
    with vhdkit.open_disk(path, writable=True) as disk:
        for offset in range(0, len(content), 64 * KIB):
            piece = content[offset : offset + 64 * KIB]
            if kind in CHILDREN or any(piece):
                disk.write(offset, piece)
    return path


def read(path: Path) -> bytes:
    """The whole disk."""
    with vhdkit.open_disk(path) as disk:
        return disk.read(0, disk.size_bytes)


def unit_of(kind: str) -> int:
    """What the sizes of such disks are multiples of."""
    return PAGE_SIZE if kind.startswith("vhdx") else SECTOR_SIZE


def some(size: int = SIZE, data: int = SIZE // 2, seed: int = 1) -> bytes:
    """Data at the start, zeros behind."""
    return random.Random(seed).randbytes(data).ljust(size, b"\0")


@pytest.mark.parametrize("kind", ["fixed", "dynamic", "raw", *VHDX, *CHILDREN])
@pytest.mark.parametrize("units", [1, 2 * SIZE // PAGE_SIZE])
def test_every_kind_grows_with_zeros(tmp_path: Path, kind: str, units: int) -> None:
    """INV-RESIZE-WHOLE: the disk keeps its bytes and ends in zeros; check finds nothing; no record is left."""
    content, size = some(), SIZE + units * unit_of(kind)
    path = make(tmp_path, kind, content)
    plan = vhdkit.resize(path, size, dry_run=True)
    assert read(path) == content and plan.file_size_after_bytes is None
    done = vhdkit.resize(path, size, shrink=True)
    assert read(path) == content.ljust(size, b"\0")
    assert (done.virtual_size_before_bytes, done.virtual_size_after_bytes) == (SIZE, size)
    assert done.moved_block_count == plan.moved_block_count
    assert done.file_size_after_bytes == path.stat().st_size
    assert [one.code for one in vhdkit.check(path) if one.code != "chain-size"] == []
    assert not os.path.lexists(undo_path(str(path)))


@pytest.mark.parametrize("kind", ["fixed", "dynamic", "raw", *VHDX])
def test_every_kind_shrinks_to_its_data(tmp_path: Path, kind: str) -> None:
    """INV-RESIZE-WHOLE: down to the last byte that is not zero, and not a sector further."""
    unit = unit_of(kind)
    content = some(data=SIZE // 2 - 3 * unit + 1)
    least = SIZE // 2 - 2 * unit
    path = make(tmp_path, kind, content)
    before = path.read_bytes()
    with pytest.raises(vhdkit.InvalidArgument, match=f"cut off data at byte {least - unit}"):
        vhdkit.resize(path, least - unit, shrink=True)
    assert path.read_bytes() == before
    vhdkit.resize(path, least, shrink=True)
    assert read(path) == content[:least] and vhdkit.check(path) == []
    assert path.stat().st_size < least + (6 if kind.startswith("vhdx") else 1) * MIB


@pytest.mark.parametrize("kind", CHILDREN)
def test_data_in_a_parent_counts_too(tmp_path: Path, kind: str) -> None:
    """What a child would cut off may be in its parent; and a child does not become smaller than its parent."""
    content = some(data=KIB)
    path = make(tmp_path, kind, content)
    vhdkit.resize(path, 2 * SIZE)
    with pytest.raises(vhdkit.InvalidArgument, match="smaller than its parent"):
        vhdkit.resize(path, SIZE - unit_of(kind), shrink=True)
    vhdkit.resize(path, SIZE + MIB, shrink=True)
    assert read(path) == content.ljust(SIZE + MIB, b"\0")
    vhdkit.resize(path, SIZE, shrink=True)
    assert read(path) == content


@pytest.mark.parametrize("kind", ["vhdx", "vhdx-fixed"])
def test_a_vhdx_has_whole_pages(tmp_path: Path, kind: str) -> None:
    """Other programs refuse other sizes: the error names the next larger one, and nothing has changed."""
    path = make(tmp_path, kind, some())
    before = path.read_bytes()
    with pytest.raises(vhdkit.InvalidArgument, match=f"multiple of 4096 bytes.*{SIZE + PAGE_SIZE}$"):
        vhdkit.resize(path, SIZE + SECTOR_SIZE)
    assert path.read_bytes() == before


@pytest.mark.parametrize("kind", CHILDREN)
def test_a_parent_keeps_its_size(tmp_path: Path, kind: str) -> None:
    """An image that has children is not resized, and the error names one of them."""
    path = make(tmp_path, kind, some())
    base = tmp_path / f"base.{CHILDREN[kind]}"
    before = base.read_bytes()
    with pytest.raises(vhdkit.HasChildren, match=r"disk.vhdx?; resizing it would change"):
        vhdkit.resize(base, 2 * SIZE)
    assert base.read_bytes() == before
    with vhdkit.open_disk(path), pytest.raises(vhdkit.ImageInUse):
        vhdkit.resize(path, 2 * SIZE)


def test_a_larger_parents_data_does_not_appear(tmp_path: Path) -> None:
    """A child that is smaller than its parent does not grow over data of the parent."""
    base = Vhd(size=4 * MIB, block_size=MIB, blocks={0: Block(pattern(MIB)), 2: Block(pattern(MIB))})
    base.build().write(tmp_path / "parent.vhd")
    with FileStore.open(tmp_path / "parent.vhd") as store:
        parent_id = linkage_id_of(store)
    small = child(size=MIB + MIB // 2, block_size=MIB, parent_id=parent_id)
    path = small.build().write(tmp_path / "small.vhd")
    before = read(path)
    with pytest.raises(vhdkit.InvalidArgument, match="would appear"):
        vhdkit.resize(path, 4 * MIB)
    with pytest.raises(vhdkit.InvalidArgument, match="smaller than its parent"):
        vhdkit.resize(path, 2 * MIB, shrink=True)
    assert read(path) == before


# -- partitions ---------------------------------------------------------------------------------------------------


def with_gpt(size: int, *partitions: tuple[int, int, str], primary: bool = True) -> bytes:
    """The content of a disk with a GPT."""
    store = MemStore()
    store.truncate(size)
    write_gpt(store, size, *partitions, primary=primary)
    return store.contents()


def test_a_partition_is_not_cut_off(tmp_path: Path) -> None:
    """Even if it is empty: the error names number, name and bytes of the partition, and the smallest size."""
    path = make(tmp_path, "dynamic", with_gpt(SIZE, (40, 99, "boot"), (100, 5000, "données")))
    with pytest.raises(vhdkit.InvalidArgument) as caught:
        vhdkit.resize(path, 2 * MIB, shrink=True)
    assert "partition 2 'données'" in str(caught.value) and f"at least {5001 * SECTOR_SIZE} bytes" in str(caught.value)
    marked = make(tmp_path, "fixed", mbr((0x83, 64, 100), (0x07, 4000, 4000)).ljust(SIZE, b"\0"), "mbr")
    with pytest.raises(vhdkit.InvalidArgument, match=r"partition 2 \(type 0x07"):
        vhdkit.resize(marked, 7999 * SECTOR_SIZE, shrink=True)
    vhdkit.resize(marked, 8000 * SECTOR_SIZE, shrink=True)


@pytest.mark.parametrize("kind", ["fixed", "dynamic", "raw", "vhdx"])
@pytest.mark.parametrize("units", [-2 * MIB // SECTOR_SIZE, -20, -1, SIZE // SECTOR_SIZE])
def test_the_second_gpt_may_be_cut_off_if_the_first_is_intact(tmp_path: Path, kind: str, units: int) -> None:
    """The copy at the old end does not prevent it, and a note says how to write it at the new end."""
    size = SIZE + units * (unit_of(kind) if units in (-1, -20) else SECTOR_SIZE)
    content = with_gpt(SIZE, (40, 99, "boot"))
    path = make(tmp_path, kind, content)
    done = vhdkit.resize(path, size, shrink=True)
    assert any("sgdisk -e" in note for note in done.notes)
    assert read(path) == content[:size].ljust(size, b"\0")


def test_the_only_gpt_is_data(tmp_path: Path) -> None:
    """If the first copy is damaged, the disk depends on the second one: it is not cut off."""
    path = make(tmp_path, "dynamic", with_gpt(SIZE, (40, 99, "boot"), primary=False))
    with pytest.raises(vhdkit.InvalidArgument, match="cut off data"):
        vhdkit.resize(path, 2 * MIB, shrink=True)


# -- file systems without a table ---------------------------------------------------------------------------------


@pytest.mark.parametrize("image", ["fixed", "dynamic", "raw"])
@pytest.mark.parametrize("kind", FILE_SYSTEMS)
def test_a_file_system_is_not_cut_off(tmp_path: Path, kind: str, image: str) -> None:
    """INV-SHRINK-KEEPS: even if it is empty at its end: the error names it, its last byte and the tool that helps."""
    words, size, hint = FILE_SYSTEMS[kind]
    flat = tmp_path / "flat.raw"
    with flat.open("wb") as file:
        file.truncate(size * MIB)
    run([require_tool(words[0]), *words[1:], str(flat)])
    with flat.open("rb") as file:
        content = file.read(8 * MIB)
    path = flat
    if image != "raw":
        path = tmp_path / "disk.vhd"
        vhdkit.convert(flat, path, disk_format=FORMATS[image])
    vhdkit.resize(path, (size + 8) * MIB)
    with path.open("rb") as file:
        before = hashlib.file_digest(file, "sha256").digest()
    with pytest.raises(vhdkit.InvalidArgument) as caught:
        vhdkit.resize(path, size * MIB - SECTOR_SIZE, shrink=True)
    assert caught.value.hint is not None and hint in caught.value.hint
    assert f"{kind.split('-')[0]}, which extends to byte {size * MIB}" in str(caught.value)
    with path.open("rb") as file:
        assert hashlib.file_digest(file, "sha256").digest() == before
    vhdkit.resize(path, size * MIB, shrink=True)
    with vhdkit.open_disk(path) as disk:
        assert disk.size_bytes == size * MIB and disk.read(0, 8 * MIB) == content


def test_a_disk_with_content_of_unknown_extent_is_not_cut(tmp_path: Path) -> None:
    """INV-SHRINK-KEEPS: LUKS and BitLocker record no size: a disk with one of them cannot become smaller."""
    path = make(tmp_path, "dynamic", b"LUKS\xba\xbe".ljust(SIZE, b"\0"))
    with pytest.raises(vhdkit.InvalidArgument, match="holds luks, which may extend to its end"):
        vhdkit.resize(path, SIZE // 2, shrink=True)


def test_shrinking_needs_its_option(tmp_path: Path) -> None:
    """INV-SHRINK-KEEPS: without its option a smaller size is refused, also in a dry run, and no byte changes."""
    path = make(tmp_path, "dynamic", some(data=KIB))
    before = path.read_bytes()
    for dry_run in (True, False):
        with pytest.raises(vhdkit.InvalidArgument, match="fewer than") as caught:
            vhdkit.resize(path, SIZE // 2, dry_run=dry_run)
        assert caught.value.hint is not None and "--shrink" in caught.value.hint
    assert path.read_bytes() == before
    assert vhdkit.resize(path, SIZE // 2, shrink=True).virtual_size_after_bytes == SIZE // 2


# -- sizes, limits, other files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fixed", "dynamic", "raw", *VHDX, *CHILDREN])
def test_invalid_sizes(tmp_path: Path, kind: str) -> None:
    """Zero, partial sectors, more than the format holds, or a raw disk larger than files can be: refused, no byte
    changes.
    """
    path = make(tmp_path, kind, some())
    before = path.read_bytes()
    limit = 1 << 70 if kind == "raw" else 64 * TIB if kind.startswith("vhdx") else 2040 * GIB
    for size in (0, -512, SIZE + 1, limit + GIB):
        with pytest.raises(vhdkit.InvalidArgument):
            vhdkit.resize(path, size, shrink=True)
    assert path.read_bytes() == before
    assert vhdkit.resize(path, SIZE, shrink=True).notes == () and path.read_bytes() == before


def test_grown_to_the_limit(tmp_path: Path) -> None:
    """2040 GiB are possible for a VHD, dynamic or fixed with holes; a VHDX has no such limit."""
    for kind, size in (("dynamic", 2040 * GIB), ("fixed", 2040 * GIB), ("vhdx", 8 * TIB)):
        path = make(tmp_path, kind, some(), kind)
        vhdkit.resize(path, size)
        with vhdkit.open_disk(path) as disk:
            assert disk.size_bytes == size and disk.read(size - 10, 10) == bytes(10)
        assert path.stat().st_blocks * 512 < 40 * MIB


def test_bytes_before_a_fixed_footer_do_not_appear(tmp_path: Path) -> None:
    """What other programs left between the end of a fixed disk and its footer is neither shown nor lost."""
    image = Vhd(size=SIZE, disk_type=2, data=pattern(SIZE + 3 * SECTOR_SIZE), data_size=SIZE + 4 * SECTOR_SIZE)
    path = image.build().write(tmp_path / "odd.vhd")
    before = path.read_bytes()
    for size in (SIZE + MIB, SIZE - SECTOR_SIZE):
        with pytest.raises(vhdkit.InvalidArgument):
            vhdkit.resize(path, size, shrink=True)
    assert path.read_bytes() == before
    blank = Vhd(size=SIZE, disk_type=2, data=pattern(SIZE), data_size=SIZE + 4 * SECTOR_SIZE)
    path = blank.build().write(tmp_path / "blank.vhd")
    vhdkit.resize(path, SIZE + MIB, shrink=True)
    assert read(path) == pattern(SIZE).ljust(SIZE + MIB, b"\0")


# -- killed -------------------------------------------------------------------------------------------------------


def reset(saved: Path, folder: Path) -> None:
    """Restore the files, and remove those that are new."""
    for path in folder.iterdir():
        path.unlink()
    for path in saved.iterdir():
        shutil.copy(path, folder / path.name)


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        ("fixed", 2 * SIZE),
        ("fixed", SIZE - MIB),
        ("dynamic", 200 * SIZE),
        ("dynamic", SIZE - MIB),
        ("raw", SIZE - MIB),
        ("vhdx", 80_000 * SIZE),
        ("vhdx", SIZE - MIB),
        ("vhdx-fixed", 2 * SIZE),
    ],
)
def test_inv_resize_whole_when_killed_at_every_call(tmp_path: Path, kind: str, size: int) -> None:
    """INV-RESIZE-WHOLE: kill -9 before any call that changes a file leaves the old or the new size; then it works."""
    content = with_gpt(SIZE, (40, 99, "boot"))
    folder, saved = tmp_path / "here", tmp_path / "saved"
    folder.mkdir()
    saved.mkdir()
    path = make(folder, kind, content)
    shutil.copy(path, saved / path.name)
    states = {SIZE: content, size: content[:size].ljust(size, b"\0")} if size < 10 * SIZE else {}
    seen = set()
    for number in killings(lambda: vhdkit.resize(path, size, shrink=True), step=daily_or_nightly(2, 1)):
        with vhdkit.open_disk(path) as disk:
            seen.add(disk.size_bytes)
            if states:
                assert disk.read(0, disk.size_bytes) == states[disk.size_bytes], number
            else:
                assert disk.size_bytes in (SIZE, size) and disk.read(0, SIZE) == content
        if number > 0:
            vhdkit.resize(path, size, shrink=True)
            with vhdkit.open_disk(path) as disk:
                assert disk.size_bytes == size and disk.read(0, min(SIZE, size)) == content[:size]
            assert not os.path.lexists(undo_path(str(path)))
            reset(saved, folder)
    assert seen == {SIZE, size}


@pytest.mark.parametrize("suffix", ["vhd", "vhdx"])
def test_compacting_killed_at_every_call(tmp_path: Path, suffix: str) -> None:
    """INV-COMPACT-PRESERVES: compact, too: the disk reads the same after each kill, and compacting completes."""
    folder, saved = tmp_path / "here", tmp_path / "saved"
    folder.mkdir()
    saved.mkdir()
    path = folder / f"disk.{suffix}"
    if suffix == "vhd":
        blocks = {number: Block(pattern(512 * KIB, number) if number % 2 else b"") for number in range(8)}
        Vhd(size=4 * MIB, block_size=512 * KIB, blocks=blocks).build().write(path)
    else:
        make(folder, "vhdx", b"".join(pattern(MIB, number) if number % 2 else b"\0" * MIB for number in range(4)))
        with vhdkit.open_disk(path, writable=True) as disk:
            disk.write(0, b"x")
            disk.write(0, bytes(512))
    shutil.copy(path, saved / path.name)
    content = read(path)
    for number in killings(lambda: vhdkit.compact(path), step=daily_or_nightly(2, 1)):
        assert read(path) == content
        if number > 0:
            vhdkit.compact(path)
            assert read(path) == content and {one.code for one in vhdkit.check(path)} <= {"geometry"}
            reset(saved, folder)


def check_failing(path: Path, work: Callable[[], object]) -> None:
    """`work` fails with a VhdkitError and leaves every byte of the file unchanged."""
    before = path.read_bytes()
    with pytest.raises(vhdkit.VhdkitError):
        work()
    assert path.read_bytes() == before


def test_files_that_cannot_be_resized(tmp_path: Path) -> None:
    """A folder, a missing file, an empty file, a damaged image: typed errors."""
    (tmp_path / "empty.vhd").touch()
    broken = Vhd(entries={0: 0}, blocks={0: Block(pattern(KIB))}).build().write(tmp_path / "broken.vhd")
    check_failing(broken, lambda: vhdkit.resize(broken, 8 * MIB))
    check_failing(broken, lambda: vhdkit.resize(tmp_path / "empty.vhd", 8 * MIB))
    check_failing(broken, lambda: vhdkit.resize(tmp_path, 8 * MIB))
    check_failing(broken, lambda: vhdkit.resize(tmp_path / "gone.vhd", 8 * MIB))
