# SPDX-License-Identifier: Apache-2.0
"""A VHD as `Resizable` and `Compactable`: adapts `resize` and `move` to the contract of a format.

Decides nothing of its own: where tables and blocks go is decided in `resize`, `move` and `front`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vhdkit.formats.bits import runs
from vhdkit.formats.draft import DraftStore
from vhdkit.formats.format import CompactPlan, Moved, ResizePlan
from vhdkit.formats.vhd.create import check_size
from vhdkit.formats.vhd.dynamic import DynamicImage
from vhdkit.formats.vhd.fixed import FixedImage
from vhdkit.formats.vhd.front import after_first_block, settle_front
from vhdkit.formats.vhd.layout import FOOTER_SIZE
from vhdkit.formats.vhd.move import Packing, block_space, cut_end, drop_blocks, move_blocks, plan_packing
from vhdkit.formats.vhd.opening import open_dynamic
from vhdkit.formats.vhd.resize import GrowPlan, fixed_writes, grow_dynamic, plan_grow, plan_shrink, shrink_dynamic
from vhdkit.units import sectors_to_bytes, whole_sectors


class DynamicSizing:
    """See `Resizable`, for dynamic and differencing images."""

    def __init__(self, image: DynamicImage) -> None:
        self._image = image
        self._grow: GrowPlan | None = None

    def check_size(self, size_bytes: int) -> None:
        """See `Resizable.check_size`."""
        check_size(size_bytes)

    def spare_range(self) -> tuple[int, int]:
        """See `Resizable.spare_range`: what follows the blocks is not part of the disk."""
        return 0, 0

    def plan(self, size_bytes: int) -> ResizePlan:
        """See `Resizable.plan`."""
        image, space = self._image, block_space(self._image)
        if size_bytes > image.size_bytes:
            self._grow = plan_grow(image, size_bytes)
            count = len(self._grow.packing.blocks)
            return ResizePlan(size_bytes, count, count * space)
        dropped, count, _ = plan_shrink(image, size_bytes)
        return ResizePlan(size_bytes, count, count * space, dropped)

    def run(self, plan: ResizePlan, moved: Moved | None = None) -> None:
        """See `Resizable.run`."""
        if self._grow is not None:
            grow_dynamic(self._image, plan.size_bytes, self._grow, moved)
        else:
            shrink_dynamic(self._image, plan.size_bytes, moved)


class FixedSizing:
    """See `Resizable`, for fixed images: the one footer moves under an undo log."""

    def __init__(self, image: FixedImage) -> None:
        self._image = image

    def check_size(self, size_bytes: int) -> None:
        """See `Resizable.check_size`."""
        check_size(size_bytes, fixed=True)

    def spare_range(self) -> tuple[int, int]:
        """See `Resizable.spare_range`: from the end of the disk to the footer."""
        return self._image.size_bytes, self._image.metadata.tail.offset_bytes

    def plan(self, size_bytes: int) -> ResizePlan:
        """See `Resizable.plan`."""
        writes, file_size_bytes = fixed_writes(self._image.metadata, size_bytes)
        return ResizePlan(size_bytes, writes=tuple(writes), file_size_bytes=file_size_bytes)

    def run(self, plan: ResizePlan, moved: Moved | None = None) -> None:
        """See `Resizable.run`: the plan has writes, which the caller makes."""
        raise AssertionError("the caller makes the writes of a fixed image's plan")


class DynamicPacking:
    """See `Compactable`."""

    def __init__(self, image: DynamicImage) -> None:
        self._image = image
        self._dropped: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self._packing: Packing | None = None

    def blocks(self) -> NDArray[np.int64]:
        """See `Compactable.blocks`."""
        blocks = np.flatnonzero(self._image.allocated_blocks())
        ordered = blocks[np.argsort(self._image.bat.entries[blocks], kind="stable")]
        return np.asarray(ordered, dtype=np.int64)

    def visible_ranges(self, block_index: int) -> list[tuple[int, int]]:
        """See `Compactable.visible_ranges`.

        In a dynamic image, bytes under clear bits count: by the specification they read as zeros, but some programs
        show them. In a differencing image they belong to the parent.
        """
        image = self._image
        inside = min(image.block_size_bytes, image.size_bytes - block_index * image.block_size_bytes)
        owned = image.owned_sectors(block_index) if image.is_differencing else None
        if owned is None:
            return [(0, inside)]
        found = runs(owned[: whole_sectors(inside)])
        return [(sectors_to_bytes(first), sectors_to_bytes(count)) for first, count, is_owned in found if is_owned]

    def owned_as_zeros(self, block_index: int) -> bool:
        """See `Compactable.owned_as_zeros`: a block without space belongs to the parent."""
        return False

    def plan(self, dropped: NDArray[np.int64]) -> CompactPlan:
        """See `Compactable.plan`."""
        image = self._image
        settled = image
        if after_first_block(image.metadata, image.bat):
            settled = _with_front_settled(open_dynamic(DraftStore(image.store), writable=True), dropped)
        packing = plan_packing(image, dropped) if settled is image else plan_packing(settled)
        self._dropped, self._packing = dropped, packing
        moved_bytes = len(packing.blocks) * block_space(image)
        return CompactPlan(dropped, len(packing.blocks), moved_bytes, packing.end_bytes + FOOTER_SIZE)

    def run(self, moved: Moved | None = None) -> None:
        """See `Compactable.run`."""
        assert self._packing is not None
        settled = _with_front_settled(self._image, self._dropped)
        packing = self._packing if settled is self._image else plan_packing(settled)
        move_blocks(settled, packing, moved)
        cut_end(settled, packing.end_bytes)


def _with_front_settled(image: DynamicImage, dropped: NDArray[np.int64]) -> DynamicImage:
    """The image without the dropped blocks, and with header and names before the others."""
    drop_blocks(image, dropped)
    return open_dynamic(image.store, writable=True) if settle_front(image) else image
