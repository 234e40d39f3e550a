# SPDX-License-Identifier: Apache-2.0
"""Dynamic and differencing images of other programs: where blocks may be, and what their bits mean."""

from __future__ import annotations

import pytest

from tests.harness.stores import MemStore
from tests.harness.vhd_builder import KIB, MIB, TIB, Block, Vhd, bits_of, child, pattern
from vhdkit.errors import CorruptImage, CorruptReason
from vhdkit.finding import Severity
from vhdkit.formats.vhd.check import check_vhd
from vhdkit.formats.vhd.create import create_dynamic
from vhdkit.formats.vhd.dynamic import DynamicImage
from vhdkit.formats.vhd.opening import open_dynamic
from vhdkit.image import Extent, ExtentKind, read_extents
from vhdkit.units import SECTOR_SIZE

SMALL = 512 * KIB  # the smallest block: 1024 sectors


def _read(layer: DynamicImage, sector: int, count: int) -> bytes:
    buffer = bytearray(count * SECTOR_SIZE)
    read_extents(layer.store, layer.extents(sector, count), memoryview(buffer))
    return bytes(buffer)


def _open(image: Vhd, **options: bool) -> DynamicImage:
    return open_dynamic(image.build().store(frozen=True), **options)


@pytest.mark.parametrize("aligned", [False, True], ids=["unaligned", "4k-aligned"])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (2, 1, 0)])
def test_quirk_blocks_in_any_order_aligned_or_not(order: tuple[int, ...], aligned: bool) -> None:
    """Quirk: blocks may be in any order, their data aligned to 4 KiB (XenServer, Hyper-V) or not (QEMU)."""
    image = Vhd(
        size=3 * SMALL,
        block_size=SMALL,
        aligned=aligned,
        blocks={index: Block(pattern(SMALL, index)) for index in order},
    )
    layer = _open(image)
    assert all(layer.block_offset(index) % 4096 == 0 for index in order) == aligned
    assert _read(layer, 0, 3072) == pattern(SMALL, 0) + pattern(SMALL, 1) + pattern(SMALL, 2)


@pytest.mark.parametrize("shift", range(10))
def test_quirk_every_block_size_is_read(shift: int) -> None:
    """Quirk: for blocks from 512 KiB to 256 MiB, data begins behind a bitmap rounded up to sectors."""
    block_size = SMALL << shift
    bits = bits_of({0, 1, block_size // 512 - 1}, block_size)
    last = Block(b"end!" * 128, at=block_size - 512, bits=bits)
    layer = _open(Vhd(size=2 * block_size, block_size=block_size, blocks={1: last}))
    assert layer.block_offset(1) - layer.bat.block_start(1) == max(block_size // 4096, 512)
    assert _read(layer, 2 * block_size // 512 - 1, 1) == b"end!" * 128
    kinds = [(one.sector_count, one.kind) for one in layer.extents(block_size // 512, block_size // 512)]
    assert kinds == [
        (2, ExtentKind.DATA),
        (block_size // 512 - 3, ExtentKind.ZERO),
        (1, ExtentKind.DATA),
    ]


def test_clear_bits_in_a_dynamic_disk_read_as_zeros() -> None:
    """INV-SECTOR-RULE: stale bytes under a clear bit are not shown; `ignore_bitmaps` shows them."""
    data = pattern(SMALL)
    image = Vhd(size=SMALL, block_size=SMALL, blocks={0: Block(data, bits=bits_of({3}, SMALL))})
    assert _read(_open(image), 2, 3) == bytes(512) + data[1536:2048] + bytes(512)
    assert [one.kind for one in _open(image).extents(0, 8)] == [ExtentKind.ZERO, ExtentKind.DATA, ExtentKind.ZERO]
    ignoring = _open(image, ignore_bitmaps=True)
    assert _read(ignoring, 0, 1024) == data
    assert ignoring.owned_sectors(0) is None


def test_clear_bits_in_a_differencing_disk_are_the_parents() -> None:
    """INV-SECTOR-RULE: there a clear bit means ABSENT, and `ignore_bitmaps` does not change that."""
    image = child(size=SMALL, block_size=SMALL, blocks={0: Block(pattern(SMALL), bits=bits_of({3}, SMALL))})
    for layer in (_open(image), _open(image, ignore_bitmaps=True)):
        start = layer.block_offset(0)
        assert list(layer.extents(2, 3)) == [
            Extent(2, 1, ExtentKind.ABSENT),
            Extent(3, 1, ExtentKind.DATA, 0, start + 1536),
            Extent(4, 1, ExtentKind.ABSENT),
        ]


def test_unallocated_blocks_are_zeros_or_absent() -> None:
    """A block without a BAT entry is ABSENT in a child, and zeros in a dynamic disk."""
    assert list(_open(Vhd(size=4 * MIB)).extents(0, 8192)) == [Extent(0, 8192, ExtentKind.ZERO)]
    assert list(_open(child(size=4 * MIB)).extents(1, 8190)) == [Extent(1, 8190, ExtentKind.ABSENT)]


def test_quirk_partial_bitmap_bytes_of_a_windows_child() -> None:
    """Quirk: real children have bytes such as 02 01 ff cb a8, the most significant bit first."""
    raw = bytes.fromhex("0201ffcba8")
    layer = _open(child(size=SMALL, block_size=SMALL, blocks={0: Block(pattern(SMALL), bits=raw)}))
    owned = [
        one.sector_index + step
        for one in layer.extents(0, 1024)
        if one.kind is ExtentKind.DATA
        for step in range(one.sector_count)
    ]
    assert owned == [6, 15, *range(16, 26), 28, 30, 31, 32, 34, 36]


@pytest.mark.parametrize("with_footer", [True, False])
def test_quirk_last_block_cut_at_the_end_of_the_file(with_footer: bool) -> None:
    """Quirk: a last block may be stored short; the missing part reads as zeros, the footer is not data."""
    data = pattern(SMALL)
    built = Vhd(size=SMALL, block_size=SMALL, blocks={0: Block(data)}).build()
    footer = built.pieces.pop()[1]
    cut = built.starts[0] + 512 + 10 * 512
    store = built.store()
    store.truncate(cut)
    if with_footer:
        store.pwrite(cut, footer)
    store.frozen = True
    layer = open_dynamic(store)
    assert _read(layer, 0, 1024) == data[: 10 * 512].ljust(SMALL, b"\0")
    assert [(one.kind, one.sector_count) for one in layer.extents(0, 1024)] == [
        (ExtentKind.DATA, 10),
        (ExtentKind.ZERO, 1014),
    ]


def test_quirk_last_block_of_an_odd_size_may_be_stored_without_its_tail() -> None:
    """Quirk: the disk ends inside the last block; a file that ends there too is complete."""
    size = SMALL + 5 * 512
    built = Vhd(size=size, block_size=SMALL, blocks={1: Block(pattern(5 * 512))}).build()
    footer = built.pieces.pop()[1]
    end = built.starts[1] + 512 + 5 * 512
    store = built.store()
    store.truncate(end)
    store.pwrite(end, footer)
    assert _read(open_dynamic(store), 1024, 5) == pattern(5 * 512)


def test_quirk_offsets_from_2_to_the_31_sectors() -> None:
    """Quirk: a block beyond 1 TiB of the file is found there, not at a negative offset."""
    start = (1 << 31) * 512 + 7 * 512
    image = Vhd(size=4 * MIB, blocks={1: Block(pattern(2 * MIB), start=start), 0: Block(pattern(512, 2))})
    layer = _open(image)
    assert layer.block_offset(1) == TIB + 8 * 512
    assert _read(layer, 4096, 4096) == pattern(2 * MIB)
    assert _read(layer, 0, 1) == pattern(512, 2)


def test_quirk_xen_batmap_is_a_hint_only() -> None:
    """Quirk: a batmap that marks a block as full does not override the block's bitmap."""
    data = pattern(SMALL)
    image = child(
        size=SMALL,
        block_size=SMALL,
        creator=b"tap\0",
        creator_version=0x00010003,
        batmap=b"\x80",
        blocks={0: Block(data, bits=bits_of({0}, SMALL))},
    )
    layer = _open(image)
    assert layer.metadata.batmap is not None
    assert [one.kind for one in layer.extents(0, 4)] == [ExtentKind.DATA, ExtentKind.ABSENT]


@pytest.mark.parametrize(
    ("entries", "reason", "place"),
    [
        ({1: 0x00FFFFFF}, CorruptReason.BLOCK_OUTSIDE_FILE, "BAT entry 1"),
        ({1: 0xFFFFFFFE}, CorruptReason.BLOCK_OUTSIDE_FILE, "BAT entry 1"),
        ({1: 0}, CorruptReason.BLOCK_OVER_METADATA, "BAT entry 1"),
        ({1: 2}, CorruptReason.BLOCK_OVER_METADATA, "BAT entry 1"),
        ({1: 3}, CorruptReason.BLOCK_OVER_METADATA, "BAT entry 1"),
    ],
)
def test_bad_entries_are_refused_and_named(entries: dict[int, int], reason: CorruptReason, place: str) -> None:
    """An entry past the end of the file, or over its headers, is refused, and the error gives its place."""
    image = Vhd(size=4 * SMALL, block_size=SMALL, blocks={0: Block(b"x")}, entries=entries)
    with pytest.raises(CorruptImage) as caught:
        _open(image)
    assert (caught.value.reason, caught.value.structure) == (reason, place)
    assert caught.value.offset_bytes == 1536 + 4


@pytest.mark.parametrize("distance", [0, 1, 512, 1024])
def test_overlapping_blocks_are_not_written_to(distance: int) -> None:
    """INV-BLOCKS-DISJOINT: two blocks that share a sector of the file can be read, but not written to."""
    image = Vhd(size=4 * SMALL, block_size=SMALL, blocks={0: Block(b"x"), 2: Block(b"y")})
    start = image.build().starts[0] // 512
    image.entries = {1: start + distance}
    store = image.build().store()
    with pytest.raises(CorruptImage) as caught:
        open_dynamic(store.copy(frozen=True), writable=True)
    assert caught.value.reason is CorruptReason.BLOCKS_OVERLAP and "--repair" in (caught.value.hint or "")
    layer = open_dynamic(store)
    assert [(one.severity, one.code) for one in layer.findings] == [(Severity.ERROR, "blocks-overlap")]
    assert _read(layer, 0, 1) == b"x".ljust(512, b"\0")
    assert not layer.writable and [one.code for one in check_vhd(store)].count("blocks-overlap")


def test_neighbouring_blocks_are_disjoint() -> None:
    """INV-BLOCKS-DISJOINT: at a distance of exactly one bitmap and one block they do not overlap."""
    image = Vhd(size=4 * SMALL, block_size=SMALL, blocks={0: Block(b"x"), 2: Block(b"y"), 1: Block(b"z")})
    built = image.build()
    assert built.starts[2] - built.starts[0] == SMALL + 512
    assert open_dynamic(built.store()).allocated_blocks().tolist() == [True, True, True, False]


def test_a_short_last_block_needs_only_its_sectors() -> None:
    """INV-BLOCKS-DISJOINT: a last block of five sectors needs space for exactly five."""
    size = SMALL + 5 * 512
    last = Block(pattern(5 * 512))
    image = Vhd(size=size, block_size=SMALL, blocks={1: last, 0: Block(pattern(SMALL, 3))})
    start = image.build().starts[1]
    for sectors, good in ((6, True), (5, False)):
        image.blocks[0].start = start + sectors * 512
        layer = _open(image)
        assert (layer.damage is None) == good
        if not good:
            continue
        assert _read(layer, 0, 1029) == pattern(SMALL, 3) + pattern(5 * 512)


def test_a_block_over_a_locator_is_refused() -> None:
    """A block must not overlap the text that names the parent."""
    image = child(size=2 * SMALL, block_size=SMALL, blocks={0: Block(b"x")})
    image.entries = {1: (1536 + 512) // 512}
    with pytest.raises(CorruptImage) as caught:
        _open(image)
    assert caught.value.reason is CorruptReason.BLOCK_OVER_METADATA


def test_writing_to_a_foreign_image_changes_little() -> None:
    """Unaligned blocks, spare BAT entries and the order of the blocks are kept; a reopen reads all data."""
    image = Vhd(size=3 * SMALL, block_size=SMALL, entry_count=500, hidden=1, blocks={2: Block(pattern(SMALL, 2))})
    store = image.build().store()
    layer = open_dynamic(store, writable=True)
    before = store.pread(1536 + 12, 497 * 4)
    assert layer.write(1024 + 3, memoryview(pattern(1024, 9)))
    assert not layer.write(2048, memoryview(pattern(512, 8)))
    layer.flush()
    again = open_dynamic(store.copy(frozen=True))
    assert again.metadata.tail.state.usable and again.metadata.footer.hidden == 1
    assert again.block_offset(2) == layer.block_offset(2) and store.pread(1536 + 12, 497 * 4) == before
    assert _read(again, 1024, 6) == bytes(1536) + pattern(1024, 9) + bytes(512)
    assert _read(again, 2048, 1024) == pattern(512, 8) + pattern(SMALL, 2)[512:]


def test_zeros_written_into_a_child_hide_its_parent() -> None:
    """Zeros over an unallocated block of a differencing image are owned, not optimised away."""
    store = child(size=2 * SMALL, block_size=SMALL).build().store()
    layer = open_dynamic(store, writable=True)
    assert layer.write_zeroes(1, 3)
    assert [(one.kind, one.sector_count) for one in layer.extents(0, 6)] == [
        (ExtentKind.ABSENT, 1),
        (ExtentKind.DATA, 3),
        (ExtentKind.ABSENT, 2),
    ]
    assert _read(layer, 1, 3) == bytes(1536)


def test_zeros_over_nothing_in_a_dynamic_disk_allocate_nothing() -> None:
    """Unallocated blocks read as zeros already."""
    store = MemStore()
    create_dynamic(store, 4 * MIB)
    layer = open_dynamic(store, writable=True)
    assert not layer.write_zeroes(0, 8192)
    assert not layer.allocated_blocks().any()


def test_writing_over_clear_bits_under_ignored_bitmaps_keeps_what_was_read() -> None:
    """Opened with `ignore_bitmaps`, the first write makes the whole block owned for every reader."""
    data = pattern(SMALL)
    store = Vhd(size=SMALL, block_size=SMALL, blocks={0: Block(data, bits=bits_of({0}, SMALL))}).build().store()
    layer = open_dynamic(store, writable=True, ignore_bitmaps=True)
    layer.write(5, memoryview(pattern(512, 7)))
    layer.flush()
    assert _read(open_dynamic(store), 0, 1024) == data[:2560] + pattern(512, 7) + data[3072:]


def test_trim_keeps_ownership() -> None:
    """INV-NO-REUSE: trimmed sectors read as zeros, stay owned, and their block stays where it is."""
    store = child(size=SMALL, block_size=SMALL, blocks={0: Block(pattern(SMALL), bits=bits_of({1, 2}, SMALL))})
    memory = store.build().store()
    layer = open_dynamic(memory, writable=True)
    start = layer.block_offset(0)
    layer.trim(0, 1024)
    layer.flush()
    again = open_dynamic(memory)
    assert again.block_offset(0) == start
    assert list(again.extents(0, 4)) == [
        Extent(0, 1, ExtentKind.ABSENT),
        Extent(1, 2, ExtentKind.DATA, 0, start + 512),
        Extent(3, 1, ExtentKind.ABSENT),
    ]
    assert _read(again, 1, 2) == bytes(1024)
