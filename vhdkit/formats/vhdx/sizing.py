# SPDX-License-Identifier: Apache-2.0
"""A VHDX as `Resizable` and `Compactable`: adapts `resize` and `move` to the contract of a format.

Decides nothing of its own: where tables and blocks go, and in which order, is decided in `resize` and `move`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vhdkit.formats.bits import runs
from vhdkit.formats.format import CompactPlan, Moved, ResizePlan
from vhdkit.formats.vhdx.blocks import VhdxImage
from vhdkit.formats.vhdx.create import check_size
from vhdkit.formats.vhdx.move import Packing, carry_out, drop, gone_entries, plan_packing
from vhdkit.formats.vhdx.resize import Growth, gone_after, grow, plan_grow, shrink
from vhdkit.units import sectors_to_bytes, whole_sectors


class VhdxSizing:
    """See `Resizable`."""

    def __init__(self, image: VhdxImage) -> None:
        self._image = image
        self._growth: Growth | None = None

    def check_size(self, size_bytes: int) -> None:
        """See `Resizable.check_size`."""
        check_size(size_bytes, self._image.sector_bytes)

    def spare_range(self) -> tuple[int, int]:
        """See `Resizable.spare_range`: a VHDX has no space of the disk after its blocks."""
        return 0, 0

    def plan(self, size_bytes: int) -> ResizePlan:
        """See `Resizable.plan`."""
        if size_bytes > self._image.size_bytes:
            self._growth = plan_grow(self._image, size_bytes)
            return ResizePlan(size_bytes)
        dropped, packing = gone_after(self._image, size_bytes)
        return ResizePlan(size_bytes, len(packing.entries), int(packing.sizes.sum()), dropped)

    def run(self, plan: ResizePlan, moved: Moved | None = None) -> None:
        """See `Resizable.run`."""
        if self._growth is not None:
            grow(self._image, plan.size_bytes, self._growth)
        else:
            shrink(self._image, plan.size_bytes, moved)


class VhdxPacking:
    """See `Compactable`."""

    def __init__(self, image: VhdxImage) -> None:
        self._image = image
        self._dropped: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self._packing: Packing | None = None

    def blocks(self) -> NDArray[np.int64]:
        """See `Compactable.blocks`."""
        blocks = np.flatnonzero(self._image.allocated_blocks()).astype(np.int64)
        places = np.array([self._image.block_offset(block) for block in blocks.tolist()], dtype=np.int64)
        return np.asarray(blocks[np.argsort(places, kind="stable")], dtype=np.int64)

    def visible_ranges(self, block_index: int) -> list[tuple[int, int]]:
        """See `Compactable.visible_ranges`: bytes under clear bits belong to the parent."""
        image = self._image
        inside = min(image.block_size_bytes, image.size_bytes - block_index * image.block_size_bytes)
        owned = image.owned_sectors(block_index)
        if owned is None:
            return [(0, inside)]
        found = runs(owned[: whole_sectors(inside)])
        return [(sectors_to_bytes(first), sectors_to_bytes(count)) for first, count, is_owned in found if is_owned]

    def owned_as_zeros(self, block_index: int) -> bool:
        """See `Compactable.owned_as_zeros`: a block of a child that is owned as a whole."""
        return self._image.is_differencing and self._image.owned_sectors(block_index) is None

    def plan(self, dropped: NDArray[np.int64]) -> CompactPlan:
        """See `Compactable.plan`."""
        self._dropped = dropped
        self._packing = packing = plan_packing(self._image, gone_entries(self._image, dropped))
        return CompactPlan(dropped, len(packing.entries), int(packing.sizes.sum()), packing.end_bytes)

    def run(self, moved: Moved | None = None) -> None:
        """See `Compactable.run`."""
        assert self._packing is not None
        drop(self._image, self._dropped)
        carry_out(self._image, self._packing, moved)
