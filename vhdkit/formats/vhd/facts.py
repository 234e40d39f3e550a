# SPDX-License-Identifier: Apache-2.0
"""A VHD's facts in the form that all formats share.

Decides which of a child's names for its parent is tried first, and what counts as one. Reads nothing: it is given the
`Metadata` of a file. Must not know where a name leads on this machine.
"""

from __future__ import annotations

import numpy as np

from vhdkit.formats.format import ImageDetails
from vhdkit.formats.vhd import geometry, layout
from vhdkit.formats.vhd.bat import Bat
from vhdkit.formats.vhd.locator import ABSOLUTE, MAC, OLD_ABSOLUTE, OLD_RELATIVE, RELATIVE
from vhdkit.formats.vhd.metadata import Metadata
from vhdkit.image import NULL_ID, ImageFacts, NameDialect, ParentName, ParentRef
from vhdkit.store import ReadStore

FORMAT_NAME = "vhd"
_LOCATOR_ORDER = (RELATIVE, ABSOLUTE, MAC, OLD_RELATIVE, OLD_ABSOLUTE)


def facts_of(metadata: Metadata) -> ImageFacts:
    """The image's metadata."""
    footer, header = metadata.footer, metadata.header
    return ImageFacts(
        path=metadata.path,
        format_name=FORMAT_NAME,
        kind=metadata.kind,
        title=f"{metadata.kind} VHD",
        size_bytes=metadata.size_bytes,
        made_size_bytes=footer.original_size,
        block_size_bytes=header.block_size if header is not None else 0,
        file_id=footer.unique_id,
        linkage_id=footer.unique_id,
        timestamp=footer.timestamp,
        parent=_parent_of(metadata) if metadata.is_differencing else None,
        findings=metadata.findings,
    )


def _parent_of(metadata: Metadata) -> ParentRef:
    """The parent of a differencing image. XenServer records an id of zeros for a raw one."""
    header = metadata.header
    assert header is not None
    known = [one for one in metadata.locators if one.platform_code in _LOCATOR_ORDER and one.text]
    known.sort(key=lambda locator: _LOCATOR_ORDER.index(locator.platform_code))
    names = [ParentName(one.structure, one.text or "") for one in known]
    if metadata.parent_name:
        names.append(ParentName("parent name", metadata.parent_name, NameDialect.NAME))
    return ParentRef(
        linkage_ids=() if header.parent_unique_id == NULL_ID else (header.parent_unique_id,),
        timestamp=header.parent_timestamp,
        names=tuple(names),
        is_whole=all(one.fault is None for one in metadata.locators),
    )


def details_of(store: ReadStore, metadata: Metadata) -> ImageDetails:
    """The further details that `info` shows; reads the BAT. Raises IoFailed."""
    footer, header = metadata.footer, metadata.header
    allocated = None
    if header is not None:
        bat = Bat.load(store, header.table_offset, metadata.block_count)
        allocated = int(np.count_nonzero(bat.allocated()))
    return ImageDetails(
        creator=footer.creator_application.decode("latin-1").rstrip("\0 "),
        creator_version=f"{footer.creator_version >> 16}.{footer.creator_version & 0xFFFF}",
        creator_host=footer.creator_host_os.decode("latin-1").rstrip("\0 "),
        created_unix_seconds=footer.timestamp + layout.EPOCH_UNIX_SECONDS,
        geometry=geometry.footer_geometry(footer),
        current_size_bytes=footer.current_size,
        original_size_bytes=footer.original_size,
        size_from_geometry=geometry.size_is_chs(footer),
        saved_state=bool(footer.saved_state),
        hidden=bool(footer.hidden),
        block_size_bytes=header.block_size if header else None,
        block_count=metadata.block_count if header else None,
        allocated_block_count=allocated,
        batmap=metadata.batmap is not None,
        parent_name=metadata.parent_name,
        parent_locators=tuple((one.platform_code.decode("latin-1"), one.text) for one in metadata.locators),
    )
