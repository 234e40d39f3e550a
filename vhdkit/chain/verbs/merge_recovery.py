# SPDX-License-Identifier: Apache-2.0
"""Interrupted merges: continuing one, and what opening an image of it for writing does about it.

Decides how the record of a merge is handled, and which files are removed because of one (`INV-RECORD-PROVEN`). Any
program may have written a record (`intent`):

    the leaf exists       the chain opened through it must be the recorded one, and the target must read like the
                          leaf wherever a source owns anything; otherwise it is copied again, on request
    the leaf is gone      a file is removed only if it is a differencing image in the record's folder, or in one that
                          the user named, has the id of the record, and is a child of the next image of the record;
                          every other file is left alone and reported

A file with the name of a source and another id is not that source: its name now belongs to another image. In a format
without ids that never change, a leaf that was written to has another id, too. As long as the record says that data is
being copied, when nothing is removed because of it, the leaf is recognised by its place in the chain instead.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from vhdkit import errors, formats
from vhdkit.arguments import AnyPath, checked
from vhdkit.chain.engine.chain import Progress
from vhdkit.chain.names.children import children_of, drop_stale_marks
from vhdkit.chain.names.opening import open_layers
from vhdkit.chain.names.options import OpenOptions
from vhdkit.chain.names.parents import allowed_folders, linkage_id_of
from vhdkit.chain.records import pending
from vhdkit.chain.records.intent import (
    DamagedRecord,
    Intent,
    Named,
    Phase,
    demand_intent,
    intent_of,
    intents_about,
    record_of,
    resume_command,
)
from vhdkit.chain.verbs.merge_in_place import InPlacePlan, Merge, plan_in_place, prepare, run
from vhdkit.chain.verbs.merge_parts import file_of_layer, merge_would_break, named, opened
from vhdkit.chain.verbs.merge_steps import RealNames, remove_sources
from vhdkit.errors import printable
from vhdkit.folder import exists, real_path
from vhdkit.formats.probe import open_layer
from vhdkit.image import NULL_ID, Layer, ParentRef
from vhdkit.store import FileStore


@checked
def resume_merge(
    path: AnyPath,
    *,
    options: OpenOptions | None = None,
    progress: Progress | None = None,
    only_complete: bool = False,
) -> Merge:
    """Finish the interrupted merge that has the image at `path` as its leaf, its target or in between.

    With `only_complete` a merge whose data must still be copied is left as it is: InvalidArgument. The same is raised
    if no merge is found or its record is damaged. Also raises what `merge` raises.
    """
    options = options or OpenOptions()
    found = _found(path, options)
    if found is None:
        demand_intent(record_of(os.fsdecode(path)), allowed_folders(os.fsdecode(path), options.parent_dirs))
        raise errors.InvalidArgument("no interrupted merge of this image was found", path=os.fsdecode(path))
    if only_complete and found.phase is Phase.COPY:
        raise errors.InvalidArgument(
            f"{printable(found.leaf.path)} has not been completely copied into it yet",
            path=found.target.path,
            hint=f"finish the copy: {resume_command(found, found.target.path)}",
        )
    return finish(found, options, progress, only_compare=only_complete)


@checked
def merge_under_way(path: AnyPath, *, options: OpenOptions | None = None) -> str | None:
    """The target of an interrupted merge that has the image at `path` as its leaf, its target or in between."""
    found = _found(path, options or OpenOptions())
    return found.target.path if found is not None else None


def refuse_during_merge(path: AnyPath, options: OpenOptions) -> None:
    """Raise ImageInUse if the image at `path` belongs to an interrupted merge, which may still need it as it is."""
    found = _found(path, options)
    if found is not None:
        raise _interrupted(found, os.fsdecode(path))


def refuse_mixture(path: AnyPath) -> None:
    """Raise ImageInUse if a merge into the image at `path` was still copying: alone it is a mixture."""
    intent = intent_of(os.fsdecode(path), (os.sep,))  # nothing is done because of it
    if intent is not None and intent.phase is Phase.COPY:
        raise _interrupted(intent, os.fsdecode(path))


def _interrupted(intent: Intent, path: str) -> errors.ImageInUse:
    return errors.ImageInUse(
        f"a merge of {printable(intent.leaf.path)} into {printable(intent.target.path)} was interrupted",
        path=path,
        hint=f"finish it first: {resume_command(intent, path)}",
    )


def _found(path: AnyPath, options: OpenOptions) -> Intent | None:
    """The merge to which this image belongs; its record may lie in a folder below, beside a layer of its chain."""
    folders = allowed_folders(os.fsdecode(path), options.parent_dirs)
    found = intents_about(os.fsdecode(path), folders)
    if found:
        return found[0]
    place = real_path(path)
    for below in _layers_below(path, options):
        intent = intent_of(below, folders)
        if intent is not None and place in [one.path for one in intent.sources]:
            return intent
    return None


def _layers_below(path: AnyPath, options: OpenOptions) -> list[str]:
    """The real paths of an image's ancestors, as far as they can be found."""
    try:
        with opened(path, replace(options, lock=False)) as layers:
            return [real_path(file_of_layer(layer).name) for layer in layers[1:]]
    except errors.VhdkitError:
        return []


def is_there(one: Named) -> bool:
    """True if the file under this name is the named image. Raises AccessDenied, IoFailed."""
    try:
        with FileStore.open(one.path, follow_links=False) as store:
            return not store.is_device and _id_of(store) in one.ids
    except (errors.NotFound, errors.InvalidArgument):
        return False


def _leaf_is_there(intent: Intent) -> bool:
    """Whether the leaf's name leads to the leaf, which may have been written to until the data is complete."""
    if is_there(intent.leaf):
        return True
    if intent.phase is not Phase.COPY or not _may_change_id(intent.leaf.path):
        return False
    return is_child_of(intent.leaf, [*intent.sources, intent.target][1])


def _may_change_id(path: str) -> bool:
    """Whether the image's format has no permanent id."""
    try:
        with FileStore.open(path, follow_links=False) as store:
            view = pending.view(store)
            found = formats.probed(view)
            return not store.is_device and not found.is_plain and found.file_id(view) is None
    except (errors.NotFound, errors.InvalidArgument):
        return False


def finish(
    intent: Intent,
    options: OpenOptions,
    progress: Progress | None = None,
    *,
    only_compare: bool = False,
    before_removal: Callable[[InPlacePlan], None] | None = None,
) -> Merge:
    """Complete a merge. Copied data is compared, and copied again where it differs.

    With `only_compare`, a difference raises InvalidArgument instead. `before_removal` is as for `run`.
    """
    record = printable(record_of(intent.target.path))
    if not _leaf_is_there(intent):
        if intent.phase is Phase.REMOVE:
            return _remove_rest(intent, options)
        if exists(intent.leaf.path):
            raise errors.InvalidArgument(
                "is not the leaf of the interrupted merge as it was recorded: it was written to since, or replaced",
                path=intent.leaf.path,
                hint=f"put that image back; or, if this one reads correctly, move {record} away and merge again",
            )
        raise errors.NotFound(
            "is the leaf of an interrupted merge and does not exist",
            path=intent.leaf.path,
            hint=f"put it back: {printable(intent.target.path)} has only a part of it; to keep that as it is, move"
            f" {record} away",
        )
    with opened(intent.leaf.path, options) as layers:
        index = len(intent.sources)
        if not _is_chain_of(layers[: index + 1], intent):
            raise errors.InvalidArgument(
                "the chain is not the one whose merge was interrupted",
                path=intent.leaf.path,
                hint=f"make sure that each image reads correctly, and move {record} away; then merge again",
            )
        incomplete = errors.InvalidArgument(
            f"is not a complete copy of {printable(intent.leaf.path)}, although its merge record claims that",
            path=intent.target.path,
            hint=f"repeat the copy: {resume_command(intent, intent.target.path)}",
        )
        plan = plan_in_place(layers, index, relink_children=intent.relink)
        if_incomplete = incomplete if only_compare else None
        with prepare(plan, options, intent.phase, if_incomplete=if_incomplete) as prepared:
            return run(prepared, progress, before_removal)


def _is_chain_of(layers: Sequence[Layer], intent: Intent) -> bool:
    """Whether these are the layers of the record, from the leaf to the target."""
    found, recorded = [named(layer) for layer in layers], [*intent.sources, intent.target]
    if len(found) != len(recorded) or not all(map(Named.is_same_file, found[1:], recorded[1:])):
        return False
    may_change = intent.phase is Phase.COPY and layers[0].facts.file_id is None
    return found[0].is_same_file(recorded[0]) or (may_change and found[0].path == recorded[0].path)


def settle_merge_into(path: AnyPath, options: OpenOptions) -> None:
    """Before the image at `path` is opened for writing, or frozen: finish a merge into it whose data is complete.

    The data is compared first: a record alone removes nothing. Raises ImageInUse if the target is incomplete,
    RecordRefused if the files needed to check that may not be opened, and what `merge` raises.
    """
    image = real_path(path)
    try:
        intent = demand_intent(record_of(image), allowed_folders(image, options.parent_dirs))
    except DamagedRecord:
        return
    if intent is None:
        return
    if intent.phase is Phase.REMOVE and not any(is_there(one) for one in intent.sources):
        _remove_rest(intent, options)  # only the record is left, and names that now belong to other images
    else:
        _finish_complete(intent, image, options)


def settle_merge_of(layers: Sequence[Layer], options: OpenOptions) -> bool:
    """After the chain `layers` was opened for writing: finish merges into its lower layers whose data is complete.

    Returns True if the layers were closed for that: the caller must open the chain again. A merge that was still
    copying does not matter to the leaf. A merge of layers below the leaf (by a server that died) is finished if
    possible: the leaf reads the same without that. Raises NotFound if the leaf was merged and is gone then; on any
    error the layers are closed.
    """
    paths = [real_path(file_of_layer(layer).name) for layer in layers]
    allowed = allowed_folders(paths[0], options.parent_dirs)
    leaf = named(layers[0])
    with contextlib.ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.close)
        for below in paths[1:]:
            intent = intent_of(below, allowed)
            if intent is None or intent.phase is Phase.COPY:
                continue
            stack.close()
            if any(map(leaf.is_same_file, intent.sources)):
                _finish_complete(intent, paths[0], options)
                raise errors.NotFound(f"was merged into {printable(below)}: open that image", path=paths[0])
            with contextlib.suppress(errors.VhdkitError):
                finish(intent, options, only_compare=True)
            return True
        stack.pop_all()
    return False


def open_settled(
    path: AnyPath, options: OpenOptions, danger: str | None = "writing to it would corrupt that image"
) -> list[Layer]:
    """Open a chain whose leaf is about to change, leaf first, with every merge of its layers finished first.

    A change to the leaf after its merge was recorded as complete would make that record wrong. `danger` is as for
    `open_layers`. Raises what
    `open_layers`, `settle_merge_into` and `settle_merge_of` raise; nothing stays open then.
    """
    settle_merge_into(path, options)
    layers = open_layers(path, writable=True, options=options, danger=danger)
    if settle_merge_of(layers, options):
        layers = open_layers(path, writable=True, options=options, danger=danger)
    return layers


def _finish_complete(intent: Intent, image: str, options: OpenOptions) -> None:
    if intent.phase is Phase.COPY or not is_there(intent.leaf):
        raise _interrupted(intent, image)
    finish(intent, options, only_compare=True)


@dataclass(frozen=True, slots=True, eq=False)
class _Remains:
    """What is left of a merge whose target is complete and whose leaf is gone.

    `held` are the files that are provably its sources, by path, each held as a writer; `left` are the paths of others
    that have the names of sources. `size_bytes` is the virtual size of the target.
    """

    intent: Intent
    size_bytes: int
    held: Mapping[str, FileStore]
    left: tuple[str, ...]


def _remove_rest(intent: Intent, options: OpenOptions) -> Merge:
    """The target is complete and the leaf is gone: remove the layers in between, and the record."""
    with _prepare_removal(intent, options) as remains:
        going = tuple(one for one in intent.sources if one.path in remains.held)
        remove_sources(replace(intent, sources=going), RealNames(intent.target.path, remains.held))
        drop_stale_marks(intent.target.path)
    merged, removed = tuple(one.path for one in intent.sources), tuple(remains.held)
    return Merge(intent.target.path, merged, removed, (), remains.size_bytes, 0, 0, 0, left=remains.left)


@contextlib.contextmanager
def _prepare_removal(intent: Intent, options: OpenOptions) -> Iterator[_Remains]:
    """Hold the target and those files that are provably sources of the merge (`INV-RECORD-PROVEN`). Changes nothing.

    Raises ImageInUse, HasChildren, InvalidArgument, `Replaced`, AccessDenied, IoFailed.
    """
    with contextlib.ExitStack() as held:
        size = _held_target_size(intent, held)
        rest: dict[str, FileStore] = {}
        left: list[str] = []
        places = allowed_folders(intent.target.path, options.parent_dirs)
        for one, below in itertools.pairwise([*intent.sources, intent.target]):
            if os.path.dirname(one.path) in places and is_there(one) and is_child_of(one, below):
                rest[one.path] = held.enter_context(FileStore.open_held(one.path, follow_links=False))
            elif exists(one.path):
                left.append(one.path)
        _refuse_children([one for one in intent.sources if one.path in rest], rest, places, options)
        yield _Remains(intent, size, rest, tuple(left))


def _held_target_size(intent: Intent, held: contextlib.ExitStack) -> int:
    """The virtual size of the target, which is held until `held` is closed, and is the image of the record."""
    target = held.enter_context(FileStore.open_held(intent.target.path))
    if intent_of(intent.target.path, (os.sep,)) != intent:
        raise errors.Replaced("another program is merging into it", path=intent.target.path)
    if _id_of(target) not in intent.target.ids:
        raise errors.InvalidArgument(
            "is not the target of the recorded merge",
            path=intent.target.path,
            hint=f"the record is out of date: move {printable(record_of(intent.target.path))} away",
        )
    return open_layer(pending.view(target)).size_bytes


def _refuse_children(
    going: Sequence[Named], held: Mapping[str, FileStore], places: Sequence[str], options: OpenOptions
) -> None:
    """Raise HasChildren if an image outside the merge is a child of one that will be removed."""
    folders = (*places, *map(os.path.dirname, held))
    families = children_of([(linkage_id_of(held[one.path]), one.path) for one in going], options, folders=folders)
    for one, family in zip(going, families, strict=True):
        if _id_of(held[one.path]) not in one.ids:
            raise errors.Replaced("was replaced while it was examined", path=one.path)
        children = [child for child in family if child.path not in held]
        if children:
            raise merge_would_break(one.path, children)


def is_child_of(one: Named, below: Named) -> bool:
    """True if the file is a child of the image that is its parent in the record."""
    try:
        with FileStore.open(one.path, follow_links=False) as store:
            view = pending.view(store)
            parent = formats.probed(view).facts(view).parent
        accepted = {*linkages_of_named(below)}
        return parent is not None and (not accepted.isdisjoint(parent.linkage_ids) or _is_raw(below, parent))
    except errors.VhdkitError:
        return False


def linkages_of_named(one: Named) -> tuple[bytes, ...]:
    """The ids that children of the named image may record: that of the file if it exists, else those in the record."""
    try:
        with FileStore.open(one.path, follow_links=False) as store:
            if _id_of(store) in one.ids:
                return (linkage_id_of(store),)
    except (errors.NotFound, errors.InvalidArgument):
        pass
    return one.ids


def _is_raw(one: Named, parent: ParentRef) -> bool:
    return parent.raw_allowed and one.unique_id == NULL_ID


def _id_of(store: FileStore) -> bytes:
    """The id by which records name the image in a file."""
    return pending.present_id_of(pending.view(store))
