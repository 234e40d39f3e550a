# SPDX-License-Identifier: Apache-2.0
"""Changing the parent's names in a dynamic header.

Decides the content of the header; where the names go is decided in `front`, in which order in `switch`.
"""

from __future__ import annotations

from vhdkit.formats.vhd.create import ParentLink, linked_header
from vhdkit.formats.vhd.dynamic import DynamicImage
from vhdkit.formats.vhd.front import write_front


def relink(image: DynamicImage, link: ParentLink) -> None:
    """Write `link` into a differencing image that was opened for writing, so both its footers are good.

    Raises InvalidArgument for names that cannot be stored, NoSpace, IoFailed, SyncFailed; the image then has its old
    names or its new ones. The open image still has the old ones: close it.
    """
    old = image.metadata.header
    assert old is not None
    header, texts, _ = linked_header(old, link, 0)
    write_front(image, header, [(slot, raw) for slot, (_, raw) in enumerate(texts)])
