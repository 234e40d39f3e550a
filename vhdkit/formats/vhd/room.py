# SPDX-License-Identifier: Apache-2.0
"""An image on a block device, which does not grow: its trailing footer is always at the device's end.

Decides where that is. New blocks go into the space before it, which may hold data of an earlier use of the device.
"""

from __future__ import annotations

from vhdkit.formats.vhd.layout import FOOTER_SIZE
from vhdkit.store import FileStore, ReadStore
from vhdkit.units import SECTOR_SIZE, round_down


def end_of_room(store: ReadStore) -> int | None:
    """The place of the trailing footer of an image on a device; None for a file, which grows. Raises IoFailed."""
    if not isinstance(store, FileStore) or not store.is_device:
        return None
    return round_down(store.size(), SECTOR_SIZE) - FOOTER_SIZE
