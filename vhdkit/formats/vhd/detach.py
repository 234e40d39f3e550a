# SPDX-License-Identifier: Apache-2.0
"""Making a child an image without a parent: a dynamic VHD.

Decides what header and footers say then, and that no block is owned in part: other programs ignore the bitmaps of a
dynamic disk, and would show what lies under clear bits. In which order the header changes is decided in `switch`.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from vhdkit import errors
from vhdkit.formats.vhd import layout
from vhdkit.formats.vhd.create import without_parent
from vhdkit.formats.vhd.dynamic import DynamicImage
from vhdkit.formats.vhd.front import write_front


def check_whole(image: DynamicImage) -> None:
    """Raise InvalidArgument if a block that has space is owned in part. Raises IoFailed."""
    for block in np.flatnonzero(image.allocated_blocks()).tolist():
        if image.owned_sectors(block) is not None:
            raise errors.InvalidArgument(
                f"block {block} is owned in part: the rest is read through the parent", path=image.store.name
            )


def detach(image: DynamicImage) -> None:
    """Durably make a differencing image that was opened for writing a dynamic one; see `check_whole`.

    Raises NoSpace, IoFailed, SyncFailed; the image then has its parent, or none. The open image still has
    it: close it.
    """
    header = image.metadata.header
    assert header is not None and image.is_differencing
    footer = replace(image.metadata.footer, disk_type=layout.DISK_TYPE_DYNAMIC)
    write_front(image, without_parent(header), [], footer=footer)
