# SPDX-License-Identifier: Apache-2.0
"""VHDX as a `Format`: the one door through which the rest of vhdkit reaches the modules beside this one.

Decides nothing of its own; each method names the module that does. Methods import what they need, because most files
that are probed are not VHDXs, and probing must stay fast.
"""

from __future__ import annotations

from collections.abc import Callable

from vhdkit import errors
from vhdkit.errors import CorruptImage, CorruptReason
from vhdkit.finding import Finding
from vhdkit.formats.draft import DraftStore
from vhdkit.formats.format import (
    Compactable,
    Consent,
    CreateRequest,
    Fix,
    ImageDetails,
    Resizable,
    StructureDump,
)
from vhdkit.formats.vhdx.identify import FORMAT_NAME, has_identifier
from vhdkit.image import NULL_ID, ImageFacts, Layer, ParentRef
from vhdkit.store import ReadStore, Store
from vhdkit.units import PAGE_SIZE, SECTOR_SIZE

_DYNAMIC, _FIXED = "vhdx", "vhdx-fixed"


class VhdxFormat:
    """See `Format`."""

    name = FORMAT_NAME
    title = "VHDX"
    suffixes = (".vhdx", ".avhdx")
    kinds = (_DYNAMIC, _FIXED)
    sector_sizes = (SECTOR_SIZE, PAGE_SIZE)
    size_unit_bytes = PAGE_SIZE  # Windows makes no others; 7-Zip refuses what is not whole KiB
    larger_child = "7-Zip, libvhdi and dissect cannot read a VHDX that is larger than its parent"
    child_format = FORMAT_NAME
    child_suffix = ".avhdx"
    is_plain = False

    # -- what a file is, without opening it ---------------------------------------------------------------------------

    def probe(self, store: ReadStore) -> bool:
        """See `Format.probe`: looks for the file type identifier."""
        return has_identifier(store)

    def refuse_name(self, store: ReadStore) -> None:
        """See `Format.refuse_name`."""
        raise CorruptImage(
            CorruptReason.FILE_IDENTIFIER,
            "the file does not begin with the VHDX signature",
            path=store.name,
            structure="file type identifier",
            offset_bytes=0,
            hint="the file is damaged or not a VHDX: `vhdkit check --repair` searches it for the other structures of a"
            " VHDX; if it is a raw disk, use --format raw",
        )

    def facts(self, store: ReadStore) -> ImageFacts:
        """See `Format.facts`."""
        from vhdkit.formats.vhdx.facts import facts_of
        from vhdkit.formats.vhdx.metadata import read_metadata

        return facts_of(read_metadata(store))

    def describe(self, store: ReadStore) -> tuple[ImageFacts, ImageDetails]:
        """See `Format.describe`."""
        from vhdkit.formats.vhdx.facts import details_of, facts_of
        from vhdkit.formats.vhdx.metadata import read_metadata

        metadata = read_metadata(store)
        return facts_of(metadata), details_of(metadata)

    def file_id(self, store: ReadStore) -> bytes | None:
        """See `Format.file_id`: a VHDX has no id that is permanent and unique in its chain."""
        return None

    def linkage_id(self, store: ReadStore) -> bytes | None:
        """See `Format.linkage_id`: the current header's DataWriteGuid."""
        if not has_identifier(store):
            return None
        from vhdkit.formats.vhdx.header import current_slot, read_headers

        places = read_headers(store)
        slot = current_slot(places)
        return None if slot is None else places[slot].header.data_write_guid

    def renewed_id(self, layer: Layer) -> bytes | None:
        """See `Format.renewed_id`: the DataWriteGuid of this session."""
        from vhdkit.formats.vhdx.blocks import VhdxImage

        assert isinstance(layer, VhdxImage)
        return layer.renewed_id

    def set_renewed_id(self, layer: Layer, linkage_id: bytes) -> None:
        """See `Format.set_renewed_id`: the DataWriteGuid of this session."""
        from vhdkit.formats.vhdx.blocks import VhdxImage

        assert isinstance(layer, VhdxImage)
        layer.set_renewed_id(linkage_id)

    def take_over_disk(self, layer: Layer, disk: Layer, *, dry_run: bool = False) -> None:
        """See `Format.take_over_disk`: the metadata items that are marked as the virtual disk's."""
        from vhdkit.formats.vhdx.adopt import take_over_disk
        from vhdkit.formats.vhdx.blocks import VhdxImage

        assert isinstance(layer, VhdxImage) and isinstance(disk, VhdxImage)
        take_over_disk(layer, disk, dry_run=dry_run)

    def parent_ids(self, store: ReadStore) -> frozenset[bytes]:
        """See `Format.parent_ids`."""
        if not has_identifier(store):
            return frozenset()
        from vhdkit.formats.vhdx.metadata import read_metadata

        try:
            parent = read_metadata(store).parent
        except CorruptImage:
            return frozenset()
        return frozenset() if parent is None else frozenset(parent.linkage_ids)

    def claimed_parent(self, store: ReadStore) -> tuple[bytes | None, bool]:
        """See `Format.claimed_parent`: nothing can be known from damaged metadata."""
        return None, False

    def may_be_changing(self, store: ReadStore, file_id: bytes, sizes_bytes: tuple[int, int]) -> bool:
        """See `Format.may_be_changing`: undo logs of a VHDX carry no id, and change both headers.

        A header's ids are never used again, so the bytes of the headers show whether the log belongs to the file.
        """
        return file_id == NULL_ID

    def is_torn(self, sector: bytes, before: bytes, after: bytes) -> bool:
        """See `Format.is_torn`: the first sector of a header or a region table, whose checksum is wrong."""
        from vhdkit.formats.vhdx.torn import is_torn

        return is_torn(sector, before, after)

    def written_at(self, modified_ns: int) -> int:
        """See `Format.written_at`: a VHDX does not record when its parent was modified."""
        return 0

    # -- opening and making -------------------------------------------------------------------------------------------

    def open(self, store: Store, *, writable: bool = False, ignore_bitmaps: bool = False) -> Layer:
        """See `Format.open`."""
        from vhdkit.formats.vhdx.opening import open_vhdx

        return open_vhdx(store, writable=writable)

    def check_block_size(self, block_size_bytes: int) -> None:
        """See `Format.check_block_size`."""
        from vhdkit.formats.vhdx import create

        create.check_block_size(block_size_bytes)

    def check_request(self, request: CreateRequest) -> None:
        """See `Format.check_request`."""
        from vhdkit.formats.vhdx import create

        if request.preallocate and request.kind not in (_FIXED, "fixed"):
            raise errors.InvalidArgument("only fixed and raw images can be preallocated")
        create.check_sector_size(request.sector_bytes)
        create.check_size(request.size_bytes, request.sector_bytes)
        create.check_block_size(request.block_size_bytes)

    def create(self, store: Store, request: CreateRequest) -> None:
        """See `Format.create`; `kind` may also be the kind in an image's facts."""
        from vhdkit.formats.vhdx import create

        disk = create.new_disk(request.size_bytes, request.sector_bytes)
        fixed = request.kind in (_FIXED, "fixed")
        create.create(store, disk, request.block_size_bytes, fixed=fixed, preallocate=request.preallocate)

    def stream_end(self, kind: str, size_bytes: int) -> bytes | None:
        """See `Format.stream_end`."""
        return None

    def create_child(
        self, store: Store, size_bytes: int, parent: ParentRef, *, block_size_bytes: int, disk: Layer | None = None
    ) -> None:
        """See `Format.create_child`: takes the sector sizes and the disk's id from `disk`."""
        from vhdkit.formats.vhdx import create
        from vhdkit.formats.vhdx.blocks import VhdxImage
        from vhdkit.formats.vhdx.items import inherited, inherited_bytes

        if isinstance(disk, VhdxImage):
            create.check_room(inherited_bytes(disk.metadata.items))
            values = create.resized(inherited(disk.metadata.view, disk.metadata.items), size_bytes)
        else:
            values = create.new_disk(size_bytes)
        create.create(store, values, block_size_bytes, parent=parent)

    def relink(self, store: Store, parent: ParentRef) -> None:
        """See `Format.relink`."""
        from vhdkit.formats.vhdx.opening import open_vhdx
        from vhdkit.formats.vhdx.relink import relink

        relink(open_vhdx(store, writable=True), parent)

    def prepare_detach(self, layer: Layer) -> None:
        """See `Format.prepare_detach`."""
        from vhdkit.formats.vhdx.blocks import VhdxImage
        from vhdkit.formats.vhdx.detach import prepare_detach

        assert isinstance(layer, VhdxImage)
        prepare_detach(layer)

    def detach(self, store: Store) -> None:
        """See `Format.detach`."""
        from vhdkit.formats.vhdx.detach import detach
        from vhdkit.formats.vhdx.opening import open_vhdx

        detach(open_vhdx(store, writable=True))

    # -- looking after ------------------------------------------------------------------------------------------------

    def check(
        self, store: ReadStore, *, ignore_bitmaps: bool = False, progress: Callable[[int, int], None] | None = None
    ) -> list[Finding]:
        """See `Format.check`."""
        from vhdkit.formats.vhdx.check import check_vhdx

        return check_vhdx(store, progress=progress)

    def repair(self, draft: DraftStore, consent: Consent) -> list[Fix]:
        """See `Format.repair`."""
        from vhdkit.formats.vhdx.repair import repair_vhdx

        return repair_vhdx(draft, consent)

    def settle(self, draft: DraftStore) -> list[Fix]:
        """See `Format.settle`: everything is in its usual place."""
        return []

    def dump(self, store: ReadStore) -> list[StructureDump]:
        """See `Format.dump`."""
        from vhdkit.formats.vhdx.dump import dump_vhdx

        return dump_vhdx(store)

    def refuse_foreign_writer(self, layer: Layer) -> None:
        """See `Format.refuse_foreign_writer`: the file does not show whether a program is writing to it."""

    def drop_unreferenced(self, layer: Layer) -> None:
        """See `Format.drop_unreferenced`."""
        from vhdkit.formats.vhdx.blocks import VhdxImage
        from vhdkit.formats.vhdx.entries import end_of_structures
        from vhdkit.formats.vhdx.move import cut_end

        assert isinstance(layer, VhdxImage)
        cut_end(layer, end_of_structures(layer.metadata, layer.bat))

    def resizable(self, layer: Layer) -> Resizable | None:
        """See `Format.resizable`."""
        from vhdkit.formats.vhdx.blocks import VhdxImage
        from vhdkit.formats.vhdx.sizing import VhdxSizing

        assert isinstance(layer, VhdxImage)
        return VhdxSizing(layer)

    def compactable(self, layer: Layer) -> Compactable | None:
        """See `Format.compactable`: a fixed image keeps the space of all its blocks."""
        from vhdkit.formats.vhdx.blocks import VhdxImage
        from vhdkit.formats.vhdx.sizing import VhdxPacking

        assert isinstance(layer, VhdxImage)
        return None if layer.metadata.items.leaves_blocks_allocated else VhdxPacking(layer)


VHDX = VhdxFormat()
