# SPDX-License-Identifier: Apache-2.0
"""The write order, step by step: what is written when, and what a failure leaves. Power cuts: chain/."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness.power import LINK
from tests.harness.stores import MemStore
from tests.harness.vhd_builder import KIB, pattern
from vhdkit.errors import NoSpace, SyncFailed
from vhdkit.folder import NewFile
from vhdkit.formats.probe import open_layer
from vhdkit.formats.vhd import commit
from vhdkit.formats.vhd.create import create_differencing, create_dynamic, create_fixed
from vhdkit.formats.vhd.dynamic import DynamicImage
from vhdkit.formats.vhd.opening import open_dynamic
from vhdkit.image import ExtentKind, Piece
from vhdkit.store import Buffer
from vhdkit.units import MIB, round_up
from vhdkit.unnamed import UnnamedStore

SMALL = 512 * KIB
TABLE = 4096


class Recorder(MemStore):
    """Records every call that changes something; `fail` names one that fails from now on."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int, int]] = []
        self.fail: tuple[str, type[BaseException]] | None = None
        self.fail_after = 0  # calls of that name

    def _note(self, name: str, offset: int = 0, size: int = 0) -> None:
        if self.fail is not None and self.fail[0] == name:
            if not self.fail_after:
                raise self.fail[1]("the device says no")
            self.fail_after -= 1
        self.calls.append((name, offset, size))

    def pwrite(self, offset_bytes: int, data: Buffer) -> None:
        """Recorded."""
        self._note("pwrite", offset_bytes, len(data))
        super().pwrite(offset_bytes, data)

    def reserve(self, offset_bytes: int, size_bytes: int) -> None:
        """Recorded."""
        self._note("reserve", offset_bytes, size_bytes)
        super().reserve(offset_bytes, size_bytes)

    def truncate(self, size_bytes: int) -> None:
        """Recorded."""
        self._note("truncate", size_bytes)
        super().truncate(size_bytes)

    def sync(self) -> None:
        """Recorded."""
        self._note("sync")
        super().sync()


def _open(blocks: int = 4) -> tuple[Recorder, DynamicImage]:
    store = Recorder()
    create_dynamic(store, blocks * SMALL, block_size_bytes=SMALL)
    layer = open_dynamic(store, writable=True)
    store.calls.clear()
    return store, layer


def test_the_order_of_a_first_write_and_its_flush() -> None:
    """INV-DATA-BEFORE-METADATA: size, footer, bitmap, data, where nothing points yet; then sync, BAT, sync."""
    store, layer = _open()
    layer.write(3, memoryview(pattern(512)))
    start = layer.bat.block_start(0)
    data, end = start + 512, start + 512 + SMALL
    size = ("truncate", end + 512, 0)
    assert store.calls == [size, ("pwrite", end, 512), ("pwrite", start, 512), ("pwrite", data + 1536, 512)]
    store.calls.clear()
    layer.flush()
    assert store.calls == [("sync", 0, 0), ("pwrite", TABLE, 16), ("sync", 0, 0)]
    store.calls.clear()
    layer.close()
    assert store.calls == [("sync", 0, 0)]


def test_a_block_that_is_copied_in_is_written_in_the_same_order() -> None:
    """INV-DATA-BEFORE-METADATA: size, footer, bitmap and data, and nothing of it in the flush but the BAT."""
    store, layer = _open()
    source = MemStore()
    source.pwrite(0, pattern(SMALL))
    layer.copy_in([Piece(0, SMALL // 512, source)])
    start = layer.bat.block_start(0)
    data, end = start + 512, start + 512 + SMALL
    size = ("truncate", end + 512, 0)
    assert store.calls == [size, ("pwrite", end, 512), ("pwrite", start, 512), ("pwrite", data, SMALL)]
    store.calls.clear()
    layer.flush()
    assert store.calls == [("sync", 0, 0), ("pwrite", TABLE, 16), ("sync", 0, 0)]
    assert store.pread(start, 128) == b"\xff" * 128 and store.pread(data, SMALL) == pattern(SMALL)


@pytest.mark.parametrize("copies", [False, True])
def test_a_power_cut_leaves_no_file_that_ends_in_data_of_a_guest(copies: bool) -> None:
    """INV-FOOTER-COPY: however much of a new block a file system kept, a footer that the guest put into its data does
    not stand in the place of the image's. File systems keep the order of setting a size and of later writes; a size
    that a write brings about may follow any page of it."""
    fixed = MemStore()
    create_fixed(fixed, MIB)
    store, layer = _open()
    sizes = [store.size()]
    for block in range(2):
        store.calls.clear()
        data = MemStore()
        data.pwrite(0, fixed.pread(MIB, 512) * (SMALL // 512))
        if copies:
            layer.copy_in([Piece(block * SMALL // 512, SMALL // 512, data)])
        else:
            layer.write(block * SMALL // 512, memoryview(data.contents()))
        names = [name for name, _, _ in store.calls]
        floor = store.calls[0][1] if names[0] == "truncate" else sizes[-1]
        sizes += [*range(round_up(floor, 4096), store.size(), 4096), store.size()]
    for size in sizes:
        left = store.copy()
        left.truncate(size)
        assert open_layer(left).facts.kind == "dynamic", size


def test_a_new_file_reserves_a_block_that_is_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is reserved once with its bitmap and its footer, where it is then placed; a block in parts is not."""
    expected: list[tuple[int, int]] = []
    monkeypatch.setattr(UnnamedStore, "expect", lambda self, offset, size: expected.append((offset, size)))
    with NewFile(tmp_path / "new.vhd") as new:
        create_dynamic(new.store, 4 * SMALL, block_size_bytes=SMALL)
        layer = open_dynamic(new.store, writable=True)
        for sector, size in ((0, SMALL), (1024, SMALL - 512), (2048, SMALL)):
            layer.write(sector, memoryview(pattern(size)))
        layer.flush()
        starts = [layer.bat.block_start(block) for block in (0, 2)]
        assert expected == [(start, 512 + SMALL + 512) for start in starts]


def test_after_an_interrupted_write_the_footer_is_written_again_and_synced() -> None:
    """INV-FOOTER-COPY: if an interrupt keeps a block from being placed, closing puts the footer at the end of the
    file, and the last step is a sync that covers it."""
    store, layer = _open()
    layer.write(3, memoryview(pattern(512)))

    def interrupted(size_bytes: int) -> None:
        """Extend the file before Ctrl-C comes, and fail to undo that."""
        if size_bytes < store.size():
            raise KeyboardInterrupt
        MemStore.truncate(store, size_bytes)

    store.truncate = interrupted  # type: ignore[method-assign]
    store.fail = ("pwrite", KeyboardInterrupt)
    store.fail_after = 2
    with pytest.raises(KeyboardInterrupt):
        layer.write(2048, memoryview(pattern(512)))
    store.fail = None
    layer.close()
    assert [name for name, _, _ in store.calls[-2:]] == ["pwrite", "sync"]
    assert store.calls[-2][1] == store.size() - 512
    assert open_dynamic(store).allocated_blocks().tolist() == [True, False, False, False]


def test_rewriting_owned_sectors_writes_no_metadata() -> None:
    """A second write to a block is made in place, and its flush is a single sync."""
    store, layer = _open()
    layer.write(0, memoryview(pattern(512)))
    layer.flush()
    layer.flush()
    store.calls.clear()
    assert layer.write(1, memoryview(pattern(512))) is False
    layer.flush()
    assert [name for name, _, _ in store.calls] == ["pwrite", "sync"]


def test_blocks_are_never_placed_before_the_last_footer() -> None:
    """INV-NO-REUSE, INV-FLUSHED-OR-NEWER: each block begins behind the footer written before it."""
    store, layer = _open()
    end = store.size()
    for block in (3, 1, 0):
        layer.write(block * 1024, memoryview(pattern(512)))
        assert layer.bat.block_start(block) >= end
        layer.flush()
        assert store.pread(store.size() - 512, 8) == b"conectix"
        end = store.size()


@pytest.mark.parametrize("written", [0, 1, 2])
def test_no_space_for_a_new_block_leaves_the_file_unchanged(written: int) -> None:
    """Without space for its footer, its bitmap or its data the file keeps its length, and the next attempt works."""
    store, layer = _open()
    size = store.size()
    store.fail, store.fail_after = ("pwrite", NoSpace), written
    with pytest.raises(NoSpace):
        layer.write(0, memoryview(pattern(512)))
    assert store.size() == size and layer.block_offset(0) == -1
    store.fail = None
    layer.write(0, memoryview(pattern(512)))
    layer.close()
    assert open_dynamic(store).block_offset(0) > 0


def test_no_space_in_a_flush_can_be_tried_again() -> None:
    """Metadata that could not be written stays dirty, and the next flush writes it."""
    store, layer = _open()
    layer.write(0, memoryview(pattern(512)))
    store.fail = ("pwrite", NoSpace)
    with pytest.raises(NoSpace):
        layer.flush()
    assert open_dynamic(store).block_offset(0) == -1
    store.fail = None
    layer.flush()
    again = open_dynamic(store)
    assert again.block_offset(0) == layer.block_offset(0)
    assert [one.kind for one in again.extents(0, 1024)] == [ExtentKind.DATA]


def test_a_failed_sync_is_permanent() -> None:
    """After a failed sync every write and flush is refused: the kernel would report success for lost data."""
    store, layer = _open()
    layer.write(0, memoryview(pattern(512)))
    store.fail = ("sync", SyncFailed)
    with pytest.raises(SyncFailed):
        layer.flush()
    store.fail = None
    store.calls.clear()
    for attempt in (layer.flush, lambda: layer.trim(0, 1), lambda: layer.write(0, memoryview(bytes(512)))):
        with pytest.raises(SyncFailed):
            attempt()
    with pytest.raises(SyncFailed):
        layer.close()
    assert store.calls == []


def test_too_many_dirty_bitmaps_cause_a_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reaching the limit of dirty bitmaps causes a complete flush, at the limit and not before."""
    monkeypatch.setattr(commit, "MAX_DIRTY_BYTES", 3 * 512)
    store = Recorder()
    create_differencing(store, 8 * SMALL, LINK, block_size_bytes=SMALL)
    layer = open_dynamic(store, writable=True)
    store.calls.clear()
    for block in range(3):  # their first bitmaps are written at once
        layer.write(block * 1024, memoryview(pattern(512)))
    for block in range(2):
        layer.write(block * 1024 + 1, memoryview(pattern(512)))
    assert "sync" not in [name for name, _, _ in store.calls]
    layer.write(2 * 1024 + 1, memoryview(pattern(512)))
    assert [name for name, _, _ in store.calls].count("sync") == 2
    again = open_dynamic(store)
    assert again.allocated_blocks().tolist() == [True] * 3 + [False] * 5
    assert [one.kind for one in again.extents(0, 1024)] == [ExtentKind.DATA, ExtentKind.ABSENT]


def test_a_file_that_grew_meanwhile_keeps_its_data() -> None:
    """INV-BLOCKS-DISJOINT: no block is placed over what another program has put behind the end of the file."""
    store, image = _open()
    image.write(0, memoryview(b"a" * 512))
    foreign = store.size()
    store.pwrite(foreign, b"not ours" * 1000)
    image.write(2048, memoryview(b"b" * 512))
    assert store.pread(foreign, 8000) == b"not ours" * 1000
    image.close()


@pytest.mark.parametrize(("pages_before", "good"), [(1, True), (0, False)])
def test_a_file_does_not_grow_past_the_tables_range(pages_before: int, good: bool) -> None:
    """A block that would begin at sector 0xFFFFFFFF, which means "not allocated", is refused; a page before, not."""
    store, _ = _open()
    store.truncate(0xFFFFFFFF * 512 - 1024 - pages_before * 4096)
    layer = open_dynamic(store, writable=True)
    if good:
        layer.write(0, memoryview(pattern(512)))
        assert layer.bat.block_start(0) == 0xFFFFFFFF * 512 - 4096
    with pytest.raises(NoSpace, match="2 TiB"):
        layer.write(1024, memoryview(pattern(512)))
    layer.close()
    assert open_dynamic(store).allocated_blocks().tolist() == [good, False, False, False]
