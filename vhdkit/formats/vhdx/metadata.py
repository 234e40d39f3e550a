# SPDX-License-Identifier: Apache-2.0
"""What a VHDX file says about itself: the current header, the regions, the metadata items and the parent.

Decides whether the structures are possible and consistent, and refuses those that are not. Reads a few pages and needs
no lock, so `info` works on an image in use. Nothing is changed: a log that was not replayed is replayed in memory
(`replay`). The entries of the BAT are examined in `entries`.

    0        1 MiB
    | ids, headers, region tables | log | metadata | BAT | blocks ...        all on mebibytes, in any order
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vhdkit.errors import CorruptImage, CorruptReason
from vhdkit.finding import Finding, Severity
from vhdkit.formats.vhdx import layout
from vhdkit.formats.vhdx.bat import Shape
from vhdkit.formats.vhdx.header import (
    HeaderPlace,
    current_header,
    header_findings,
    read_headers,
)
from vhdkit.formats.vhdx.identify import FILE_IDENTIFIER, has_identifier
from vhdkit.formats.vhdx.items import Items, read_items
from vhdkit.formats.vhdx.layout import Header
from vhdkit.formats.vhdx.locator import parent_ref, parse_locator
from vhdkit.formats.vhdx.regions import Regions, read_regions
from vhdkit.formats.vhdx.replay import Replay, log_place, read_log
from vhdkit.image import ParentRef
from vhdkit.store import ReadStore


@dataclass(frozen=True, slots=True)
class Metadata:
    """Everything in a VHDX except its BAT and blocks. Metadata are read through `view`, a guest's data from the file.

    `locator` has the key-value pairs of the parent locator in stored order.
    """

    path: str
    view: ReadStore
    headers: tuple[HeaderPlace, HeaderPlace]
    current: HeaderPlace
    header: Header
    log: tuple[int, int]  # (offset, size) in bytes
    replay: Replay | None
    regions: Regions
    items: Items
    shape: Shape
    parent: ParentRef | None
    locator: dict[str, str] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()

    @property
    def kind(self) -> str:
        """fixed, dynamic or differencing."""
        if self.items.has_parent:
            return "differencing"
        return "fixed" if self.items.leaves_blocks_allocated else "dynamic"

    @property
    def creator(self) -> str:
        """The program that made the file, as it calls itself."""
        raw = self.view.pread(layout.CREATOR_OFFSET, layout.CREATOR_SIZE)
        return raw.decode("utf-16-le", "replace").split("\0", 1)[0]

    def structures(self) -> list[tuple[str, int, int]]:
        """(name, offset, size) of every structure except blocks, in bytes."""
        places = [("header section", 0, layout.HEADER_SECTION_SIZE), *self.regions.places()]
        return places + ([("log", *self.log)] if self.log[1] else [])


def read_metadata(store: ReadStore) -> Metadata:
    """Read and examine everything except the BAT. Raises CorruptImage, IoFailed."""
    path = store.name
    if not has_identifier(store):
        raise CorruptImage(
            CorruptReason.FILE_IDENTIFIER,
            "the file does not begin with the VHDX signature",
            path=path,
            structure="file type identifier",
            offset_bytes=0,
            expected=FILE_IDENTIFIER,
            found=store.pread(0, len(FILE_IDENTIFIER)),
            hint="if it is a raw disk, say --format raw",
        )
    headers = read_headers(store)
    current = current_header(path, headers)
    log = log_place(store, current)
    replay = read_log(store, current)
    view: ReadStore = store if replay is None else replay.view
    regions = read_regions(view, log)
    items = read_items(view, regions.metadata)
    shape = Shape(items.size_bytes, items.block_size, items.logical_sector_bytes, has_parent=items.has_parent)
    pairs: dict[str, str] = {}
    parent = None
    if items.locator is not None:
        pairs = parse_locator(items.locator.raw, path, items.locator.offset_bytes)
        parent = parent_ref(pairs, path, items.locator.offset_bytes)
    found = [*header_findings(path, headers, current), *regions.findings]
    if replay is not None:
        found.append(_not_replayed(path, replay, log))
    metadata = Metadata(
        path, view, headers, current, current.header, log, replay, regions, items, shape, parent, pairs, tuple(found)
    )
    _check_table_length(metadata)
    return metadata


def _not_replayed(path: str, replay: Replay, log: tuple[int, int]) -> Finding:
    changed = sum(one.size_bytes for one in replay.changes)
    count = len(replay.entries)
    entries, them = ("1 log entry was", "it") if count == 1 else (f"{count} log entries were", "they")
    message = (
        f"{entries} not replayed ({changed} bytes of metadata): the image was not closed, or is in use. It is read as"
        f" if {them} had been; the file is not changed"
    )
    return Finding(Severity.NOTE, "log-not-replayed", message, path, "log", log[0])


def _check_table_length(metadata: Metadata) -> None:
    region, needed = metadata.regions.bat, metadata.shape.entry_count
    if region.length < needed * layout.BAT_ENTRY_SIZE:
        raise CorruptImage(
            CorruptReason.BAT_TOO_SHORT,
            "too few entries for the size of the disk",
            path=metadata.path,
            structure="BAT region",
            offset_bytes=region.file_offset,
            expected=f"at least {needed}",
            found=region.length // layout.BAT_ENTRY_SIZE,
        )
