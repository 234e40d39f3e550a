# SPDX-License-Identifier: Apache-2.0
"""Describes images and chains as plain values: the facts behind `info` and `chain`.

Decides which facts are reported. Needs neither locks nor intact parents: an image in use, or one without its parent,
is described as far as possible.
"""

from __future__ import annotations

import os
from collections.abc import Hashable
from dataclasses import dataclass, replace

from vhdkit import errors
from vhdkit.arguments import AnyPath
from vhdkit.chain.engine.chain import Chain
from vhdkit.chain.names import lineage
from vhdkit.chain.names.children import mark_findings
from vhdkit.chain.names.opening import MAX_CHAIN_DEPTH
from vhdkit.chain.names.options import OpenOptions
from vhdkit.chain.names.parents import allowed_folders, find_parent, format_id, parent_format, parent_of
from vhdkit.chain.records import pending
from vhdkit.errors import CorruptReason
from vhdkit.finding import Finding
from vhdkit.formats.format import Format, ImageDetails
from vhdkit.formats.probe import format_of
from vhdkit.image import ExtentKind, ImageFacts
from vhdkit.local_volume import LOCAL
from vhdkit.store import Store
from vhdkit.units import whole_sectors
from vhdkit.volume import Volume, VolumeFile


@dataclass(frozen=True, slots=True)
class ParentInfo:
    """What a differencing image records about its parent; `path` is where it was found, `problem` why it was not.

    `allowed_folder` is the folder, of those in which parents may lie, in or below which it was found.
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
    logical_sector_bytes: int | None = None
    physical_sector_bytes: int | None = None
    virtual_disk_id: str | None = None  # the same in all images of a disk
    log_entries: int | None = None  # not replayed yet
    parent: ParentInfo | None = None
    findings: tuple[Finding, ...] = ()
    title: str = ""  # the kind for display, such as "dynamic VHD"


def describe_image(path: AnyPath, *, options: OpenOptions | None = None) -> ImageInfo:
    """Describe one image, and where its parent is, if it has one.

    Raises NotFound, AccessDenied, InvalidArgument, UnsupportedFormat, CorruptImage; `parent.problem` says why a parent
    cannot be used.
    """
    options = options or OpenOptions()
    with LOCAL.open(os.fsdecode(path)) as store:
        folders = allowed_folders(store.name, options.parent_dirs)
        return _with_marks(store, _describe(store, folders, options, None, LOCAL)[0], options, LOCAL)


def _with_marks(store: VolumeFile, image: ImageInfo, options: OpenOptions, volume: Volume) -> ImageInfo:
    return replace(image, findings=(*image.findings, *mark_findings(store, options, volume)))


def _describe(
    store: VolumeFile, folders: tuple[str, ...], options: OpenOptions, image_format: Format | None, volume: Volume
) -> tuple[ImageInfo, ImageFacts]:
    """Describe one image; `image_format` is the format recorded by its child, None for the leaf."""
    seen = pending.look(store, volume)
    if image_format is None:
        image_format = format_of(seen.store, options.format_name)
    facts, details = image_format.describe(seen.store)
    parent, noticed = None, image_format.check(seen.store) if image_format.is_plain else []
    if facts.parent is not None:
        parent, noticed = _describe_parent(seen.store, facts, details, folders, options, volume)
    info = ImageInfo(
        path=store.name,
        kind=facts.kind,
        virtual_size_bytes=facts.size_bytes,
        file_size_bytes=seen.store.size(),
        allocated_bytes=store.allocated_bytes(),
        in_use=store.in_use(),
        unique_id=None if facts.linkage_id is None else format_id(facts.linkage_id),
        creator=details.creator,
        creator_version=details.creator_version,
        creator_host=details.creator_host,
        created_unix_seconds=details.created_unix_seconds,
        geometry=details.geometry,
        current_size_bytes=details.current_size_bytes,
        original_size_bytes=details.original_size_bytes,
        size_from_geometry=details.size_from_geometry,
        saved_state=details.saved_state,
        hidden=details.hidden,
        block_size_bytes=details.block_size_bytes,
        block_count=details.block_count,
        allocated_block_count=details.allocated_block_count,
        batmap=details.batmap,
        logical_sector_bytes=details.logical_sector_bytes,
        physical_sector_bytes=details.physical_sector_bytes,
        virtual_disk_id=details.virtual_disk_id,
        log_entries=details.log_entries,
        parent=parent,
        findings=(*seen.findings, *facts.findings, *noticed),
        title=facts.title,
    )
    return info, facts


def _describe_parent(
    image: Store,
    facts: ImageFacts,
    details: ImageDetails,
    folders: tuple[str, ...],
    options: OpenOptions,
    volume: Volume,
) -> tuple[ParentInfo, list[Finding]]:
    """What is known about the parent, and the findings about it."""
    path, problem, allowed_by = None, None, None
    noticed: list[Finding] = []
    try:
        with find_parent(facts, folders, options, volume) as store:
            path = store.name
            allowed_by = next((one for one in folders if os.path.commonpath((path, one)) == one), None)
            noticed += lineage.findings_about(image, facts, store, volume)
    except errors.VhdkitError as error:
        problem = error.problem + errors.difference(error.expected, error.found)
        problem += f"; {error.hint}" if error.hint else ""
    parent = parent_of(facts)
    described = ParentInfo(
        name=details.parent_name,
        unique_id="none (a raw disk)" if parent.raw_allowed else format_id(parent.linkage_id),
        timestamp=parent.timestamp,
        locators=details.parent_locators,
        path=path,
        problem=problem,
        allowed_folder=allowed_by,
    )
    return described, noticed


@dataclass(frozen=True, slots=True)
class LayerInfo:
    """One layer of a chain. `owned_bytes`: the part of the disk, as seen through the leaf, that this layer owns.

    None if the chain is broken, since it is unknown then.
    """

    image: ImageInfo
    owned_bytes: int | None


@dataclass(frozen=True, slots=True)
class ChainInfo:
    """A chain, leaf first. `problem` says why it is incomplete; `unowned_bytes`, owned by no layer, read as zeros.

    `damaged` distinguishes a file that violates the format, or a loop, from a parent that is missing or refused.
    """

    layers: tuple[LayerInfo, ...]
    unowned_bytes: int | None
    problem: str | None
    damaged: bool = False


def describe_chain(path: AnyPath, *, options: OpenOptions | None = None) -> ChainInfo:
    """Describe an image and its parents as far as they can be found.

    Raises what `describe_image` raises for the leaf; `problem` reports what is wrong with its parents.
    """
    return describe_chain_on(LOCAL, os.fsdecode(path), options or OpenOptions())


def describe_chain_on(volume: Volume, leaf_path: str, options: OpenOptions) -> ChainInfo:
    """`describe_chain` for a chain on any volume."""
    folders = allowed_folders(leaf_path, options.parent_dirs, volume)
    with volume.open(leaf_path) as store:
        leaf, facts = _describe(store, folders, options, None, volume)
        images = [_with_marks(store, leaf, options, volume)]
    try:
        _describe_parents(images, facts, options, volume)
    except errors.CorruptImage as error:
        return _broken(images, str(error), damaged=True)
    lost = images[-1].parent
    if lost is not None:
        return _broken(images, lost.problem or "its parent cannot be used", damaged=False)
    owned = [0] * (len(images) + 1)  # the last entry counts bytes that no layer owns
    try:
        with Chain.open(leaf_path, options=replace(options, lock=False), volume=volume) as chain:
            for extent in chain.extents(0, whole_sectors(chain.size_bytes)):
                assert extent.kind is not ExtentKind.ABSENT
                owned[extent.layer_index] += extent.size_bytes
    except errors.CorruptImage as error:
        return _broken(images, str(error), damaged=True)
    layers = tuple(LayerInfo(image, size) for image, size in zip(images, owned[:-1], strict=True))
    return ChainInfo(layers, owned[-1], None)


def _describe_parents(images: list[ImageInfo], facts: ImageFacts, options: OpenOptions, volume: Volume) -> None:
    """Add the leaf's parents to `images`, down to the base or the first unusable one; `facts` are the leaf's.

    Raises CorruptImage for a parent that cannot be read, for a loop and for a chain that is too deep.
    """
    folders = allowed_folders(images[0].path, options.parent_dirs, volume)
    with volume.open(images[0].path) as store:
        seen: set[Hashable] = {store.identity}
    while (parent := images[-1].parent) is not None and parent.path is not None:
        child = images[-1].path
        if len(images) >= MAX_CHAIN_DEPTH:
            problem = f"the chain has more than {MAX_CHAIN_DEPTH} layers"
            raise errors.CorruptImage(CorruptReason.CHAIN_DEPTH, problem, path=child)
        found = volume.follow(parent.path, folders).store
        if found is None:
            raise errors.NotFound("disappeared while it was examined", path=parent.path)
        with found:
            if found.identity in seen:
                problem = "the chain of parents is circular"
                raise errors.CorruptImage(CorruptReason.CHAIN_LOOP, problem, path=child)
            seen.add(found.identity)
            image, facts = _describe(found, folders, options, parent_format(facts), volume)
            images.append(image)


def _broken(images: list[ImageInfo], problem: str, *, damaged: bool) -> ChainInfo:
    return ChainInfo(tuple(LayerInfo(image, None) for image in images), None, problem, damaged)
