# SPDX-License-Identifier: Apache-2.0
"""Creates images under a name, and children of existing images.

Decides how a child names its parent, and that a new image appears whole or not at all. The content of a new image is
decided by its format.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from enum import StrEnum

from vhdkit import errors, formats
from vhdkit.arguments import AnyPath, NewSize, Size, byte_size, checked
from vhdkit.chain.names.children import refuse_with_children
from vhdkit.chain.names.lineage import record_parent
from vhdkit.chain.names.marks import marked
from vhdkit.chain.names.noted import refuse_unwritten
from vhdkit.chain.names.opening import open_layers, refuse_more_layers
from vhdkit.chain.names.options import OpenOptions
from vhdkit.chain.records import pending, references
from vhdkit.folder import NewFile, is_regular, real_path
from vhdkit.folder_lock import folders_held
from vhdkit.formats.azure import azure_size
from vhdkit.formats.format import DEFAULT_BLOCK_SIZE, CreateRequest, Format, check_size_unit
from vhdkit.image import NULL_ID, ImageFacts, Layer, ParentRef
from vhdkit.named import opened_again
from vhdkit.store import FileStore, Store
from vhdkit.units import SECTOR_SIZE


class DiskFormat(StrEnum):
    """The formats that can be created or converted to."""

    RAW = "raw"
    FIXED = "fixed"
    DYNAMIC = "dynamic"
    VHDX = "vhdx"
    VHDX_FIXED = "vhdx-fixed"

    @property
    def has_blocks(self) -> bool:
        """Whether an image of this format is allocated in blocks, whose size can be chosen."""
        return self not in (DiskFormat.RAW, DiskFormat.FIXED)

    @property
    def label(self) -> str:
        """What messages call an image of this format."""
        titles = {
            DiskFormat.RAW: "raw image",
            DiskFormat.FIXED: "fixed VHD",
            DiskFormat.DYNAMIC: "dynamic VHD",
            DiskFormat.VHDX: "dynamic VHDX",
            DiskFormat.VHDX_FIXED: "fixed VHDX",
        }
        return titles.get(self, str(self))

    @classmethod
    def _missing_(cls, value: object) -> DiskFormat | None:
        """Accept formats in `FORMATS` that have no constant here."""
        if any(value in one.kinds for one in formats.FORMATS):
            member = str.__new__(cls, value)
            member._name_ = member._value_ = str(value)
            return member
        return None


@checked
def create_image(
    path: AnyPath,
    size_bytes: NewSize,
    *,
    disk_format: DiskFormat | str = DiskFormat.DYNAMIC,
    block_size_bytes: Size = DEFAULT_BLOCK_SIZE,
    sector_bytes: Size = SECTOR_SIZE,
    preallocate: bool = False,
    azure: bool = False,
    replace: bool = False,
) -> int:
    """Create an image of zeros; returns its virtual size in bytes.

    `sector_bytes` is the logical sector size, 512 or for a VHDX also 4096. `preallocate` reserves the space of a fixed
    or raw image. `azure` makes a fixed VHD whose size is rounded up to whole MiB, as Azure requires.
    Raises InvalidArgument, AlreadyExists, NotFound, AccessDenied, NoSpace.
    """
    size_bytes, block_size_bytes = byte_size("size_bytes", size_bytes), byte_size("block_size_bytes", block_size_bytes)
    disk_format, sector_bytes = DiskFormat(disk_format), byte_size("sector_bytes", sector_bytes)
    if azure:
        if disk_format is not DiskFormat.FIXED:
            raise errors.InvalidArgument("Azure accepts only fixed VHDs")
        size_bytes = azure_size(size_bytes)
    request = CreateRequest(size_bytes, disk_format, block_size_bytes, preallocate, sector_bytes)
    made = formats.making(disk_format)
    made.check_request(request)
    check_size_unit(made, size_bytes)
    check_block_size(made, block_size_bytes)
    held = replacing(os.fsdecode(path), replace=replace)
    with held as old, NewFile(path, replace=replace, old=old) as new:
        made.create(new.store, request)
        new.commit()
    return size_bytes


@contextlib.contextmanager
def replacing(
    path: str, layers: Sequence[Layer] = (), *, replace: bool, options: OpenOptions | None = None
) -> Iterator[FileStore | None]:
    """Hold the file to be replaced until that happens, so that no program opens it meanwhile and loses its writes.

    Yields it for `NewFile`, which replaces this file and no other; None if it does not exist.

    A file of the chain `layers`, an image in use, or one that has children is not replaced: raises
    InvalidArgument, ImageInUse, HasChildren. Without a file this does nothing. Without `replace` it only
    sets the hint of the block's AlreadyExists, which names --force if that would be accepted.
    """
    if not is_regular(path):
        yield None
        return

    def held(*, tidy: bool = True) -> FileStore:
        store = FileStore.open(path)
        try:
            files = [pending.file_of(layer.store) for layer in layers]
            if any(file is not None and file.identity == store.identity for file in files):
                raise errors.InvalidArgument("is part of the source chain, which must not change", path=path)
            store.lock(writer=True)
            refuse_with_children(store, options or OpenOptions(), "replacing it would destroy that image", tidy=tidy)
        except BaseException:
            store.close()
            raise
        return store

    if replace:
        with opened_again(held) as store:
            yield store
        return
    try:
        yield None
    except errors.AlreadyExists as error:
        try:
            held(tidy=False).close()
        except errors.VhdkitError as refusal:
            error.problem += f", and cannot be replaced: {errors.as_clause(refusal.problem)}"
        else:
            error.hint = "choose another name, or --force (replace=True in the library)"
        raise


def check_block_size(made: Format, block_size_bytes: int) -> None:
    """Raise InvalidArgument for an impossible block size, even if the new image, a raw disk, has no blocks."""
    (formats.named(made.child_format) if made.is_plain else made).check_block_size(block_size_bytes)


def require_names(layers: Sequence[Layer]) -> None:
    """Raise `Replaced` unless the names of these layers still lead to the open files (`INV-NAME-HELD`)."""
    for layer in layers:
        file = pending.file_of(layer.store)
        if file is not None:
            file.require_name()


@checked
def create_child(
    path: AnyPath,
    parent_path: AnyPath,
    *,
    size_bytes: NewSize | None = None,
    block_size_bytes: Size | None = None,
    options: OpenOptions | None = None,
    replace: bool = False,
) -> int:
    """Create an empty differencing image on `parent_path`; returns its virtual size in bytes.

    The whole chain below must open and is locked while the child is made, so it is not written to meanwhile. The
    child has the parent's size unless a larger one is given, and the parent's block size.
    Raises NotesUnwritten if a killed server's notes of an image below are in another folder than that of the options,
    what opening the parent raises, and what `create_image` raises.
    """
    child = os.fsdecode(path)
    if block_size_bytes is not None:
        block_size_bytes = byte_size("block_size_bytes", block_size_bytes)
    with folders_held([os.path.dirname(real_path(parent_path))]), contextlib.ExitStack() as stack:
        layers = open_layers(parent_path, options=options)
        for layer in layers:
            stack.callback(layer.close)
        refuse_unwritten(layers)
        refuse_more_layers(len(layers) + 1, child)
        new_size = child_size(child, layers[0], None if size_bytes is None else byte_size("size_bytes", size_bytes))
        old = stack.enter_context(replacing(child, layers, replace=replace, options=options))
        like = pending.files_of(layers[:1])
        new = stack.enter_context(NewFile(child, replace=replace, old=old, like=like))
        write_child(new.store, child, layers[0], new_size, block_size_bytes=block_size_bytes)
        with marked([(child, new.store, layers[0].store.name)]):
            require_names(layers[:1])
            new.commit()
    return new_size


def child_size(child: str, parent: Layer, size_bytes: int | None) -> int:
    """The virtual size of a new child of `parent`; by default the parent's own.

    Raises InvalidArgument for a smaller one, and for a parent that is not a regular file.
    """
    if not is_regular(parent.store.name):
        raise errors.InvalidArgument(
            "a parent must be a regular file", path=parent.store.name, hint="copy the device to a file"
        )
    size = parent.size_bytes if size_bytes is None else size_bytes
    if size < parent.size_bytes:
        raise errors.InvalidArgument(
            f"a child of {size} bytes is smaller than its parent of {parent.size_bytes} bytes",
            path=child,
        )
    if size != parent.size_bytes:  # which a parent of another program may have
        check_size_unit(formats.for_children_of(parent), size, child)
    return size


def write_child(
    store: Store, child: str, parent: Layer, size_bytes: int, *, block_size_bytes: int | None = None
) -> None:
    """Make the empty `store`, which will be named `child`, an empty differencing image on `parent`.

    It has the parent's block size unless another is given. Raises InvalidArgument, NoSpace.
    """
    if block_size_bytes is None:
        block_size_bytes = parent.block_size_bytes or DEFAULT_BLOCK_SIZE
    link = link_to(child, parent)
    formats.for_children_of(parent).create_child(
        store, size_bytes, link, block_size_bytes=block_size_bytes, disk=parent
    )
    record_parent(store, parent.store, link.linkage_id)
    if (file := pending.file_of(parent.store)) is not None:
        references.no_longer_frozen(file)


def linkage_of(layer: Layer) -> bytes:
    """The id that children record for it, `NULL_ID` for a raw disk."""
    return layer.unique_id or NULL_ID


def link_to(child: str, parent: Layer) -> ParentRef:
    """What `child` records about the open image `parent`. Raises InvalidArgument.

    If `parent` gets another id with the next write, both ids are recorded, the new one first: a leaf gets its child
    while it is still written to, and perhaps is not written to again.
    """
    link = link_of(child, parent.store.name, parent.facts)
    renewed = formats.of(parent).renewed_id(parent) if parent.writable else None
    ids = tuple(one for one in (renewed, linkage_of(parent)) if one not in (None, NULL_ID))
    return replace(link, linkage_ids=ids)


def link_of(child: str, path: str, parent: ImageFacts) -> ParentRef:
    """What `child` records about an image that lies or will lie at `path`. Raises InvalidArgument."""
    return names_of(child, path, parent.linkage_id or NULL_ID, parent.timestamp or 0)


def names_of(child: str, parent: str, linkage_id: bytes, timestamp: int) -> ParentRef:
    """The names by which `child` refers to `parent`: a relative and an absolute path, in Windows' spelling.

    Raises InvalidArgument for a path that cannot be spelled that way.
    """
    parent_real = real_path(parent)
    folder = os.path.dirname(real_path(child))
    if "\\" in parent_real:
        raise errors.InvalidArgument(
            "has a backslash in its path, which is a separator in the paths of a VHD; rename it",
            path=parent,
        )
    relative = os.path.relpath(parent_real, folder).replace(os.sep, "\\")
    if not relative.startswith(".."):
        relative = ".\\" + relative
    return ParentRef.of_paths(
        linkage_id,
        timestamp,
        name=os.path.basename(parent_real),
        relative=relative,
        absolute=parent_real.replace(os.sep, "\\"),
    )
