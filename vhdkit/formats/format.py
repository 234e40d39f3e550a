# SPDX-License-Identifier: Apache-2.0
"""The whole contract of a format: everything that a chain may ask for, so that no module above knows any format.

A format is one object with the methods of `Format`, listed in `formats.FORMATS`; its open images are `image.Layer`s,
whose `format_name` leads back to it (`formats.of`). What only some formats can do is a protocol of its own, which the
format hands out for an open layer, or None: `Resizable`, `Compactable`.

Who checks what: a format refuses what contradicts its own rules (`CorruptImage`, `InvalidArgument`), and nothing else.
Where files lie, which file is a parent, locks, undo logs and records belong to `chain`; a format is given a store and
never looks beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from vhdkit import errors
from vhdkit.finding import Finding
from vhdkit.formats.draft import DraftStore
from vhdkit.image import ImageFacts, Layer, ParentRef
from vhdkit.store import ReadStore, Store
from vhdkit.units import MIB, SECTOR_SIZE, round_up

DEFAULT_BLOCK_SIZE = 2 * MIB
Moved = Callable[[int], None]  # called with the bytes that were moved since the last call


@dataclass(frozen=True, slots=True)
class CreateRequest:
    """A new image: its virtual size, which of the format's `kinds`, its unit of allocation where it has one.

    `sector_bytes` is the logical sector size, of which most formats have only one. `preallocate` reserves the space of
    an image whose sectors lie one after the other.
    """

    size_bytes: int
    kind: str
    block_size_bytes: int = DEFAULT_BLOCK_SIZE
    preallocate: bool = False
    sector_bytes: int = SECTOR_SIZE


def refuse_sector_size(request: CreateRequest, title: str) -> None:
    """Raise InvalidArgument for sectors of another size than a format with only one has."""
    if request.sector_bytes != SECTOR_SIZE:
        raise errors.InvalidArgument(
            f"a {title} has sectors of {SECTOR_SIZE} bytes, not {request.sector_bytes}: only a VHDX can have others"
        )


@dataclass(frozen=True, slots=True)
class ImageDetails:
    """What `info` shows beside the facts; fields that the format does not have are None.

    `parent_name` and `parent_locators`, (label, text or None), are the parent's names as they are stored.
    """

    creator: str | None = None
    creator_version: str | None = None
    creator_host: str | None = None
    created_unix_seconds: int | None = None
    geometry: tuple[int, int, int] | None = None
    current_size_bytes: int | None = None
    original_size_bytes: int | None = None
    size_from_geometry: bool = False
    saved_state: bool = False
    hidden: bool = False
    block_size_bytes: int | None = None
    block_count: int | None = None
    allocated_block_count: int | None = None
    batmap: bool = False
    parent_name: str = ""
    parent_locators: tuple[tuple[str, str | None], ...] = ()
    logical_sector_bytes: int | None = None
    physical_sector_bytes: int | None = None
    virtual_disk_id: str | None = None
    log_entries: int | None = None  # that were not replayed


@dataclass(frozen=True, slots=True)
class FieldValue:
    """One field: where it lies in the file, and its value as text."""

    name: str
    offset_bytes: int
    size_bytes: int
    value: str


@dataclass(frozen=True, slots=True)
class StructureDump:
    """One structure as it is stored in the file; `state` says whether it is valid."""

    structure: str
    offset_bytes: int
    state: str
    fields: tuple[FieldValue, ...]


@dataclass(frozen=True, slots=True)
class Consent:
    """What the user allows a repair to do beyond what is certain."""

    data_loss: bool = False
    writer_is_dead: bool = False


class ByteRange(NamedTuple):
    """A range of a disk."""

    offset_bytes: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Fix:
    """One problem that is fixed, or would be: `needs` is the missing consent, None if it was fixed.

    `lost` are the ranges of the disk whose content is dropped, `doubtful` those whose content may belong elsewhere.
    """

    code: str
    message: str
    needs: str | None = None
    lost: tuple[ByteRange, ...] = ()
    doubtful: tuple[ByteRange, ...] = ()


@dataclass(frozen=True, slots=True)
class ResizePlan:
    """How to change an image's virtual size; sizes in bytes.

    `writes`, (offset, bytes), and `file_size_bytes` are for an image that cannot be changed safely by any order of
    writes: the caller makes the change under an undo log. With `writes` None, `Resizable.run` makes the change itself.
    """

    size_bytes: int
    moved_block_count: int = 0
    moved_bytes: int = 0
    dropped_block_count: int = 0
    writes: tuple[tuple[int, bytes], ...] | None = None
    file_size_bytes: int | None = None


class Resizable(Protocol):
    """An open layer whose virtual size can change. One plan, then one run; close the layer afterwards."""

    def check_size(self, size_bytes: int) -> None:
        """Raise InvalidArgument for a size that the image cannot have."""
        ...

    def spare_range(self) -> tuple[int, int]:
        """(start, end) in the file of what follows the disk and would become a part of it; equal if nothing does."""
        ...

    def plan(self, size_bytes: int) -> ResizePlan:
        """What the change requires. Nothing changes yet. Raises NoSpace, InvalidArgument."""
        ...

    def run(self, plan: ResizePlan, moved: Moved | None = None) -> None:
        """Make the change, durable when this returns: the disk has its old size, with every byte, or the new one.

        The caller ensures that nothing of value lies after a new, smaller end. Only for a plan without `writes`.
        Raises NoSpace, IoFailed, SyncFailed.
        """
        ...


@dataclass(frozen=True, slots=True)
class CompactPlan:
    """What compacting would do: the blocks to drop, how many others move, and where the file ends afterwards."""

    dropped: NDArray[np.int64]
    moved_block_count: int
    moved_bytes: int
    file_end_bytes: int


class Compactable(Protocol):
    """An open layer with blocks whose file can become smaller. One plan, then one run."""

    def blocks(self) -> NDArray[np.int64]:
        """The allocated blocks in the order in which they lie in the file."""
        ...

    def visible_ranges(self, block_index: int) -> list[tuple[int, int]]:
        """(first byte in the block, size) of the parts of an allocated block that any program may read."""
        ...

    def owned_as_zeros(self, block_index: int) -> bool:
        """True if this allocated block, once it is dropped, is still owned whole, as zeros without space."""
        ...

    def plan(self, dropped: NDArray[np.int64]) -> CompactPlan:
        """Where the other blocks go when these are dropped. Nothing changes yet."""
        ...

    def run(self, moved: Moved | None = None) -> None:
        """Carry out the plan, durable when this returns; after an interruption every block is whole.

        Raises NoSpace, IoFailed, SyncFailed.
        """
        ...


class Format(Protocol):
    """One image format. All methods accept any store; only the layer that `open` returns keeps it.

    `name` is the name in options and records. `title` is what messages call an image of the format. `suffixes` are
    file suffixes in lower case, `kinds` what `create` can make, `sector_sizes` the logical sector sizes that an image
    can have, in bytes. The size of a new disk is a multiple of `size_unit_bytes`. `larger_child` says which programs
    cannot use a child that is larger than its parent. A child of such an image is of the format `child_format` and by
    default has the suffix `child_suffix`. A format `is_plain` when its images have no structures of their own, so any
    file can be opened as one: it has no ids, and nothing in it can be checked, repaired or shown.
    """

    @property
    def name(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def suffixes(self) -> tuple[str, ...]: ...
    @property
    def kinds(self) -> tuple[str, ...]: ...
    @property
    def sector_sizes(self) -> tuple[int, ...]: ...
    @property
    def size_unit_bytes(self) -> int: ...
    @property
    def larger_child(self) -> str: ...
    @property
    def child_format(self) -> str: ...
    @property
    def child_suffix(self) -> str: ...
    @property
    def is_plain(self) -> bool: ...

    # -- what a file is, without opening it -----------------------------------------------------------------------

    def probe(self, store: ReadStore) -> bool:
        """True for a file that is an image of this format, sound or damaged. Raises IoFailed."""
        ...

    def refuse_name(self, store: ReadStore) -> None:
        """Raise CorruptImage for a file with the name of such an image that no format recognised."""
        ...

    def facts(self, store: ReadStore) -> ImageFacts:
        """The file's metadata, with a few reads. Raises CorruptImage, InvalidArgument, IoFailed."""
        ...

    def describe(self, store: ReadStore) -> tuple[ImageFacts, ImageDetails]:
        """The facts, and what else `info` shows; may read whole tables. Raises as `facts` does."""
        ...

    def file_id(self, store: ReadStore) -> bytes | None:
        """The identity of the file, `ID_BYTES` long, which never changes during its life; None without one."""
        ...

    def linkage_id(self, store: ReadStore) -> bytes | None:
        """The id that children record of it, `ID_BYTES` long; None if it has none."""
        ...

    def renewed_id(self, layer: Layer) -> bytes | None:
        """The linkage id that the open, writable layer gets with its next write of content; None if it stays as it is.

        A format may change the id with the first write of each session, because what children see through the image
        changes; from then on `Layer.unique_id` is the new one. Children of such a format record several ids
        (`ParentRef.linkage_ids`) and `relink` writes them, also for a child that is open for writing through the same
        store, as long as nothing of that layer is unflushed and no write is under way.
        """
        ...

    def set_renewed_id(self, layer: Layer, linkage_id: bytes) -> None:
        """Let the next write of content through the open, writable layer bring this id, which `renewed_id` returns.

        For a change that was recorded with this id, and for one that continues such a change: the layer may have the
        id already. Does nothing in a format whose ids stay.
        """
        ...

    def take_over_disk(self, layer: Layer, disk: Layer, *, dry_run: bool = False) -> None:
        """Let the open, writable layer show the virtual disk of `disk`: take over what belongs to that disk.

        For merges: `disk` is an image of the same format that is merged into the layer. Everything written is flushed
        first, and the change is durable when this returns. What a guest reads, and the size, stay as they are. With
        `dry_run` nothing changes, and only InvalidArgument is raised.
        Raises InvalidArgument if there is not enough room, NoSpace, IoFailed, SyncFailed.
        """
        ...

    def parent_ids(self, store: ReadStore) -> frozenset[bytes]:
        """The ids that the file may record for its parent, `NULL_ID` for a raw one, found with few reads.

        Every id that `facts` could find is among them; empty for an image without a parent. Raises IoFailed.
        """
        ...

    def claimed_parent(self, store: ReadStore) -> tuple[bytes | None, bool]:
        """For a damaged image: the parent id in a structure that cannot be trusted, and whether there is a structure.

        Enough to keep what the image may need. (None, True) is an image that claims to have no parent.
        """
        ...

    def may_be_changing(self, store: ReadStore, file_id: bytes, sizes_bytes: tuple[int, int]) -> bool:
        """False when the file cannot be the image `file_id` in the middle of a change between these file sizes.

        For undo logs: False if the file is certainly whole, and is another image or has neither size.
        """
        ...

    def is_torn(self, sector: bytes, before: bytes, after: bytes) -> bool:
        """For undo logs: True if a power cut may leave `sector` while `before` is replaced by `after`, or back.

        All three are equally long. True only for a structure of this format that has a checksum, which the sector does
        not pass: then the sector belongs to no other image.
        """
        ...

    def written_at(self, modified_ns: int) -> int:
        """A file's modification time as a time stamp of this format, which some programs record of a parent."""
        ...

    # -- opening and making ---------------------------------------------------------------------------------------

    def open(self, store: Store, *, writable: bool = False, ignore_bitmaps: bool = False) -> Layer:
        """The image, without its parents; a writable open may repair structures from their second copy.

        The layer takes over the store once it is returned. Raises CorruptImage, InvalidArgument, IoFailed.
        """
        ...

    def check_block_size(self, block_size_bytes: int) -> None:
        """Raise InvalidArgument for a unit of allocation that no image can have; formats without blocks ignore it."""
        ...

    def check_request(self, request: CreateRequest) -> None:
        """Raise InvalidArgument for an image that cannot be made."""
        ...

    def create(self, store: Store, request: CreateRequest) -> None:
        """Make the empty `store` an image of zeros. Raises InvalidArgument, NoSpace, IoFailed."""
        ...

    def stream_end(self, kind: str, size_bytes: int) -> bytes | None:
        """What follows the bytes of a disk that is written as a stream; None for a kind that cannot be streamed."""
        ...

    def create_child(
        self, store: Store, size_bytes: int, parent: ParentRef, *, block_size_bytes: int, disk: Layer | None = None
    ) -> None:
        """Make the empty `store` a child that owns nothing. Raises InvalidArgument, NoSpace, IoFailed.

        `disk` is an image of the virtual disk that the child shows: what belongs to the disk is taken over from it.
        """
        ...

    def relink(self, store: Store, parent: ParentRef) -> None:
        """Record another parent, or other names for it, in the child in `store`, which is held for writing.

        Raises InvalidArgument for names that cannot be stored, NoSpace, IoFailed, SyncFailed; the image then has its
        old names or its new ones.
        """
        ...

    def prepare_detach(self, layer: Layer) -> None:
        """Do to the open, writable child what takes long before `detach`, durably; it reads the same, with its parent.

        No block may be owned in part: other programs ignore the bitmaps of an image without a parent.
        Raises InvalidArgument if one is, NoSpace, IoFailed, SyncFailed.
        """
        ...

    def detach(self, store: Store) -> None:
        """Make the prepared child in `store`, which is held for writing, an image without a parent; its ids stay.

        What it does not own is zeros from then on. Raises NoSpace, IoFailed, SyncFailed; the image then has its parent
        or none.
        """
        ...

    # -- maintenance --------------------------------------------------------------------------------------------------

    def check(
        self, store: ReadStore, *, ignore_bitmaps: bool = False, progress: Callable[[int, int], None] | None = None
    ) -> list[Finding]:
        """Examine the file; every problem is a finding. Raises IoFailed."""
        ...

    def repair(self, draft: DraftStore, consent: Consent) -> list[Fix]:
        """Repair the image in `draft`; returns what was fixed or could be. Raises IoFailed."""
        ...

    def settle(self, draft: DraftStore) -> list[Fix]:
        """The last part of a repair, once the parent's names are right: put structures in their usual places."""
        ...

    def dump(self, store: ReadStore) -> list[StructureDump]:
        """Everything that could be a structure, as it is stored in the file. Raises IoFailed."""
        ...

    def refuse_foreign_writer(self, layer: Layer) -> None:
        """Raise ImageInUse if the image has the mark of a program that writes to it without our locks."""
        ...

    def drop_unreferenced(self, layer: Layer) -> None:
        """Cut off what lies after everything that the image refers to, as left by an interrupted merge."""
        ...

    def resizable(self, layer: Layer) -> Resizable | None:
        """How to resize the open layer; None if that is impossible."""
        ...

    def compactable(self, layer: Layer) -> Compactable | None:
        """How to compact an open layer with blocks; None if that is impossible."""
        ...


def check_size_unit(made: Format, size_bytes: int, path: str | None = None) -> None:
    """Raise InvalidArgument for the size of a new disk, or of one that is resized, between two units of the format."""
    unit = made.size_unit_bytes
    if size_bytes % unit:
        raise errors.InvalidArgument(
            f"the size of a {made.title} is a multiple of {unit} bytes, and {size_bytes} is not",
            path=path,
            hint=f"the next larger size is {round_up(size_bytes, unit)}",
        )
