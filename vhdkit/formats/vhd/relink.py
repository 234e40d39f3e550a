# SPDX-License-Identifier: Apache-2.0
"""Changing the parent's names in a dynamic header.

Decides where the names go: behind everything, with the second header of `switch`, which decides the order.
"""

from __future__ import annotations

from vhdkit.formats.vhd import layout
from vhdkit.formats.vhd.create import ParentLink, linked_header
from vhdkit.formats.vhd.dynamic import DynamicImage
from vhdkit.formats.vhd.switch import second_header_offset, switch_header


def relink(image: DynamicImage, link: ParentLink) -> None:
    """Write `link` into a differencing image that was opened for writing, so both its footers are good.

    Raises InvalidArgument for names that cannot be stored, NoSpace, IoFailed, SyncFailed; the image then has its old
    names or its new ones. The open image still knows the old ones: close it.
    """
    old = image.metadata.header
    assert old is not None
    header, texts, _ = linked_header(old, link, second_header_offset(image) + layout.HEADER_SIZE)
    switch_header(image, header, texts=texts)
