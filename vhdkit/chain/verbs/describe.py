# SPDX-License-Identifier: Apache-2.0
"""What an image and a chain are, as plain values: the facts behind `info` and `chain`.

Decides which facts are reported. Needs neither locks nor sound parents: an image in use, or one without its parent,
is described as far as possible.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import numpy as np

from vhdkit import errors
from vhdkit.arguments import AnyPath
from vhdkit.beneath import find_beneath
from vhdkit.chain.engine.chain import Chain
from vhdkit.chain.names import lineage
from vhdkit.chain.names.dependents import mark_findings
from vhdkit.chain.names.resolve import (
    MAX_CHAIN_DEPTH,
    NULL_ID,
    OpenOptions,
    allowed_folders,
    find_parent,
    format_id,
)
from vhdkit.chain.records import pending
from vhdkit.errors import CorruptReason
from vhdkit.finding import Finding
from vhdkit.formats.probe import FormatName, identify
from vhdkit.formats.raw import examine_raw
from vhdkit.formats.vhd import geometry, layout
from vhdkit.formats.vhd.bat import Bat
from vhdkit.formats.vhd.metadata import Metadata, read_metadata
from vhdkit.image import ExtentKind
from vhdkit.store import FileStore, Store
from vhdkit.units import SECTOR_SIZE, round_up, whole_sectors


@dataclass(frozen=True, slots=True)
class ParentInfo:
    """What a differencing image says of its parent; `path` is where it was found, `problem` why it was not.

    `allowed_folder` is the folder, of those in which parents may lie, that it was found in or below.
    """

    name: str
    unique_id: str
    timestamp: int
    locators: tuple[tuple[str, str | None], ...]  # (platform code, text)
    path: str | None
    problem: str | None
    allowed_folder: str | None = None


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """One image file. Sizes in bytes; fields that its format does not have are None."""

    path: str
    kind: str  # raw, fixed, dynamic or differencing
    virtual_size_bytes: int
    file_size_bytes: int
    allocated_bytes: int  # on the file system, holes left out
    in_use: bool
    unique_id: str | None = None
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
    parent: ParentInfo | None = None
    findings: tuple[Finding, ...] = ()


def describe_image(path: AnyPath, *, options: OpenOptions | None = None) -> ImageInfo:
    """Describe one image, and where its parent is, if it has one.

    Raises NotFound, AccessDenied, InvalidArgument, UnsupportedFormat, CorruptImage; a parent that cannot be used is
    told in `parent.problem`.
    """
    options = options or OpenOptions()
    with FileStore.open(path) as store:
        folders = allowed_folders(store.name, options.parent_dirs)
        told = _describe(store, folders, options, options.format_name)
        return replace(told, findings=(*told.findings, *mark_findings(store, options)))


def _describe(
    store: FileStore, folders: tuple[str, ...], options: OpenOptions, format_name: FormatName | None
) -> ImageInfo:
    seen = pending.look(store)
    size = seen.store.size()
    if (format_name or identify(seen.store)) is FormatName.RAW:
        return ImageInfo(
            store.name,
            "raw",
            round_up(size, SECTOR_SIZE),
            size,
            store.allocated_bytes(),
            store.in_use(),
            findings=(*seen.findings, *examine_raw(seen.store)),
        )
    metadata = read_metadata(seen.store)
    footer, header = metadata.footer, metadata.header
    allocated, parent = None, None
    noticed: list[Finding] = []
    if metadata.is_differencing:
        parent, noticed = _describe_parent(seen.store, metadata, folders, options)
    if header is not None:
        bat = Bat.load(seen.store, header.table_offset, metadata.block_count)
        allocated = int(np.count_nonzero(bat.allocated()))
    return ImageInfo(
        path=store.name,
        kind=metadata.kind,
        virtual_size_bytes=metadata.size_bytes,
        file_size_bytes=size,
        allocated_bytes=store.allocated_bytes(),
        in_use=store.in_use(),
        unique_id=format_id(footer.unique_id),
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
        parent=parent,
        findings=(*seen.findings, *metadata.findings, *noticed),
    )


def _describe_parent(
    image: Store, metadata: Metadata, folders: tuple[str, ...], options: OpenOptions
) -> tuple[ParentInfo, list[Finding]]:
    """What is known of the parent, and what there is to say about it."""
    assert metadata.header is not None
    path, problem, allowed_by = None, None, None
    noticed: list[Finding] = []
    try:
        with find_parent(metadata, folders, options) as store:
            path = store.name
            allowed_by = next((one for one in folders if os.path.commonpath((path, one)) == one), None)
            noticed += lineage.findings_about(image, metadata, store)
    except errors.VhdkitError as error:
        problem = error.problem + errors.difference(error.expected, error.found)
        problem += f"; {error.hint}" if error.hint else ""
    parent_id = metadata.header.parent_unique_id
    told = ParentInfo(
        name=metadata.parent_name,
        unique_id="none (a raw disk)" if parent_id == NULL_ID else format_id(parent_id),
        timestamp=metadata.header.parent_timestamp,
        locators=tuple((one.platform_code.decode("latin-1"), one.text) for one in metadata.locators),
        path=path,
        problem=problem,
        allowed_folder=allowed_by,
    )
    return told, noticed


@dataclass(frozen=True, slots=True)
class LayerInfo:
    """One layer of a chain. `owned_bytes` is what the layer answers for in the disk as the leaf shows it.

    None where the chain is broken, so that nobody can tell.
    """

    image: ImageInfo
    owned_bytes: int | None


@dataclass(frozen=True, slots=True)
class ChainInfo:
    """A chain, leaf first. `problem` says why it does not go on; `unowned_bytes` reads as zeros by nobody's word.

    `damaged` tells a file that contradicts the format, or a loop, from a parent that is missing or refused.
    """

    layers: tuple[LayerInfo, ...]
    unowned_bytes: int | None
    problem: str | None
    damaged: bool = False


def describe_chain(path: AnyPath, *, options: OpenOptions | None = None) -> ChainInfo:
    """Describe an image and its parents as far as they can be found.

    Raises what `describe_image` raises for the leaf; what is wrong behind it is told in `problem`.
    """
    options = options or OpenOptions()
    leaf_path = os.fsdecode(path)
    images = [describe_image(leaf_path, options=options)]
    try:
        _describe_parents(images, options)
    except errors.CorruptImage as error:
        return _broken(images, str(error), damaged=True)
    lost = images[-1].parent
    if lost is not None:
        return _broken(images, lost.problem or "its parent cannot be used", damaged=False)
    owned = [0] * (len(images) + 1)  # the last counts what nobody owns
    try:
        with Chain.open(leaf_path, options=replace(options, lock=False)) as chain:
            for extent in chain.extents(0, whole_sectors(chain.size_bytes)):
                assert extent.kind is not ExtentKind.ABSENT
                owned[extent.layer_index] += extent.size_bytes
    except errors.CorruptImage as error:
        return _broken(images, str(error), damaged=True)
    layers = tuple(LayerInfo(image, size) for image, size in zip(images, owned[:-1], strict=True))
    return ChainInfo(layers, owned[-1], None)


def _describe_parents(images: list[ImageInfo], options: OpenOptions) -> None:
    """Add the leaf's parents to `images`, down to the base or the first that cannot be used.

    Raises CorruptImage for a parent that cannot be read, for a loop and for a chain that is too deep.
    """
    folders = allowed_folders(images[0].path, options.parent_dirs)
    with FileStore.open(images[0].path) as store:
        seen = {store.identity}
    while (parent := images[-1].parent) is not None and parent.path is not None:
        child = images[-1].path
        if len(images) >= MAX_CHAIN_DEPTH:
            problem = f"the chain has more than {MAX_CHAIN_DEPTH} layers"
            raise errors.CorruptImage(CorruptReason.CHAIN_DEPTH, problem, path=child)
        found = find_beneath(parent.path, folders).store
        if found is None:
            raise errors.NotFound("went away while it was looked at", path=parent.path)
        with found as store:
            if store.identity in seen:
                problem = "the chain of parents leads back to itself"
                raise errors.CorruptImage(CorruptReason.CHAIN_LOOP, problem, path=child)
            seen.add(store.identity)
            raw_parent = parent.unique_id.startswith("none")
            format_name = FormatName.RAW if raw_parent else FormatName.VHD
            images.append(_describe(store, folders, options, format_name))


def _broken(images: list[ImageInfo], problem: str, *, damaged: bool) -> ChainInfo:
    return ChainInfo(tuple(LayerInfo(image, None) for image in images), None, problem, damaged)
