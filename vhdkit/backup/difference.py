# SPDX-License-Identifier: Apache-2.0
"""What changed on a disk between two nights, and a disk that shows the change as its allocation.

Decides how the change is found and what counts as one. Must not know servers.

    layers      the images of the later night's chain above the earlier night's image: what they own
    comparison  where the later night's chain does not reach that image (another branch, a new chain): both are read
    all         the earlier night does not have the disk

`ChangedDisk` reads as the later night everywhere. Its extents are DATA, owned by its only layer, where something may
have changed, also to zeros, and ZERO elsewhere: so a client that copies what is allocated copies the change. Written
over a copy of the earlier night, that gives the later one. Past the end of a smaller earlier disk zeros are no change.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from vhdkit.arguments import Size, byte_size
from vhdkit.chain.engine.chain import Chain, Progress
from vhdkit.chain.verbs.compare import different_pieces
from vhdkit.disk import Disk
from vhdkit.image import Extent, ExtentKind, Layer
from vhdkit.units import KIB, PAGE_SIZE, SECTOR_SIZE, covering_sectors, whole_sectors

MAX_RUNS = 1 << 20  # 16 MiB; of more, runs that lie close together are joined
_PAGE_SECTORS = whole_sectors(PAGE_SIZE)
_GAP_SECTORS = whole_sectors(64 * KIB)


class FoundBy(StrEnum):
    """How the change was found."""

    LAYERS = "layers"
    COMPARISON = "comparison"
    ALL = "all"


@dataclass(frozen=True, slots=True)
class NightChange:
    """What may have changed: ascending runs of sectors, apart from each other; where they begin and end."""

    begins: tuple[int, ...]
    ends: tuple[int, ...]
    found_by: FoundBy

    @property
    def size_bytes(self) -> int:
        """How much that is."""
        return (sum(self.ends) - sum(self.begins)) * SECTOR_SIZE


def changed_by_layers(layers: Sequence[Layer], index: int) -> NightChange:
    """The change of the disk with these layers, leaf first, since it read as the layer at `index` with all below it.

    What upper layers own counts, and zeros that hide what was there. Raises IoFailed.
    """
    later, earlier = Chain(layers), Chain(layers[index:])
    end, old_end = whole_sectors(later.size_bytes), whole_sectors(earlier.size_bytes)

    def runs() -> Iterator[tuple[int, int]]:
        before = _Owners(earlier, min(end, old_end))
        for one in later.extents(0, end):
            first, stop = one.sector_index, one.end_sector
            if one.layer_index >= index:
                first = max(first, old_end)  # below the end it is the same sector of the same file
            elif one.layer_index < 0:
                yield from before.owned(first, min(stop, old_end))
                continue
            if stop > first:
                yield first, stop

    return _change(runs(), FoundBy.LAYERS)


class _Owners:
    """Walks once through the extents of a chain."""

    def __init__(self, chain: Chain, end: int) -> None:
        self._extents = chain.extents(0, end)
        self._now: Extent | None = next(self._extents, None)

    def owned(self, first: int, stop: int) -> Iterator[tuple[int, int]]:
        """The parts of a range, later than the last one, that a layer owns."""
        while self._now is not None and first < stop:
            begin, end = self._now.sector_index, self._now.end_sector
            if end > first and self._now.layer_index >= 0 and min(end, stop) > max(begin, first):
                yield max(begin, first), min(end, stop)
            if end >= stop:
                return
            self._now = next(self._extents, None)


def changed_by_comparison(later: Chain, earlier: Chain, progress: Progress | None = None) -> NightChange:
    """The pages that read differently, as far as the later disk goes. Reads both. Raises IoFailed."""
    end = whole_sectors(later.size_bytes)

    def runs() -> Iterator[tuple[int, int]]:
        for first, ours, theirs in different_pieces(later, earlier, progress):
            differs = np.flatnonzero(np.any(ours != theirs, axis=1)) + first
            for page in np.unique(differs // _PAGE_SECTORS).tolist():
                if page * _PAGE_SECTORS < end:
                    yield page * _PAGE_SECTORS, min((page + 1) * _PAGE_SECTORS, end)

    return _change(runs(), FoundBy.COMPARISON)


def all_of(later: Chain) -> NightChange:
    """Everything that the disk has. Raises IoFailed."""
    extents = later.extents(0, whole_sectors(later.size_bytes))
    return _change(
        ((one.sector_index, one.end_sector) for one in extents if one.layer_index >= 0),
        FoundBy.ALL,
    )


def _change(runs: Iterable[tuple[int, int]], found_by: FoundBy) -> NightChange:
    """Runs that touch become one; if there are too many, also those with less than 64 KiB between them, and so on."""
    begins: list[int] = []
    ends: list[int] = []
    gap = 0
    for first, stop in runs:
        if ends and first - ends[-1] <= gap:
            ends[-1] = stop
            continue
        begins.append(first)
        ends.append(stop)
        while len(begins) > MAX_RUNS:
            gap = 2 * gap or _GAP_SECTORS
            begins, ends = _joined(begins, ends, gap)
    return NightChange(tuple(begins), tuple(ends), found_by)


def _joined(begins: list[int], ends: list[int], gap: int) -> tuple[list[int], list[int]]:
    stays = [index for index in range(1, len(begins)) if begins[index] - ends[index - 1] > gap]
    return [begins[0], *(begins[one] for one in stays)], [*(ends[one - 1] for one in stays), ends[-1]]


class ChangedDisk(Disk):
    """A disk of a night, for reading, whose allocation is a change. Its only layer is called `word`."""

    def __init__(self, chain: Chain, change: NightChange, word: str) -> None:
        super().__init__(chain)
        self.writable = False
        self.change, self._word = change, word

    @property
    def layer_ids(self) -> tuple[str | None, ...]:
        """See `Disk.layer_ids`: servers name a context after it."""
        return (self._word,)

    def extents(
        self, offset_bytes: Size = 0, size_bytes: Size | None = None, *, find_holes: bool = False
    ) -> Iterator[Extent]:
        """See `Disk.extents`: what may have changed is DATA of layer 0, everything else ZERO."""
        begin = byte_size("offset_bytes", offset_bytes)
        size = self.size_bytes - begin if size_bytes is None else byte_size("size_bytes", size_bytes)
        self._check_range(begin, size)
        return self._runs(begin // SECTOR_SIZE, covering_sectors(begin + size))

    def _runs(self, position: int, end: int) -> Iterator[Extent]:
        change = self.change
        for number in range(bisect.bisect_right(change.ends, position), len(change.ends)):
            first, stop = max(change.begins[number], position), min(change.ends[number], end)
            if first >= end:
                break
            if first > position:
                yield Extent(position, first - position, ExtentKind.ZERO, -1)
            yield Extent(first, stop - first, ExtentKind.DATA, 0)
            position = stop
        if position < end:
            yield Extent(position, end - position, ExtentKind.ZERO, -1)
