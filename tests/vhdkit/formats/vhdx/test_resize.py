# SPDX-License-Identifier: Apache-2.0
"""Another virtual size of a VHDX: old or new after every cut, every byte kept, no old data exposed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest

from tests.harness.packing import Crowd, content_of, cut_everywhere, short, short_content_of, vhdx_crowd
from tests.harness.power import faults_of, open_mem
from tests.harness.stores import Fault, FaultyStore, MemStore, io_failed, no_space, sync_failed
from tests.harness.vhd_builder import pattern
from tests.harness.vhdx_builder import Vhdx, VhdxBlock
from tests.support import daily_or_nightly
from tests.vhdkit.formats.vhdx.images import assert_equal_headers
from vhdkit import errors
from vhdkit.formats.vhdx import layout
from vhdkit.formats.vhdx.bat import BlockState
from vhdkit.formats.vhdx.commit import Commit
from vhdkit.formats.vhdx.create import create, new_disk
from vhdkit.formats.vhdx.format import VHDX
from vhdkit.formats.vhdx.journal import Journal
from vhdkit.formats.vhdx.metadata import read_metadata
from vhdkit.formats.vhdx.regions import read_table
from vhdkit.image import Layer
from vhdkit.units import GIB, MIB, PAGE_SIZE, TIB

KINDS = {
    "dynamic": (False, 512, False),
    "child": (True, 512, False),
    "fixed": (False, 512, True),
    "4k": (False, 4096, False),
    "child-4k": (True, 4096, False),
}
LONG = 300 * GIB  # at 1 or 2 MiB a block: more entries than the region of a small disk holds


OPERATIONS = ["read", "write", "reserve", "punch", "truncate", "sync"]
NIGHTLY = daily_or_nightly(0, 1)
CUTS = daily_or_nightly(1, 3)


def daily_or_nightly_list(daily: list[Any], nightly: list[Any]) -> list[Any]:
    """As `daily_or_nightly`."""
    return nightly if NIGHTLY else daily


def made(kind: str, seed: int, *, blocks: int = 5) -> Crowd:
    """A crowd of a kind."""
    differencing, sector_bytes, fixed = KINDS[kind]
    return vhdx_crowd(seed, blocks=blocks, differencing=differencing, sector_bytes=sector_bytes, fixed=fixed)


def resize(layers: list[Layer], size: int) -> None:
    """Change the size of the first of the layers, unless it has that size."""
    if layers[0].size_bytes == size:
        return
    resizable = VHDX.resizable(layers[0])
    assert resizable is not None
    resizable.check_size(size)
    resizable.run(resizable.plan(size))


def short_of(content: bytes, size: int) -> tuple[int, bytes]:
    """`short` of a disk with this content, extended with zeros or truncated."""
    kept = content[:size]
    return size, short(kept)[1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(daily_or_nightly(2, 20)))
def test_inv_resize_grows_with_zeros_and_shrinks(kind: str, seed: int) -> None:
    """INV-RESIZE-WHOLE: an image of any shape keeps every byte, grows by zeros, and cut content never reappears."""
    scene = made(kind, seed)
    old, content = len(scene.content), bytearray(scene.content)
    ids = [VHDX.linkage_id(scene.store)]
    far, least = 3 * old if kind == "fixed" else LONG, old if "child" in kind else MIB + 3 * PAGE_SIZE
    for size in (old + PAGE_SIZE, 3 * old, far, least, old, 2 * old):
        resize(scene.layers, size)
        content = content[:size].ljust(min(size, 3 * old), b"\0")
        assert short_content_of(scene.store, scene.parents) == (size, short(bytes(content))[1])
        assert [one.code for one in VHDX.check(scene.store) if one.code != "space-unused"] == []
        assert_equal_headers(scene.store)
        ids.append(VHDX.linkage_id(scene.store))
        if size == 3 * old:
            with open_mem(scene.store, scene.parents, writable=True) as disk:
                disk.write(old - PAGE_SIZE, b"x" * 3 * PAGE_SIZE)
                disk.write(2 * old, b"y" * PAGE_SIZE)
            content[old - PAGE_SIZE : old + 2 * PAGE_SIZE] = b"x" * 3 * PAGE_SIZE
            content[2 * old : 2 * old + PAGE_SIZE] = b"y" * PAGE_SIZE
    assert len(set(ids)) == len(ids) - (least == old), "each change of the size brings a new DataWriteGuid"


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", KINDS if NIGHTLY else ["child"])
@pytest.mark.parametrize("seed", range(daily_or_nightly(1, 4)))
@pytest.mark.parametrize("far", [False, True], ids=["in place", "new BAT"])
def test_inv_resize_whole_at_every_cut_of_growing(kind: str, seed: int, far: bool) -> None:
    """INV-RESIZE-WHOLE: a cut in any write or sync, twice, leaves the old size or the new, and growing completes."""
    scene = made(kind, 40 + seed, blocks=3)
    far = far and kind != "fixed"
    size = LONG if far else 2 * len(scene.content)
    seen = cut_everywhere(scene, lambda layers: resize(layers, size), resized(scene, size), seed=seed, cuts=CUTS)
    assert len(seen) == 2


def resized(scene: Crowd, size: int) -> tuple[tuple[int, bytes], tuple[int, bytes]]:
    """`short` of the disk before and after."""
    return short(scene.content), short_of(scene.content, size)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", KINDS if NIGHTLY else ["child"])
@pytest.mark.parametrize("seed", range(daily_or_nightly(1, 4)))
def test_inv_resize_whole_at_every_cut_of_shrinking(kind: str, seed: int) -> None:
    """INV-RESIZE-WHOLE: the same for a smaller size: the disk never has other content."""
    scene = made(kind, 60 + seed, blocks=4)
    size = len(scene.content) // 2 // PAGE_SIZE * PAGE_SIZE
    seen = cut_everywhere(scene, lambda layers: resize(layers, size), resized(scene, size), seed=seed, cuts=CUTS)
    assert len(seen) == 2


def caught(work: Callable[[list[Layer]], object], size_of: Callable[[Crowd], int], kind: str = "dynamic") -> None:
    """At least one of a few images detects a wrong order."""
    with pytest.raises(AssertionError):
        for seed in range(8):
            scene = made(kind, 40 + seed, blocks=3)
            states = resized(scene, size_of(scene))
            cut_everywhere(scene, work, states, seed=seed, cuts=6, again=False)


def test_a_table_that_is_not_durable_before_the_size_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Self-test: detects a new region whose BAT a cut may lose."""
    monkeypatch.setattr("vhdkit.formats.vhdx.resize._make_room", lambda image, growth: None)
    caught(lambda layers: resize(layers, LONG), lambda scene: LONG)


@pytest.mark.timeout(1800)
@pytest.mark.nightly
def test_entries_that_are_dropped_before_the_size_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Self-test: detects a block that is dropped while the disk still has it, and so shows the parent."""
    real = Commit.write_pages

    def late(self: Commit, writes: list[tuple[int, bytes]]) -> None:
        self.flush_later = lambda: real(self, writes)  # type: ignore[attr-defined]

    def finish(self: Commit) -> None:
        settle(self)
        self.flush_later()  # type: ignore[attr-defined]
        settle(self)

    settle = Commit.settle

    def work(layers: list[Layer]) -> None:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(Commit, "write_pages", late)
            patched.setattr("vhdkit.formats.vhdx.resize._finish", lambda image: finish(image.commit))
            resize(layers, MIB + PAGE_SIZE)

    caught(work, lambda scene: MIB + PAGE_SIZE, "child")


def test_a_size_in_its_place_before_the_log_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Self-test: detects size and region tables that are written in place, not as one change."""

    def in_place(self: Commit, writes: list[tuple[int, bytes]]) -> None:
        for offset, raw in writes:
            self._store.pwrite(offset, raw)
        self.sync()

    monkeypatch.setattr(Commit, "write_pages", in_place)
    caught(lambda layers: resize(layers, LONG), lambda scene: LONG)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("operation", daily_or_nightly_list(["write", "sync"], OPERATIONS))
@pytest.mark.parametrize("make_error", daily_or_nightly_list([io_failed], [io_failed, no_space, sync_failed]))
@pytest.mark.parametrize("kind", daily_or_nightly_list(["child"], ["child", "fixed"]))
@pytest.mark.parametrize("larger", [False, True])
def test_every_failing_call_is_a_clean_error(
    operation: str, make_error: Callable[[], errors.VhdkitError], kind: str, larger: bool
) -> None:
    """Whichever call fails, the error is reported, the size is old or new, and a second attempt works."""
    start = made(kind, 41, blocks=3)
    size = MIB if not larger else 2 * len(start.content) if kind == "fixed" else LONG
    states = resized(start, size)
    for at in range(1, 500, daily_or_nightly(2, 1)):
        store = FaultyStore(start.store)
        layers = start.over(store)
        store.faults.append(Fault(operation, make_error, at=at, partly=operation == "write"))
        try:
            resize(layers, size)
        except errors.VhdkitError:
            store.faults.clear()
            with contextlib.suppress(errors.SyncFailed):  # after the error of the resize
                layers[0].close()
            assert short_content_of(store.copy(), start.parents) in states, at
            resize(start.over(store), size)
            assert short_content_of(store, start.parents) == states[1] and not faults_of(store)
        else:
            break
    else:
        pytest.fail("never came to an end")


def test_a_full_disk_keeps_the_file_as_long_as_it_was() -> None:
    """Without space for the log nothing changes, except the log's allocation in the file."""
    for larger in (3 * MIB, LONG):
        start = Crowd(Vhdx(2 * MIB, blocks={0: VhdxBlock(6, 4 * MIB)}).store(), [], bytes(2 * MIB))
        store = FaultyStore(start.store, Fault("reserve", no_space))
        layers = start.over(store)
        with pytest.raises(errors.NoSpace):
            resize(layers, larger)
        layers[0].close()
        assert store.size() == start.store.size() and content_of(store, []) == start.content


def test_junk_after_the_table_does_not_become_blocks() -> None:
    """Entries past the end, left by another program, are cleared before the disk gets blocks there."""
    junk = dict.fromkeys((4, 5, 700, 5000), 3 * MIB | 6)
    store = Vhdx(4 * MIB, entries=junk, blocks={0: VhdxBlock(6, 4 * MIB, {0: pattern(MIB)})}).store()
    resize(Crowd(store, [], b"").layers, 6000 * MIB)
    assert short_content_of(store, []) == (6000 * MIB, pattern(MIB)) and not faults_of(store)


def test_blocks_of_a_child_past_its_end_do_not_appear() -> None:
    """A child's BAT has entries for blocks past the end of the disk: they are cleared when it grows or shrinks."""
    blocks = {0: VhdxBlock(6, 4 * MIB, {0: pattern(MIB)}), 2: VhdxBlock(6, 5 * MIB, {0: pattern(MIB, 2)})}
    parents = [VHDX.open(Vhdx(MIB).store(frozen=True))]
    for far in (3 * MIB, LONG):
        store = Vhdx(2 * MIB, parent=b"p" * 16, blocks=dict(blocks)).store()
        scene = Crowd(store, parents, b"")
        resize(scene.layers, far)
        assert short_content_of(store, parents) == (far, pattern(MIB))
    store = Vhdx(4 * MIB, parent=b"p" * 16, blocks=blocks).store()
    scene = Crowd(store, parents, b"")
    resize(scene.layers, 2 * MIB)
    assert store.size() == 5 * MIB and VHDX.check(store) == []
    resize(scene.layers, 4 * MIB)
    assert short_content_of(store, parents) == (4 * MIB, pattern(MIB))


def test_hidden_bytes_past_the_end_do_not_appear() -> None:
    """Bytes and bits of the last block past the end of the disk are cleared when the disk grows over them."""
    size = MIB + 8 * PAGE_SIZE
    block = VhdxBlock(7, 5 * MIB, {0: pattern(MIB)}, set(range(2048)))
    child = Vhdx(size, parent=b"p" * 16, blocks={1: block}, bitmaps={0: 4 * MIB})
    for image in (Vhdx(size, blocks={1: VhdxBlock(6, 5 * MIB, {0: pattern(MIB)})}), child):
        store = image.store()
        content = content_of(store, [])
        resize(Crowd(store, [], b"").layers, 4 * MIB)
        assert content_of(store, []) == content.ljust(4 * MIB, b"\0")
    assert store.pread(4 * MIB + 256, 256) == b"\xff" * 8 + bytes(248)


def test_a_last_block_without_room_does_not_grow() -> None:
    """INV-BLOCKS-DISJOINT: the unused part of the last block may belong to another block: it is not zeroed."""
    last = VhdxBlock(6, 4 * MIB)
    image = Vhdx(2 * MIB + PAGE_SIZE, 2 * MIB, blocks={1: last, 0: VhdxBlock(6, 5 * MIB)})
    store = image.store(frozen=True)
    with pytest.raises(errors.InvalidArgument, match="cannot be completed"):
        sizing = VHDX.resizable(VHDX.open(store))
        assert sizing is not None
        sizing.plan(4 * MIB)


def test_new_blocks_of_a_fixed_image_have_space() -> None:
    """Every block of the larger disk is fully present, in order, and the file is as long as all of them."""
    store = MemStore("fixed.vhdx")
    create(store, new_disk(3 * MIB + PAGE_SIZE), MIB, fixed=True)
    resize(Crowd(store, [], b"").layers, 4100 * MIB)
    layer = VHDX.open(store)
    assert layer.allocated_blocks().all()
    places = [layer.block_offset(block) for block in range(4100)]
    assert places == [(4 + block) * MIB for block in range(4100)] and store.size() == 4104 * MIB
    assert VHDX.check(store) == []


def test_region_tables_that_differ_are_equal_afterwards() -> None:
    """If the BAT moves, both region tables are written, and unknown regions are kept."""
    store = Vhdx(MIB, other=5 * MIB).store()
    store.pwrite(layout.REGION_TABLE_OFFSETS[1] + 100, b"junk")
    resize(Crowd(store, [], b"").layers, LONG)
    assert read_table(store, 0) == read_table(store, 1)
    metadata = read_metadata(store)
    assert metadata.regions.others[0].file_offset == 5 * MIB and metadata.regions.bat.file_offset == 6 * MIB


@pytest.mark.parametrize(
    ("sector_bytes", "wrong"), [(512, MIB + 256), (4096, MIB + 512), (512, 64 * TIB + 512), (512, 0)]
)
def test_impossible_sizes_are_refused(sector_bytes: int, wrong: int) -> None:
    """A size is one or more whole sectors of the disk, and at most 64 TiB."""
    sizing = VHDX.resizable(VHDX.open(Vhdx(MIB, sector_bytes=sector_bytes).store(frozen=True)))
    assert sizing is not None
    sizing.check_size(64 * TIB)
    with pytest.raises(errors.InvalidArgument):
        sizing.check_size(wrong)


def test_grown_to_the_limit() -> None:
    """An empty image grows to 64 TiB, with a BAT that is a hole in the file."""
    store = MemStore("big.vhdx")
    create(store, new_disk(GIB), 32 * MIB)
    resize(Crowd(store, [], b"").layers, 64 * TIB)
    layer = VHDX.open(store)
    assert layer.size_bytes == 64 * TIB and not layer.allocated_blocks().any()
    assert store.allocated_bytes() < 3 * MIB


def test_a_large_table_with_a_short_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table grows by more pages than one log entry can hold."""
    monkeypatch.setattr(Journal, "max_pages", property(lambda self: 3))
    store = MemStore("fixed.vhdx")
    create(store, new_disk(MIB), MIB, fixed=True)
    resize(Crowd(store, [], b"").layers, 6000 * MIB)
    assert VHDX.open(store).allocated_blocks().all() and VHDX.check(store) == []
    resize(Crowd(store, [], b"").layers, 5 * MIB)
    assert store.size() == 9 * MIB and VHDX.check(store) == []
    metadata = read_metadata(store)
    raw = store.pread(metadata.regions.bat.file_offset, MIB)
    assert not any(raw[5 * layout.BAT_ENTRY_SIZE :]) and raw[0] == BlockState.FULLY_PRESENT
