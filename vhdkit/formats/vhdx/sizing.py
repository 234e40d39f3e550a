# SPDX-License-Identifier: Apache-2.0
"""A VHDX as `Resizable`: adapts `resize` to the contract of a format.

Decides nothing of its own: where a longer BAT goes, and in which order a size changes, is decided in `resize`.
"""

from __future__ import annotations

from vhdkit.formats.format import Moved, ResizePlan
from vhdkit.formats.vhdx.blocks import VhdxImage
from vhdkit.formats.vhdx.create import check_size
from vhdkit.formats.vhdx.resize import Growth, blocks_after, grow, plan_grow, shrink


class VhdxSizing:
    """See `Resizable`."""

    def __init__(self, image: VhdxImage) -> None:
        self._image = image
        self._growth: Growth | None = None

    def check_size(self, size_bytes: int) -> None:
        """See `Resizable.check_size`."""
        check_size(size_bytes, self._image.sector_bytes)

    def spare_range(self) -> tuple[int, int]:
        """See `Resizable.spare_range`: what follows the blocks is not part of the disk."""
        return 0, 0

    def plan(self, size_bytes: int) -> ResizePlan:
        """See `Resizable.plan`."""
        if size_bytes > self._image.size_bytes:
            self._growth = plan_grow(self._image, size_bytes)
            return ResizePlan(size_bytes)
        return ResizePlan(size_bytes, dropped_block_count=blocks_after(self._image, size_bytes))

    def run(self, plan: ResizePlan, moved: Moved | None = None) -> None:
        """See `Resizable.run`."""
        if self._growth is not None:
            grow(self._image, plan.size_bytes, self._growth)
        else:
            shrink(self._image, plan.size_bytes)
