# SPDX-License-Identifier: Apache-2.0
"""What is wrong with one VHDX file, apart from its parents.

Decides what is an error, a warning or a note. Goes on behind the first error as far as the file can be read.
"""

from __future__ import annotations

from vhdkit.errors import CorruptImage
from vhdkit.finding import Finding, Severity, finding_of
from vhdkit.formats.vhdx import layout
from vhdkit.formats.vhdx.bat import Bat
from vhdkit.formats.vhdx.entries import faults, places, reserved_bits, whole_sizes
from vhdkit.formats.vhdx.header import HeaderState
from vhdkit.formats.vhdx.metadata import Metadata, read_metadata
from vhdkit.formats.vhdx.regions import read_table, table_name, table_state
from vhdkit.store import ReadStore
from vhdkit.units import MIB, format_size


def check_vhdx(store: ReadStore) -> list[Finding]:
    """Everything that can be said about the file. Raises IoFailed."""
    try:
        metadata = read_metadata(store)
    except CorruptImage as error:
        return [finding_of(error, store.name)]
    bat = Bat.load(metadata.view, metadata.regions.bat.file_offset, metadata.shape)
    errors = [finding_of(error, store.name) for error in faults(metadata, bat)]
    reserved = reserved_bits(metadata, bat)
    if reserved is not None:
        errors.append(finding_of(reserved, store.name))
    found = [*metadata.findings, *errors, *_unexpected_bitmaps(metadata, bat), *_headers_differ(metadata)]
    found += _tables_differ(metadata)
    return found if errors else [*found, *_unused_space(metadata, bat)]


def _unexpected_bitmaps(metadata: Metadata, bat: Bat) -> list[Finding]:
    """Sector bitmaps of an image that has none."""
    if metadata.items.has_parent:
        return []
    for numbers, _ in bat.used():
        for number in numbers[numbers % (metadata.shape.ratio + 1) == metadata.shape.ratio][:1].tolist():
            message = "an image without a parent has no sector bitmaps: the image is read without this one"
            offset = metadata.regions.bat.file_offset + number * layout.BAT_ENTRY_SIZE
            structure = metadata.shape.structure(number)
            return [Finding(Severity.WARNING, "bitmap-unexpected", message, metadata.path, structure, offset)]
    return []


def _headers_differ(metadata: Metadata) -> list[Finding]:
    """The other header is intact and has another id for children to record."""
    other = metadata.headers[1 - metadata.current.slot]
    if other.state is not HeaderState.GOOD or other.header.data_write_guid == metadata.header.data_write_guid:
        return []
    message = (
        "its DataWriteGuid is not that of the current header: children that were made while it was current no longer"
        " recognise the image"
    )
    return [Finding(Severity.NOTE, "headers-differ", message, metadata.path, other.structure, other.offset_bytes)]


def _tables_differ(metadata: Metadata) -> list[Finding]:
    tables = [read_table(metadata.view, copy) for copy in range(2)]
    if tables[0] == tables[1] or any(table_state(raw) != "good" for raw in tables):
        return []
    message = "differs from the first one, by which the image is read"
    offset = layout.REGION_TABLE_OFFSETS[1]
    return [Finding(Severity.WARNING, "region-tables-differ", message, metadata.path, table_name(1), offset)]


def _unused_space(metadata: Metadata, bat: Bat) -> list[Finding]:
    """Space of the file that neither blocks nor structures use."""
    numbers, _, _ = places(metadata, bat)
    used = int(whole_sizes(metadata, numbers).sum()) + sum(size for _, _, size in metadata.structures())
    unused = metadata.view.size() - used
    if unused < MIB:
        return []
    message = f"{format_size(unused)} of the file are in no block and no structure"
    return [Finding(Severity.NOTE, "space-unused", message, metadata.path)]
