# SPDX-License-Identifier: Apache-2.0
"""Raw images: the bytes of the disk and nothing else, in a file or on a block device.

As a `Format` it accepts every file, so it is probed last, and knows nothing about it: no id, no parent.
"""

from __future__ import annotations

from collections.abc import Callable

from vhdkit import errors
from vhdkit.finding import Finding, Severity
from vhdkit.formats.draft import DraftStore
from vhdkit.formats.format import (
    Compactable,
    Consent,
    CreateRequest,
    Fix,
    ImageDetails,
    Moved,
    Resizable,
    ResizePlan,
    StructureDump,
    refuse_sector_size,
)
from vhdkit.formats.linear import LinearImage
from vhdkit.image import ImageFacts, Layer, ParentRef
from vhdkit.store import ReadStore, Store
from vhdkit.units import SECTOR_SIZE, round_up

FORMAT_NAME = "raw"
_MAX_RAW_BYTES = 1 << 62  # the system counts a file's bytes in 63 bits


def raw_facts(store: ReadStore) -> ImageFacts:
    """A partial last sector counts as a whole one that ends in zeros. Raises InvalidArgument for an empty file."""
    size = store.size()
    if size == 0:
        raise errors.InvalidArgument("is empty: not a disk image", path=store.name, hint=errors.CUT_SHORT_HINT)
    disk_size = round_up(size, SECTOR_SIZE)
    return ImageFacts(store.name, FORMAT_NAME, FORMAT_NAME, "raw disk", disk_size, disk_size)


def open_raw(store: Store, *, writable: bool = False) -> LinearImage:
    """A raw image over `store`. Raises InvalidArgument for an empty file."""
    return LinearImage(store, raw_facts(store), writable=writable)


def check_raw_size(size_bytes: int) -> None:
    """Raise InvalidArgument for a size that no raw disk can have."""
    if size_bytes <= 0 or size_bytes % SECTOR_SIZE:
        raise errors.InvalidArgument(
            f"a raw disk is one or more whole {SECTOR_SIZE}-byte sectors, not {size_bytes} bytes"
        )
    if size_bytes > _MAX_RAW_BYTES:
        raise errors.InvalidArgument(f"no file can be as large as a raw disk of {size_bytes} bytes")


def create_raw(store: Store, size_bytes: int) -> None:
    """Make `store` a raw image of zeros. `size_bytes` is whole sectors."""
    assert size_bytes > 0 and size_bytes % SECTOR_SIZE == 0
    store.truncate(size_bytes)


def examine_raw(store: ReadStore) -> list[Finding]:
    """The findings of a raw image."""
    size = store.size()
    if size == 0:
        return [Finding(Severity.ERROR, "empty", "is empty: not a disk image", store.name)]
    if size % SECTOR_SIZE:
        message = f"{size} bytes is not a whole number of sectors; the rest of the last one reads as zeros"
        return [Finding(Severity.NOTE, "size-odd", message, store.name)]
    return []


class RawSizing:
    """See `Resizable`: the length of the file changes."""

    def __init__(self, layer: Layer) -> None:
        self._store = layer.store

    def check_size(self, size_bytes: int) -> None:
        """See `Resizable.check_size`."""
        check_raw_size(size_bytes)

    def spare_range(self) -> tuple[int, int]:
        """See `Resizable.spare_range`."""
        return 0, 0

    def plan(self, size_bytes: int) -> ResizePlan:
        """See `Resizable.plan`."""
        return ResizePlan(size_bytes)

    def run(self, plan: ResizePlan, moved: Moved | None = None) -> None:
        """See `Resizable.run`."""
        self._store.truncate(plan.size_bytes)
        self._store.sync()


class RawFormat:
    """See `Format`. A child of a raw disk is a VHD, as raw disks have no children of their own."""

    name = FORMAT_NAME
    title = "raw disk"
    suffixes: tuple[str, ...] = ()
    kinds = (FORMAT_NAME,)
    sector_sizes = (SECTOR_SIZE,)
    size_unit_bytes = SECTOR_SIZE
    larger_child = ""
    child_format = "vhd"
    child_suffix = ".avhd"
    is_plain = True

    def probe(self, store: ReadStore) -> bool:
        """See `Format.probe`."""
        return True

    def refuse_name(self, store: ReadStore) -> None:
        """See `Format.refuse_name`: any name is possible."""

    def facts(self, store: ReadStore) -> ImageFacts:
        """See `Format.facts`."""
        return raw_facts(store)

    def describe(self, store: ReadStore) -> tuple[ImageFacts, ImageDetails]:
        """See `Format.describe`. An empty file is described, too."""
        size = round_up(store.size(), SECTOR_SIZE)
        return ImageFacts(store.name, FORMAT_NAME, FORMAT_NAME, "raw disk", size, size), ImageDetails()

    def file_id(self, store: ReadStore) -> bytes | None:
        """See `Format.file_id`."""
        return None

    def linkage_id(self, store: ReadStore) -> bytes | None:
        """See `Format.linkage_id`."""
        return None

    def renewed_id(self, layer: Layer) -> bytes | None:
        """See `Format.renewed_id`: there is none."""
        return None

    def set_renewed_id(self, layer: Layer, linkage_id: bytes) -> None:
        """See `Format.set_renewed_id`: the id stays."""

    def take_over_disk(self, layer: Layer, disk: Layer, *, dry_run: bool = False) -> None:
        """See `Format.take_over_disk`: nothing else belongs to the disk."""

    def parent_ids(self, store: ReadStore) -> frozenset[bytes]:
        """See `Format.parent_ids`."""
        return frozenset()

    def claimed_parent(self, store: ReadStore) -> tuple[bytes | None, bool]:
        """See `Format.claimed_parent`."""
        return None, True

    def may_be_changing(self, store: ReadStore, file_id: bytes, sizes_bytes: tuple[int, int]) -> bool:
        """See `Format.may_be_changing`: nothing in the file proves that it is not."""
        return True

    def is_torn(self, sector: bytes, before: bytes, after: bytes) -> bool:
        """See `Format.is_torn`: a raw disk has no structures."""
        return False

    def written_at(self, modified_ns: int) -> int:
        """See `Format.written_at`: no raw disk records the time of another file."""
        raise AssertionError("a raw disk has no parent")

    def open(self, store: Store, *, writable: bool = False, ignore_bitmaps: bool = False) -> Layer:
        """See `Format.open`."""
        return open_raw(store, writable=writable)

    def check_block_size(self, block_size_bytes: int) -> None:
        """See `Format.check_block_size`."""

    def check_request(self, request: CreateRequest) -> None:
        """See `Format.check_request`."""
        refuse_sector_size(request, "raw disk")
        check_raw_size(request.size_bytes)

    def create(self, store: Store, request: CreateRequest) -> None:
        """See `Format.create`."""
        create_raw(store, request.size_bytes)
        if request.preallocate:
            store.reserve(0, request.size_bytes)

    def stream_end(self, kind: str, size_bytes: int) -> bytes | None:
        """See `Format.stream_end`."""
        return b""

    def create_child(
        self, store: Store, size_bytes: int, parent: ParentRef, *, block_size_bytes: int, disk: Layer | None = None
    ) -> None:
        """See `Format.create_child`: a raw disk records no parent."""
        raise errors.InvalidArgument("a raw disk cannot have a parent", path=store.name)

    def relink(self, store: Store, parent: ParentRef) -> None:
        """See `Format.relink`: a raw disk records no parent."""
        raise errors.InvalidArgument("a raw disk cannot have a parent", path=store.name)

    def prepare_detach(self, layer: Layer) -> None:
        """See `Format.prepare_detach`: a raw disk has no parent."""
        raise errors.InvalidArgument("a raw disk cannot have a parent", path=layer.store.name)

    def detach(self, store: Store) -> None:
        """See `Format.detach`: a raw disk has no parent."""
        raise errors.InvalidArgument("a raw disk cannot have a parent", path=store.name)

    def check(
        self, store: ReadStore, *, ignore_bitmaps: bool = False, progress: Callable[[int, int], None] | None = None
    ) -> list[Finding]:
        """See `Format.check`."""
        return examine_raw(store)

    def repair(self, draft: DraftStore, consent: Consent) -> list[Fix]:
        """See `Format.repair`: there are no structures."""
        return []

    def settle(self, draft: DraftStore) -> list[Fix]:
        """See `Format.settle`."""
        return []

    def dump(self, store: ReadStore) -> list[StructureDump]:
        """See `Format.dump`."""
        return []

    def refuse_foreign_writer(self, layer: Layer) -> None:
        """See `Format.refuse_foreign_writer`: a raw disk has no place for such a mark."""

    def drop_unreferenced(self, layer: Layer) -> None:
        """See `Format.drop_unreferenced`."""

    def resizable(self, layer: Layer) -> Resizable | None:
        """See `Format.resizable`."""
        return RawSizing(layer)

    def compactable(self, layer: Layer) -> Compactable | None:
        """See `Format.compactable`: there are no blocks."""
        return None


RAW = RawFormat()
