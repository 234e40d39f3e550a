# SPDX-License-Identifier: Apache-2.0
"""VHD as a `Format`: the only module of this folder that the rest of vhdkit uses.

Decides nothing of its own; each method names the module that does. Modules that only a few verbs need are imported by
the methods that use them: `info` starts without the modules that write, check and repair.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

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
    refuse_sector_size,
)
from vhdkit.formats.vhd import layout
from vhdkit.formats.vhd.bat import Bat
from vhdkit.formats.vhd.dynamic import DynamicImage
from vhdkit.formats.vhd.facts import FORMAT_NAME, details_of, facts_of
from vhdkit.formats.vhd.fixed import FixedImage, open_fixed
from vhdkit.formats.vhd.footers import FooterState, footer_state, image_id, looks_like_vhd, read_footers
from vhdkit.formats.vhd.metadata import read_metadata
from vhdkit.formats.vhd.opening import open_dynamic
from vhdkit.formats.vhd.peek import parent_ids
from vhdkit.formats.vhd.places import end_of_structures
from vhdkit.image import NULL_ID, ImageFacts, Layer, ParentRef
from vhdkit.store import ReadStore, Store
from vhdkit.units import SECTOR_SIZE

if TYPE_CHECKING:
    from vhdkit.formats.vhd import create

_FIXED, _DYNAMIC = "fixed", "dynamic"
_NANOSECONDS = 1_000_000_000


class VhdFormat:
    """See `Format`."""

    name = FORMAT_NAME
    title = "VHD"
    suffixes = (".vhd", ".avhd")
    kinds = (_FIXED, _DYNAMIC)
    sector_sizes = (SECTOR_SIZE,)
    size_unit_bytes = SECTOR_SIZE
    larger_child = "Hyper-V does not open a VHD that is larger than its parent"
    child_format = FORMAT_NAME
    child_suffix = ".avhd"
    is_plain = False

    # -- what a file is, without opening it ---------------------------------------------------------------------------

    def probe(self, store: ReadStore) -> bool:
        """See `Format.probe`: a footer, good or damaged, at either place."""
        return looks_like_vhd(store)

    def refuse_name(self, store: ReadStore) -> None:
        """See `Format.refuse_name`."""
        tail, _ = read_footers(store)
        killed = tail.state is FooterState.KILLED
        raise CorruptImage(
            CorruptReason.NO_FOOTER,
            "the file has no VHD footer at its end or at its beginning"
            + (f" (the end was {tail.state})" if killed else ""),
            path=store.name,
            structure=tail.structure,
            offset_bytes=tail.offset_bytes,
            hint="the file is truncated or is not a VHD; if it is a raw disk, add --format raw",
        )

    def facts(self, store: ReadStore) -> ImageFacts:
        """See `Format.facts`."""
        return facts_of(read_metadata(store))

    def describe(self, store: ReadStore) -> tuple[ImageFacts, ImageDetails]:
        """See `Format.describe`."""
        metadata = read_metadata(store)
        return facts_of(metadata), details_of(store, metadata)

    def file_id(self, store: ReadStore) -> bytes | None:
        """See `Format.file_id`: the unique id of the first good footer."""
        found = image_id(store)
        return found if found != NULL_ID else None

    def linkage_id(self, store: ReadStore) -> bytes | None:
        """See `Format.linkage_id`: the same id."""
        return self.file_id(store)

    def renewed_id(self, layer: Layer) -> bytes | None:
        """See `Format.renewed_id`: the unique id stays."""
        return None

    def set_renewed_id(self, layer: Layer, linkage_id: bytes) -> None:
        """See `Format.set_renewed_id`: the id stays."""

    def take_over_disk(self, layer: Layer, disk: Layer, *, dry_run: bool = False) -> None:
        """See `Format.take_over_disk`: nothing else belongs to the disk."""

    def parent_ids(self, store: ReadStore) -> frozenset[bytes]:
        """See `Format.parent_ids`."""
        return parent_ids(store)

    def claimed_parent(self, store: ReadStore) -> tuple[bytes | None, bool]:
        """See `Format.claimed_parent`: by what is in the usual place of a dynamic header."""
        raw = store.pread(layout.FOOTER_SIZE, layout.HEADER_SIZE)
        if len(raw) < layout.HEADER_SIZE or not raw.startswith(layout.HEADER_COOKIE):
            return None, False
        parent_id = layout.parse_header(raw).parent_unique_id
        return (parent_id, True) if any(parent_id) else (None, True)

    def may_be_changing(self, store: ReadStore, file_id: bytes, sizes_bytes: tuple[int, int]) -> bool:
        """See `Format.may_be_changing`: a file with a whole trailing footer is not in the middle of a change."""
        tail, _ = read_footers(store)  # what is at offset 0 may be a guest's
        size = store.size()
        # A footer before zeros is the old one of a fixed image, in a file whose change is under way.
        is_last = tail.state.usable and tail.offset_bytes + len(tail.raw) == size
        return not is_last or (tail.footer.unique_id == file_id and size in sizes_bytes)

    def is_torn(self, sector: bytes, before: bytes, after: bytes) -> bool:
        """See `Format.is_torn`: where a footer is written, anything that is not a good footer."""
        has_footer = before.startswith(layout.FOOTER_COOKIE) or after.startswith(layout.FOOTER_COOKIE)
        return has_footer and len(sector) == layout.FOOTER_SIZE and not footer_state(sector).usable

    def written_at(self, modified_ns: int) -> int:
        """See `Format.written_at`."""
        return modified_ns // _NANOSECONDS - layout.EPOCH_UNIX_SECONDS

    # -- opening and making -------------------------------------------------------------------------------------------

    def open(self, store: Store, *, writable: bool = False, ignore_bitmaps: bool = False) -> Layer:
        """See `Format.open`."""
        if read_metadata(store).footer.disk_type == layout.DISK_TYPE_FIXED:
            return open_fixed(store, writable=writable)
        return open_dynamic(store, writable=writable, ignore_bitmaps=ignore_bitmaps)

    def check_block_size(self, block_size_bytes: int) -> None:
        """See `Format.check_block_size`."""
        from vhdkit.formats.vhd import create

        create.check_block_size(block_size_bytes)

    def check_request(self, request: CreateRequest) -> None:
        """See `Format.check_request`."""
        from vhdkit.formats.vhd import create

        refuse_sector_size(request, "VHD")
        if request.preallocate and request.kind != _FIXED:
            raise errors.InvalidArgument("only fixed and raw images can be preallocated")
        create.check_size(request.size_bytes, fixed=request.kind == _FIXED)
        create.check_block_size(request.block_size_bytes)

    def create(self, store: Store, request: CreateRequest) -> None:
        """See `Format.create`."""
        from vhdkit.formats.vhd import create

        if request.kind == _FIXED:
            create.create_fixed(store, request.size_bytes, preallocate=request.preallocate)
        else:
            create.create_dynamic(store, request.size_bytes, block_size_bytes=request.block_size_bytes)

    def stream_end(self, kind: str, size_bytes: int) -> bytes | None:
        """See `Format.stream_end`: the footer of a fixed image."""
        from vhdkit.formats.vhd import create

        if kind != _FIXED:
            return None
        return layout.build_footer(create.new_footer(layout.DISK_TYPE_FIXED, size_bytes))

    def create_child(
        self, store: Store, size_bytes: int, parent: ParentRef, *, block_size_bytes: int, disk: Layer | None = None
    ) -> None:
        """See `Format.create_child`."""
        from vhdkit.formats.vhd import create

        create.create_differencing(store, size_bytes, _link_of(parent), block_size_bytes=block_size_bytes)

    def relink(self, store: Store, parent: ParentRef) -> None:
        """See `Format.relink`."""
        from vhdkit.formats.vhd.relink import relink

        relink(open_dynamic(store, writable=True), _link_of(parent))

    def prepare_detach(self, layer: Layer) -> None:
        """See `Format.prepare_detach`."""
        from vhdkit.formats.vhd.detach import check_whole

        assert isinstance(layer, DynamicImage)
        check_whole(layer)

    def detach(self, store: Store) -> None:
        """See `Format.detach`: the image becomes a dynamic one."""
        from vhdkit.formats.vhd.detach import detach

        detach(open_dynamic(store, writable=True))

    # -- maintenance --------------------------------------------------------------------------------------------------

    def check(
        self, store: ReadStore, *, ignore_bitmaps: bool = False, progress: Callable[[int, int], None] | None = None
    ) -> list[Finding]:
        """See `Format.check`."""
        from vhdkit.formats.vhd.check import check_vhd

        return check_vhd(store, ignore_bitmaps=ignore_bitmaps, progress=progress)

    def repair(self, draft: DraftStore, consent: Consent) -> list[Fix]:
        """See `Format.repair`."""
        from vhdkit.formats.vhd.repair import repair_vhd

        return repair_vhd(draft, consent)

    def settle(self, draft: DraftStore) -> list[Fix]:
        """See `Format.settle`: moves the header and the parent's names if they lie after blocks."""
        from vhdkit.formats.vhd.front import after_first_block, settle_front

        try:
            metadata = read_metadata(draft)
            if metadata.header is None:
                return []
            bat = Bat.load(draft, metadata.header.table_offset, metadata.block_count)
            if not after_first_block(metadata, bat) or not settle_front(open_dynamic(draft, writable=True)):
                return []
        except (errors.CorruptImage, errors.ImageInUse):  # something else is wrong with it and was not repaired
            return []
        message = "moved the header and the names of the parent from after the first block to before it"
        return [Fix("behind-blocks", message)]

    def dump(self, store: ReadStore) -> list[StructureDump]:
        """See `Format.dump`."""
        from vhdkit.formats.vhd.dump import dump_vhd

        return dump_vhd(store)

    def refuse_foreign_writer(self, layer: Layer) -> None:
        """See `Format.refuse_foreign_writer`: other programs replace the footer while they write to the image."""
        assert isinstance(layer, DynamicImage | FixedImage)
        for place in (layer.metadata.tail, layer.metadata.copy):
            if place is not None and place.state in (FooterState.KILLED, FooterState.POISONED):
                raise errors.ImageInUse(
                    str(place.state),
                    path=layer.store.name,
                    structure=place.structure,
                    hint="close it there; if that program has died, see `vhdkit check --repair --help`",
                )

    def drop_unreferenced(self, layer: Layer) -> None:
        """See `Format.drop_unreferenced`."""
        from vhdkit.formats.vhd.move import cut_end

        if isinstance(layer, DynamicImage):
            cut_end(layer, end_of_structures(layer.metadata, layer.bat))

    def resizable(self, layer: Layer) -> Resizable | None:
        """See `Format.resizable`."""
        from vhdkit.formats.vhd.sizing import DynamicSizing, FixedSizing

        if isinstance(layer, DynamicImage):
            return DynamicSizing(layer)
        assert isinstance(layer, FixedImage)
        return FixedSizing(layer)

    def compactable(self, layer: Layer) -> Compactable | None:
        """See `Format.compactable`."""
        from vhdkit.formats.vhd.sizing import DynamicPacking

        assert isinstance(layer, DynamicImage)
        return DynamicPacking(layer)


def _link_of(parent: ParentRef) -> create.ParentLink:
    """What a header and its locators record of a parent whose names come from `ParentRef.of_paths`."""
    from vhdkit.formats.vhd import create

    relative, absolute, name = parent.names
    return create.ParentLink(parent.linkage_id, parent.timestamp, name.text, relative.text, absolute.text)


VHD = VhdFormat()
