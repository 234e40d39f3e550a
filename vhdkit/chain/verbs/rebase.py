# SPDX-License-Identifier: Apache-2.0
"""Repoints a differencing image: to its parent's present path, or to another image that reads the same.

Decides that this never changes the disk: the names of the parent change freely, its identity (`INV-PARENT-ID`) only
if every sector that is read through the parent was found equal under the old and the new one, or if the user takes
responsibility. The order in which the names reach the device is decided by the format.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace

from vhdkit import errors, formats
from vhdkit.arguments import AnyPath, Size, checked
from vhdkit.chain.engine.chain import Chain, Progress
from vhdkit.chain.names.children import children_of
from vhdkit.chain.names.lineage import record_parents, same_content
from vhdkit.chain.names.marks import mark_child
from vhdkit.chain.names.noted import refuse_unwritten
from vhdkit.chain.names.opening import MAX_CHAIN_DEPTH, open_layers, refuse_more_layers
from vhdkit.chain.names.options import OpenOptions
from vhdkit.chain.names.parents import (
    allowed_folders,
    find_by_id,
    find_parent,
    format_id,
    linkage_id_of,
    other_format,
    other_sectors,
    parent_of,
    recorded_parent_id,
    unidentified,
)
from vhdkit.chain.records import pending
from vhdkit.chain.records.intent import Named, intents_about, refuse_sources
from vhdkit.chain.verbs.compare import compare_chains
from vhdkit.chain.verbs.create import names_of, require_names
from vhdkit.folder import real_path
from vhdkit.formats.format import Format
from vhdkit.formats.probe import FormatName, identify
from vhdkit.image import NULL_ID, ExtentKind, ImageFacts, Layer, ParentRef
from vhdkit.store import FileStore
from vhdkit.units import format_size, whole_sectors


@checked
def rebase(
    path: AnyPath,
    parent_path: AnyPath,
    *,
    unsafe_new_id: bool = False,
    accept_parent_id: str | None = None,
    accept_parent_size_bytes: Size | None = None,
    options: OpenOptions | None = None,
    progress: Progress | None = None,
    dry_run: bool = False,
) -> None:
    """Make the differencing image at `path` name `parent_path` as its parent, whose id must match.

    With `unsafe_new_id` an image with another id is accepted, and its id recorded, if the disk reads the same on it
    as on the recorded parent: the whole content is compared, so both must exist. If the recorded parent is gone,
    `accept_parent_id`, the new parent's id, accepts it on the caller's responsibility: only its size is checked, which
    must be the image's own, now or when it was made, unless `accept_parent_size_bytes` is the new parent's.
    The relative and the absolute path are stored. The parent's own chain must open. Raises InvalidArgument for an
    image without a parent, for one on a device and for a size without an id, ParentMismatch for another parent,
    ParentMissing where there is nothing to compare with, ImageInUse when the image is open anywhere, and what opening
    the two raises. On error the image has its old names.
    """
    if accept_parent_size_bytes is not None and accept_parent_id is None:
        raise errors.InvalidArgument("accept_parent_size_bytes requires accept_parent_id")
    options = options or OpenOptions()
    wanted = _Wanted(os.fsdecode(parent_path), unsafe_new_id, accept_parent_id, accept_parent_size_bytes)
    with _prepare(real_path(path), options, dry_run=dry_run) as store:
        image = _image_in(store, os.fsdecode(path), options)
        parent_id = _id_of(store, wanted.path, image.facts, options)
        _refuse_raw(image, wanted.path, parent_id, options)
        with _opened(wanted.path, parent_id, options) as parent_layers:
            plan = _plan(image, wanted, parent_id, parent_layers, options, progress)
            if not dry_run:
                _run(plan)


@dataclass(frozen=True, slots=True)
class _Wanted:
    """The new parent, and what the caller takes responsibility for."""

    path: str
    unsafe_new_id: bool
    accept_parent_id: str | None
    accept_parent_size_bytes: object


@dataclass(frozen=True, slots=True, eq=False)
class _Image:
    """The image that gets another parent: its file, which is held, its format, and its metadata."""

    store: FileStore
    format: Format
    facts: ImageFacts
    parent: ParentRef


@dataclass(frozen=True, slots=True, eq=False)
class _RebasePlan:
    """A new parent that passed all checks: `link` is what the image will record about it."""

    image: _Image
    parent_path: str
    parent: Layer
    parent_id: bytes
    link: ParentRef


@contextlib.contextmanager
def _prepare(image_path: str, options: OpenOptions, *, dry_run: bool) -> Iterator[FileStore]:
    """The image's file, held exclusively; unless `dry_run`, earlier unfinished changes are undone."""
    with FileStore.open_held(image_path, writable=not dry_run) as store:
        store.notes_folder = options.notes_folder
        if store.is_device:
            raise errors.InvalidArgument(
                "is a device, which has no space after the image to change its parent safely",
                path=image_path,
                hint="copy it to a file, and rebase that",
            )
        if not dry_run:
            pending.settle(store)
        yield store


def _image_in(store: FileStore, given_path: str, options: OpenOptions) -> _Image:
    """The image to be repointed. Raises InvalidArgument if it has no parent, ImageInUse if a merge will remove it."""
    facts, image_format = _facts_of(store)
    if facts.parent is None:
        raise errors.InvalidArgument("has no parent: only differencing images have one", path=given_path)
    intents = intents_about(store.name, allowed_folders(store.name, options.parent_dirs))
    refuse_sources([Named(store.name, facts.present_id)], intents)
    return _Image(store, image_format, facts, facts.parent)


def _refuse_raw(image: _Image, new_path: str, parent_id: bytes, options: OpenOptions) -> None:
    """Raise ParentRefused unless both parents have ids, or raw parents are allowed."""
    recorded = image.parent.linkage_id
    if NULL_ID in (recorded, parent_id) and not options.allow_raw_parent:
        raise errors.ParentRefused(
            "the image records no id of its parent, which may be any raw file"
            if recorded == NULL_ID
            else f"{errors.printable(new_path)} has no id to record: any raw file would then match",
            path=image.store.name,
            hint="if you are sure, add --allow-raw-parent",
        )


def _plan(
    image: _Image,
    wanted: _Wanted,
    parent_id: bytes,
    parent_layers: list[Layer],
    options: OpenOptions,
    progress: Progress | None,
) -> _RebasePlan:
    """Check that the image may become a child of the open chain of the new parent. Changes nothing."""
    store, facts = image.store, image.facts
    _refuse_loop(store, parent_layers)  # first, because no option can override it
    refuse_unwritten(parent_layers)
    refuse_more_layers(len(parent_layers) + 1 + _layers_above(store, options), store.name)
    _refuse_other_sectors(facts, parent_layers[0].facts)
    is_recorded = parent_id in (image.parent.linkage_ids or (NULL_ID,))
    _check_ids(store.name, wanted, image.parent.linkage_id, parent_id, is_recorded)
    timestamp = image.parent.timestamp
    if not is_recorded:
        if wanted.accept_parent_id is None:
            _check_content(store, facts, parent_layers, options, progress)
        else:
            _refuse_comparable(store, facts, options)
            _check_size(store.name, facts, parent_layers[0], wanted.accept_parent_size_bytes)
        timestamp = parent_layers[0].facts.timestamp or 0
    link = names_of(store.name, wanted.path, parent_id, timestamp)
    return _RebasePlan(image, wanted.path, parent_layers[0], parent_id, link)


def _run(plan: _RebasePlan) -> None:
    """Let the image record its new parent, and the parent's mark name the image."""
    store = plan.image.store
    require_names([plan.parent])
    store.require_name()
    mark_child(store.name, store, plan.parent_path, plan.parent_id)
    with same_content(store.name):
        plan.image.format.relink(store, plan.link)
    record_parents(store.name, plan.parent_path, plan.parent_id)


def _facts_of(store: FileStore) -> tuple[ImageFacts, Format]:
    """The image's metadata and its format. Raises as `identify` does."""
    view = pending.view(store)
    found = identify(view)
    return found.facts(view), found


def _check_ids(path: str, wanted: _Wanted, recorded: bytes, found: bytes, is_recorded: bool) -> None:
    """Raise ParentMismatch unless the new parent has the recorded id, or another id is allowed."""
    accept_parent_id, new_path = wanted.accept_parent_id, wanted.path
    if accept_parent_id is not None and found != _parsed_id(accept_parent_id):
        raise errors.ParentMismatch(
            f"{errors.printable(new_path)} is not the parent to accept",
            path=path,
            expected=f"id {accept_parent_id}",
            found=_shown_id(found),
        )
    if not is_recorded and not wanted.unsafe_new_id and accept_parent_id is None:
        raise errors.ParentMismatch(
            f"{errors.printable(new_path)} is not its parent",
            path=path,
            expected=f"id {format_id(recorded)}",
            found=_shown_id(found),
            hint="if it has the same content, add --unsafe-new-id, which compares the content",
        )


def _shown_id(unique_id_bytes: bytes) -> str:
    return f"id {format_id(unique_id_bytes)}" if unique_id_bytes != NULL_ID else "no id"


def _parsed_id(text: str) -> bytes:
    try:
        return uuid.UUID(text).bytes
    except ValueError:
        raise errors.InvalidArgument(
            f"{errors.printable(text)!r} is not an id such as {format_id(bytes(range(16)))}"
        ) from None


def _id_of(store: FileStore, parent_path: str, facts: ImageFacts, options: OpenOptions) -> bytes:
    with FileStore.open(parent_path) as parent:
        if parent.identity == store.identity:
            raise errors.InvalidArgument("cannot be its own parent", path=store.name)
        view = pending.view(parent)
        problem = None if options.allow_raw_parent or linkage_id_of(parent) != NULL_ID else unidentified(view)
        problem = problem or other_format(facts, parent_path, view)
        if problem is not None:
            raise problem
        return linkage_id_of(parent)


@contextlib.contextmanager
def _opened(path: str, parent_id: bytes, options: OpenOptions) -> Iterator[list[Layer]]:
    """The layers of a parent, leaf first, held while the block runs."""
    as_raw = FormatName.RAW if parent_id == NULL_ID else None
    layers = open_layers(path, options=replace(options, format_name=as_raw))
    try:
        yield layers
    finally:
        for layer in layers:
            layer.close()


def _refuse_loop(store: FileStore, layers: list[Layer]) -> None:
    for layer in layers:
        file = pending.file_of(layer.store)
        if file is not None and file.identity == store.identity:
            raise errors.InvalidArgument(
                f"would become its own parent: {errors.printable(layers[0].store.name)} is one of its children",
                path=store.name,
            )


def _layers_above(store: FileStore, options: OpenOptions) -> int:
    """How many layers the longest line of descendants of the image has, as far as they can be found."""
    images, levels = [(linkage_id_of(store), store.name)], 0
    while levels < MAX_CHAIN_DEPTH:
        families = children_of(images, options)
        children = {child.path for family in families for child in family if child.problem is None}
        images = []
        for path in sorted(children):
            with contextlib.suppress(errors.VhdkitError), FileStore.open(path) as child:
                images.append((linkage_id_of(child), path))
        if not images:
            break
        levels += 1
    return levels


def _refuse_other_sectors(facts: ImageFacts, parent: ImageFacts) -> None:
    """Raise ParentMismatch for a new parent with another logical sector size, with which the chain would not open."""
    if other_sectors(facts, parent) is not None:
        raise errors.ParentMismatch(
            f"{errors.printable(parent.path)} has another sector size, so it cannot be the parent",
            path=facts.path,
            expected=f"sectors of {facts.sector_bytes} bytes",
            found=f"sectors of {parent.sector_bytes} bytes",
            hint="name a parent whose sectors have the size of the image's; `vhdkit info` shows it",
        )


def _check_content(
    store: FileStore, facts: ImageFacts, new: list[Layer], options: OpenOptions, progress: Progress | None
) -> None:
    """Raise unless the disk reads the same on the new parent as on the recorded one."""
    child = formats.named(facts.format_name).open(pending.view(store))  # not closed: the store is the caller's
    folders = allowed_folders(store.name, options.parent_dirs)
    try:
        old_path, old_id = _recorded_parent(facts, folders, options)
        with _opened(old_path, old_id, replace(options, parent_dirs=folders)) as old:
            result = compare_chains(Chain([child, *old]), Chain([child, *new]), progress)
    except (errors.ParentError, errors.CorruptImage) as error:
        _refuse_unseen(child, new[0], error)
        return
    if not result.same_content:
        raise errors.ParentMismatch(
            f"the disk would read differently on {errors.printable(new[0].store.name)}, in"
            f" {result.different_sector_count} sectors, first at byte {result.first_difference_bytes:#x}",
            path=store.name,
            hint="it is another disk, or was changed: the image keeps its parent",
        )


def _refuse_comparable(store: FileStore, facts: ImageFacts, options: OpenOptions) -> None:
    """Raise if the recorded parent can be read: then a comparison is possible, and safer than the user's word."""
    folders = allowed_folders(store.name, options.parent_dirs)
    try:
        old_path, old_id = _recorded_parent(facts, folders, options)
        with _opened(old_path, old_id, replace(options, parent_dirs=folders)):
            pass
    except (errors.ParentError, errors.CorruptImage):
        return
    raise errors.InvalidArgument(
        f"has the parent {errors.printable(old_path)}, which exists: an id alone is accepted only without that parent",
        path=store.name,
        hint="use --unsafe-new-id instead of --accept-parent-id, to compare the content",
    )


def _check_size(path: str, facts: ImageFacts, parent: Layer, accepted_bytes: object) -> None:
    """Raise ParentMismatch for a parent whose size the image neither has nor had, unless that size was accepted.

    No image records its parent's size. A child is made as large as its parent, unless a larger size was requested.
    """
    sizes = {facts.size_bytes, facts.made_size_bytes, accepted_bytes}
    if parent.size_bytes not in sizes:
        raise errors.ParentMismatch(
            f"{errors.printable(parent.store.name)} has another size than the disk that the image was made on",
            path=path,
            expected=f"{facts.size_bytes} bytes, the size of the image",
            found=f"{parent.size_bytes} bytes",
            hint=f"if it is the right parent, add --accept-parent-size {parent.size_bytes}",
        )


def _recorded_parent(facts: ImageFacts, folders: tuple[str, ...], options: OpenOptions) -> tuple[str, bytes]:
    """(path, id) of the parent known to the image: found by its names, or by its id in the folders."""
    parent_id = recorded_parent_id(facts)
    try:
        with find_parent(facts, folders, options) as store:
            return store.name, parent_id
    except errors.ParentError:
        renamed = find_by_id(parent_of(facts).linkage_ids, folders)
        if not renamed:
            raise
        return renamed[0], parent_id


def _refuse_unseen(child: Layer, new: Layer, cause: errors.VhdkitError) -> None:
    """Without the old parent nothing can be compared; refuse, unless nothing is read through the parent."""
    through = sum(
        one.size_bytes for one in child.extents(0, whole_sectors(child.size_bytes)) if one.kind is ExtentKind.ABSENT
    )
    if through:
        raise errors.ParentMissing(
            f"{format_size(through)} of the disk are read through the recorded parent, which cannot be read"
            f" ({cause.problem}): there is nothing to compare with",
            path=child.store.name,
            hint="restore that one, from a backup if necessary, and allow its folder with --allow-parent-dir; if it is"
            " gone permanently and you are sure that the new parent has the same content:"
            f" vhdkit rebase {errors.quoted(child.store.name)} --parent {errors.quoted(new.store.name)}"
            f" --accept-parent-id {format_id(new.unique_id or NULL_ID)}",
        )
