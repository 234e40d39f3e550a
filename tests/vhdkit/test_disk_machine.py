# SPDX-License-Identifier: Apache-2.0
"""A Hypothesis state machine drives a chain against a model: it grows by snapshots, is reopened, and loses power."""

from __future__ import annotations

import random
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.harness.model import ParsedVhd, SectorModel
from tests.harness.power import LINK, faults_of
from tests.harness.stores import CrashStore, MemStore
from tests.support import daily_or_nightly
from vhdkit.chain.engine.chain import Chain
from vhdkit.disk import Disk, open_disk
from vhdkit.formats.probe import open_layer
from vhdkit.formats.vhd.create import create_differencing, create_dynamic, create_fixed
from vhdkit.formats.vhd.metadata import read_metadata
from vhdkit.formats.vhdx.create import create as create_vhdx
from vhdkit.formats.vhdx.create import new_disk
from vhdkit.formats.vhdx.format import VHDX
from vhdkit.image import NULL_ID, Layer, ParentRef
from vhdkit.units import KIB, MIB, PAGE_SIZE, SECTOR_SIZE, sectors_to_bytes

MAX_DEPTH = 6
BLOCK_SIZES = st.sampled_from([512 * KIB, 1024 * KIB])
SIZES = st.integers(1, 3000).map(sectors_to_bytes)


class DiskMachine(RuleBasedStateMachine):
    """The stores of a chain, leaf first; the leaf's is a `CrashStore`, the others are frozen."""

    ranges = Bundle("ranges")  # drawn once and reused: overlapping requests are the interesting ones

    def __init__(self) -> None:
        super().__init__()
        self.parents: list[MemStore] = []
        self.store = CrashStore(MemStore())
        self.model = SectorModel(b"")
        self.disk: Disk | None = None

    # -- the chain ----------------------------------------------------------------------------------------------

    @initialize(fixed=st.booleans(), size=SIZES, block_size=BLOCK_SIZES)
    def create(self, fixed: bool, size: int, block_size: int) -> None:
        """A base of zeros."""
        base = MemStore("layer0.vhd")
        if fixed:
            create_fixed(base, size)
        else:
            create_dynamic(base, size, block_size_bytes=block_size)
        self.model = SectorModel(bytes(size))
        self._open(base)

    def _open(self, leaf: MemStore) -> None:
        self.store = CrashStore(leaf)
        self.disk = Disk(Chain([open_layer(self.store, writable=True), *self._open_parents()]))

    def _open_parents(self) -> list[Layer]:
        return [open_layer(store) for store in self.parents]

    @property
    def opened(self) -> Disk:
        """The disk, which is open between any two rules."""
        assert self.disk is not None
        return self.disk

    @precondition(lambda self: len(self.parents) < MAX_DEPTH)
    @rule(block_size=BLOCK_SIZES, growth=st.sampled_from([0, 0, 1, 700]))
    def snapshot(self, block_size: int, growth: int) -> None:
        """The leaf becomes a parent; a new child, perhaps larger, takes the writes."""
        self.opened.close()
        parent = self.store.copy(frozen=True)
        footer = read_metadata(parent).footer
        self.parents.insert(0, parent)
        child = MemStore(f"layer{len(self.parents)}.avhd")
        link = replace(
            LINK, unique_id=footer.unique_id, name=parent.name, relative=f".\\{parent.name}", absolute="\\nowhere"
        )
        size = self.model.size_bytes + sectors_to_bytes(growth)
        create_differencing(child, size, link, block_size_bytes=block_size)
        self.model = SectorModel(bytes(self.model.current).ljust(size, b"\0"))
        self._open(child)

    @rule()
    def reopen(self) -> None:
        """Close and open again: everything has been flushed."""
        self.opened.close()
        self.model.flushed()
        self._open(self.store.after_cut(random.Random(0)))

    @rule(seed=st.integers(0, 1 << 16))
    def crash(self, seed: int) -> None:
        """INV-FLUSHED-OR-NEWER: power is cut, and afterwards every sector holds flushed content or newer."""
        self._open(self.store.after_cut(random.Random(seed)))
        found = self.opened.read(0, self.opened.size_bytes)
        wrong = self.model.violations(found)
        assert not wrong, f"INV-FLUSHED-OR-NEWER: sectors {wrong[:5]}"
        self.model.recovered(found)

    @rule()
    def read_through_files(self) -> None:
        """The same chain as real files, opened by the path of its leaf, reads the same."""
        self.opened.flush()
        self.model.flushed()
        with tempfile.TemporaryDirectory() as name:
            for store in (self.store, *self.parents):
                sparse_copy(store, Path(name) / store.name)
            with open_disk(Path(name) / self.store.name) as disk:
                assert len(disk.chain.layers) == 1 + len(self.parents)
                assert disk.read(0, disk.size_bytes) == self.model.current

    # -- requests -----------------------------------------------------------------------------------------------

    @rule(
        target=ranges,
        start=st.floats(0, 1),
        size=st.one_of(st.integers(0, 5000), st.sampled_from([512, 4096, 600_000])),
    )
    def a_range(self, start: float, size: int) -> tuple[int, int]:
        """A range, adjusted to the current size of the disk."""
        return int(start * 3000 * SECTOR_SIZE), size

    def _within(self, drawn: tuple[int, int]) -> tuple[int, int]:
        offset, size = drawn
        assume(offset < self.model.size_bytes)
        return offset, min(size, self.model.size_bytes - offset)

    @rule(drawn=ranges, seed=st.integers(0, 99), fua=st.booleans())
    def write(self, drawn: tuple[int, int], seed: int, fua: bool) -> None:
        """Bytes anywhere."""
        offset, size = self._within(drawn)
        data = random.Random(seed).randbytes(size)
        self.model.write(offset, data)
        at_once = not fua and (  # as a server does first
            self.opened.try_write(offset, memoryview(data)) or self.opened.try_write_parts(offset, memoryview(data))
        )
        if not at_once:
            self.opened.write(offset, data, fua=fua)
        if fua:
            self.model.flushed_range(offset, size)

    @rule(drawn=ranges)
    def zero(self, drawn: tuple[int, int]) -> None:
        """Zeros anywhere."""
        offset, size = self._within(drawn)
        self.model.write(offset, bytes(size))
        self.opened.write_zeroes(offset, size)

    @rule(drawn=ranges)
    def trim(self, drawn: tuple[int, int]) -> None:
        """A trim: afterwards what the leaf owns is zeros, the rest is unchanged."""
        offset, size = self._within(drawn)
        self.model.begin_trim(offset, size)
        self.opened.trim(offset, size)
        self.model.adopt(self.opened.read(0, self.model.size_bytes))

    @rule()
    def flush(self) -> None:
        """From here on the current content survives."""
        self.opened.flush()
        self.model.flushed()

    @rule(drawn=ranges)
    def read(self, drawn: tuple[int, int]) -> None:
        """A part of the disk reads as in the model."""
        offset, size = self._within(drawn)
        expected = self.model.current[offset : offset + size]
        buffer = memoryview(bytearray(size))
        assert not self.opened.try_read_into(offset, buffer) or buffer == expected
        assert self.opened.read(offset, size) == expected

    # Rules, not invariants: reading settles the map, and some requests should meet an unsettled one.

    @rule()
    def read_everything(self) -> None:
        """INV-LEAF-ONLY-WRITES: the disk agrees with the model (and the frozen parents were not written to)."""
        assert self.opened.read(0, self.opened.size_bytes) == self.model.current

    @rule()
    def extents_cover_the_disk(self) -> None:
        """The extents of the whole disk have no gap, and those without an owner are zeros."""
        position = 0
        for extent in self.opened.extents():
            assert extent.offset_bytes == position
            position += extent.size_bytes
            if extent.layer_index < 0:
                assert not any(self.model.current[extent.offset_bytes : extent.offset_bytes + extent.size_bytes])
        assert position == self.model.size_bytes

    def teardown(self) -> None:
        """INV-BLOCKS-DISJOINT: the remaining image is sound."""
        if self.disk is not None:
            self.read_everything()
            self.disk.close()
            if self.parents:
                assert not ParsedVhd.parse(self.store).overlaps(), "INV-BLOCKS-DISJOINT"


class VhdxMachine(DiskMachine):
    """The same over chains of VHDX images, of either sector size."""

    @initialize(
        fixed=st.booleans(),
        size=st.integers(1, 400),
        block_size=st.sampled_from([MIB, 2 * MIB]),
        sector_bytes=st.sampled_from([SECTOR_SIZE, PAGE_SIZE]),
    )
    def create(self, fixed: bool, size: int, block_size: int, sector_bytes: int) -> None:
        """A base of zeros."""
        base, size = MemStore("layer0.vhdx"), size * PAGE_SIZE
        create_vhdx(base, new_disk(size, sector_bytes), block_size, fixed=fixed)
        self.model = SectorModel(bytes(size))
        self._open(base)

    @precondition(lambda self: len(self.parents) < MAX_DEPTH)
    @rule(block_size=st.sampled_from([MIB, 2 * MIB]), growth=st.sampled_from([0, 0, 1, 80]))
    def snapshot(self, block_size: int, growth: int) -> None:
        """The leaf becomes a parent; a new child, perhaps larger, takes the writes."""
        self.opened.close()
        parent = self.store.copy(frozen=True)
        below = open_layer(parent)
        self.parents.insert(0, parent)
        child = MemStore(f"layer{len(self.parents)}.avhdx")
        link = ParentRef.of_paths(
            below.unique_id or NULL_ID, 0, relative=f".\\{parent.name}", absolute="\\nowhere", name=parent.name
        )
        size = self.model.size_bytes + growth * PAGE_SIZE
        VHDX.create_child(child, size, link, block_size_bytes=block_size, disk=below)
        self.model = SectorModel(bytes(self.model.current).ljust(size, b"\0"))
        self._open(child)

    def teardown(self) -> None:
        """The remaining image is sound."""
        if self.disk is not None:
            self.read_everything()
            self.disk.close()
            assert not faults_of(self.store.copy())


def sparse_copy(store: MemStore, path: Path) -> None:
    """The store as a real file, holes as holes."""
    with path.open("wb") as file:
        for offset, size, is_data in store.data_runs(0, store.size()):
            if is_data:
                file.seek(offset)
                file.write(store.pread(offset, size))
        file.truncate(store.size())


@pytest.mark.searched
def test_a_chain_behaves_as_a_bytearray() -> None:
    """INV-FLUSHED-OR-NEWER, INV-LEAF-ONLY-WRITES, INV-SECTOR-RULE: whatever is done to a chain, through snapshots,
    reopening and power cuts, it agrees with the model."""
    run_state_machine_as_test(DiskMachine, settings=settings(max_examples=80, stateful_step_count=30))


@pytest.mark.searched
def test_a_chain_of_vhdx_behaves_as_a_bytearray() -> None:
    """The same over VHDX: INV-LOG-WHOLE, INV-HEADER-PAIR, and zeros without space."""
    settings_ = settings(max_examples=daily_or_nightly(12, 80), stateful_step_count=30)
    run_state_machine_as_test(VhdxMachine, settings=settings_)
