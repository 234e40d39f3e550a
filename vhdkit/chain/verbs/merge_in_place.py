# SPDX-License-Identifier: Apache-2.0
"""Merges layers of a chain into one of them: plan, prepare, run.

Decides what may be merged, which locks each file needs, and in which order files change, so that the leaf reads the
same at every moment (`INV-MERGE-PRESERVES`). What is moved is decided in `merge_plan`, how a block receives it by its
format.

    plan      from the open layers alone: names, sizes, blocks
    prepare   every file of the merge is held as a writer; every reason against it is found now, while all of them
              still have their content
    run       1  record: copy        the target changes only in sectors that the leaf sees in a source
              2  record: relink      if requested: children of the leaf are repointed to the target, which is complete
              3  record: remove      the leaf is removed, then the others
              4  no record

Each step is on the device before the next one begins. After any interruption, `merge_recovery` continues: copying can
be repeated any number of times.

The target is open for reading in the chain, from which the plan is made. For writing it is opened once, in `prepare`,
so that a target that cannot be written to is found before anything changes. It is opened again after what an earlier
attempt had left was released, and when its size changes, since an open layer knows neither the new end of its file
nor the new size.

Some formats give an image another linkage id with the first write of each session (`Format.renewed_id`). Then the
layer above the target first records both ids, the new and the present one, durably; so it finds its parent at every
moment, and each attempt to resume does the same again. Children are repointed with the id that the target has after
it was filled. The record names files by their file ids, which never change, or in a format without them by the
linkage ids, of which the target has both: it is written before the layer above records the new one.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from vhdkit import errors, formats
from vhdkit.attributes import check_removable
from vhdkit.chain.engine.chain import Chain, Progress
from vhdkit.chain.names.children import children_of, drop_stale_marks
from vhdkit.chain.names.lineage import record_parents, same_content
from vhdkit.chain.names.marks import mark_child
from vhdkit.chain.names.noted import refuse_unwritten
from vhdkit.chain.names.options import OpenOptions
from vhdkit.chain.names.parents import allowed_folders
from vhdkit.chain.records import pending
from vhdkit.chain.records.intent import Intent, Named, Phase, intent_of, refuse_sources
from vhdkit.chain.verbs.create import link_of, linkage_of, require_names
from vhdkit.chain.verbs.merge_parts import (
    amount,
    file_of_layer,
    merge_would_break,
    named,
    named_target,
    refuse_sectors,
    seen_through,
)
from vhdkit.chain.verbs.merge_plan import MergePlan, plan_merge
from vhdkit.chain.verbs.merge_steps import (
    RealNames,
    accept_renewed_id,
    carry_out,
    check_size,
    drop_earlier_try,
    fill_target,
    is_complete,
    take_over_disk,
)
from vhdkit.folder import real_path
from vhdkit.formats import remember
from vhdkit.image import NULL_ID, ImageFacts, Layer
from vhdkit.store import FileStore


@dataclass(frozen=True, slots=True)
class Merge:
    """What a merge does, or has done. Paths are absolute; sizes are bytes.

    `removed` are the removed layers (with `to`, none), leaf first; `relinked` the new children of
    `target`. `data_bytes` are copied, `zero_bytes` become holes. `left` are files named like layers that were to be
    removed; they stay, because they are not provably those layers.
    """

    target: str
    merged: tuple[str, ...]
    removed: tuple[str, ...]
    relinked: tuple[str, ...]
    size_bytes: int
    data_bytes: int
    zero_bytes: int
    block_count: int
    left: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class InPlacePlan:
    """A merge of `sources`, leaf first, into `target`, above the layers `below`; `names` are theirs, target last.

    With `relink_children` the children of the leaf are repointed to the target.
    """

    sources: tuple[Layer, ...]
    target: Layer
    below: tuple[Layer, ...]
    names: tuple[Named, ...]
    moves: MergePlan
    relink_children: bool

    @property
    def changing(self) -> tuple[Layer, ...]:
        """The layers that are changed or removed, leaf first."""
        return (*self.sources, self.target)

    @property
    def size_bytes(self) -> int:
        """The virtual size that the target gets."""
        return self.moves.size_bytes

    def intent(self, phase: Phase) -> Intent:
        """The record of the merge in this phase."""
        return Intent(phase, self.names[-1], self.names[:-1], self.relink_children)


def plan_in_place(layers: Sequence[Layer], index: int, *, relink_children: bool) -> InPlacePlan:
    """The merge of the layers before `index` of an open chain into the one at `index`. Changes and locks nothing.

    Raises CorruptImage for a damaged source, InvalidArgument for one with smaller sectors than the target's.
    """
    sources, target, below = tuple(layers[:index]), layers[index], tuple(layers[index + 1 :])
    refuse_sectors(layers[: index + 1])
    names = tuple(named(layer) for layer in layers[: index + 1])
    moves = plan_merge(sources, target, below_bytes=seen_through(below))
    return InPlacePlan(sources, target, below, names, moves, relink_children)


@dataclass(slots=True, eq=False)
class PreparedMerge:
    """A merge whose files are held. `phase` is how far it is; `children` are the paths of those to be repointed.

    `held_children` are their files; `store` is the target's file, open for writing, and `filling` the image in it, if
    data must be copied. These three are only set if the merge will be carried out.
    """

    plan: InPlacePlan
    phase: Phase
    children: tuple[str, ...]
    held_children: tuple[FileStore, ...] = ()
    store: FileStore | None = None
    filling: Layer | None = None

    @property
    def intent(self) -> Intent:
        """The record of the merge, as it begins or continues."""
        intent = self.plan.intent(self.phase)
        return intent if self.filling is None else replace(intent, target=named_target(self.filling))


@contextlib.contextmanager
def prepare(
    plan: InPlacePlan,
    options: OpenOptions,
    phase: Phase = Phase.COPY,
    *,
    dry_run: bool = False,
    if_incomplete: errors.VhdkitError | None = None,
) -> Iterator[PreparedMerge]:
    """Hold every file of the merge as a writer, and refuse what may not be merged; no content changes yet.

    `phase` is the progress found in a record; if the target does not hold all of the leaf, data is copied again,
    or `if_incomplete` is raised if it is given. With `dry_run` nothing is opened for writing.
    Raises InvalidArgument, HasChildren, ImageInUse, NotesUnwritten, AccessDenied, `Replaced`, NoSpace, IoFailed.
    """
    for layer in plan.changing:
        file_of_layer(layer).lock(writer=True)
        if file_of_layer(layer).is_device:
            raise errors.InvalidArgument("is a device: it cannot be merged", path=file_of_layer(layer).name)
    refuse_unwritten([*plan.changing, *plan.below])
    for one in plan.names[:-1]:
        check_removable(one.path)
    _refuse_sources_of_another(plan, options)
    if phase is not Phase.COPY and not _is_complete(plan):
        phase = Phase.COPY  # the leaf has since been written to, or the record is wrong
    children = _children_to_repoint(plan, options, phase)
    _check_size(plan)
    if phase is Phase.COPY and if_incomplete is not None:
        raise if_incomplete
    if dry_run:
        yield PreparedMerge(plan, phase, children)
        return
    require_names(plan.changing)
    with contextlib.ExitStack() as held:
        stores = tuple(held.enter_context(_held_child(path, options.notes_folder)) for path in children)
        # The lock stays with the descriptor that holds it.
        store = held.enter_context(FileStore.open(plan.names[-1].path, writable=True, follow_links=False))
        store.notes_folder = options.notes_folder
        with same_content(store.name):  # no record says yet that a merge changes it
            filling = _settled_target(plan, store, phase)
        _check_disk(plan, filling)
        for layer in plan.sources:
            remember.disown(file_of_layer(layer))  # a source is removed without ever being opened for writing
        yield PreparedMerge(plan, phase, children, stores, store, filling)


def described(prepared: PreparedMerge) -> Merge:
    """What the merge would do."""
    return _result(prepared, amount(prepared.plan.moves))


def run(
    prepared: PreparedMerge, progress: Progress | None, before_removal: Callable[[InPlacePlan], None] | None = None
) -> Merge:
    """Carry the merge out, or the rest of it. Raises NoSpace, IoFailed, SyncFailed, AccessDenied, `Replaced`.

    `before_removal` is called when the target is complete and all children lead to it, while every source still
    exists; a merge with `relink_children` that is resumed calls it again, as long as no source was removed.
    """
    plan = prepared.plan
    intent = prepared.intent
    files = {one.path: file_of_layer(layer) for one, layer in zip(plan.names, plan.sources, strict=False)}
    names = RealNames(intent.target.path, files)
    repoint: list[Callable[[], None]] = [partial(_repoint, plan, child) for child in prepared.held_children]
    if before_removal is not None:
        assert plan.relink_children
        repoint.append(partial(before_removal, plan))
    done = carry_out(intent, names, partial(_fill, prepared, intent.target, progress), repoint)
    drop_stale_marks(intent.target.path)
    for child in prepared.held_children:
        record_parents(child.name, intent.target.path, _target_now(plan).linkage_id or NULL_ID)
    return _result(prepared, done)


# -- what is refused ---------------------------------------------------------------------------------------------


def _refuse_sources_of_another(plan: InPlacePlan, options: OpenOptions) -> None:
    """Raise ImageInUse for an image that another merge, whose data is complete, is about to remove."""
    names = list(plan.names)
    allowed = allowed_folders(names[0].path, options.parent_dirs)
    below = [one.path for one in names[1:]] + [real_path(file_of_layer(one).name) for one in plan.below]
    found = [intent for intent in (intent_of(path, allowed) for path in below) if intent is not None]
    refuse_sources(names, [one for one in found if not _is_merge_of(one, names)])


def _is_merge_of(intent: Intent, names: Sequence[Named]) -> bool:
    """Whether the record is about these files, the target last."""
    recorded = [*intent.sources, intent.target]
    return len(recorded) == len(names) and all(map(Named.is_same_file, recorded, names))


def _is_complete(plan: InPlacePlan) -> bool:
    same_size = plan.target.size_bytes == plan.size_bytes
    layers = (*plan.changing, *plan.below)
    return same_size and is_complete(plan.moves, Chain(layers), Chain(layers[len(plan.sources) :]))


def _check_size(plan: InPlacePlan) -> None:
    """Detect a size that the target cannot have before anything changes."""
    check_size(plan.target, plan.size_bytes)
    if plan.target.size_bytes < min(plan.size_bytes, seen_through(plan.below)):
        raise errors.InvalidArgument(
            "is smaller than its parent and than the leaf: what its parent has past its end would appear",
            path=plan.names[-1].path,
            hint="merge to a new file with --to",
        )


def _children_to_repoint(plan: InPlacePlan, options: OpenOptions, phase: Phase) -> tuple[str, ...]:
    """The leaf's children, to be relinked. Raises HasChildren for any image that the merge would break."""
    inside = {one.path for one in plan.names[:-1]}
    # Also by the names under which the layers were found, which may be links.
    folders = [real_path(os.path.dirname(layer.store.name)) for layer in plan.changing]
    images = [(linkage_of(layer), one.path) for layer, one in zip(plan.changing, plan.names, strict=True)]
    families = children_of(images, options, folders=folders)
    for number, (one, family) in enumerate(zip(plan.names, families, strict=True)):
        outside = [child for child in family if child.path not in inside]
        if number == len(plan.names) - 1 and phase is not Phase.COPY:
            continue  # they were repointed to it, and it no longer changes
        if outside and not (number == 0 and plan.relink_children and not any(child.problem for child in outside)):
            raise merge_would_break(one.path, outside, of_leaf=number == 0)
    return tuple(child.path for child in families[0] if child.path not in inside)


# -- the files that change ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def _held_child(path: str, notes_folder: str | None) -> Iterator[FileStore]:
    """A child that will be repointed, held as a writer."""
    with FileStore.open_held(path, writable=True, follow_links=False) as store:
        store.notes_folder = notes_folder
        pending.settle(store, content_stays=True)
        yield store


def _settled_target(plan: InPlacePlan, store: FileStore, phase: Phase) -> Layer | None:
    """The target, open for writing if data must be copied, without what an earlier attempt left after its blocks."""
    if store.identity != file_of_layer(plan.target).identity:
        raise errors.Replaced("was replaced while it was opened", path=store.name)
    pending.settle(store)
    if phase is not Phase.COPY:
        return None
    target = formats.reopened(plan.target, writable=True, store=store)
    if intent_of(store.name) is None:
        return target
    drop_earlier_try(target)
    return formats.reopened(plan.target, writable=True, store=store)


def _check_disk(plan: InPlacePlan, filling: Layer | None) -> None:
    """Refuse, before anything changes, a disk whose metadata do not fit into the target."""
    if filling is not None:
        take_over_disk(filling, plan.sources[0], dry_run=True)


def _fill(prepared: PreparedMerge, named: Named, progress: Progress | None) -> tuple[int, int]:
    """Copy into the target what it lacks; `named` is the target in the record. See `fill_target`."""
    plan, store, target = prepared.plan, prepared.store, prepared.filling
    assert store is not None and target is not None
    above = file_of_layer(plan.sources[-1])
    for layer in plan.sources:  # a killed writer may have left an id that is not on the device yet
        file_of_layer(layer).sync()

    def open_again() -> Layer:
        again = formats.reopened(plan.target, writable=True, store=store)
        accept_renewed_id(above, again, named)
        return again

    accept_renewed_id(above, target, named)
    return fill_target(plan.moves, target, open_again, progress)


def _target_now(plan: InPlacePlan) -> ImageFacts:
    """The target's present metadata; its linkage id may differ from the one when the chain was opened."""
    return formats.of(plan.target).facts(file_of_layer(plan.target))


def _repoint(plan: InPlacePlan, child: FileStore) -> None:
    path, facts = plan.names[-1].path, _target_now(plan)
    mark_child(child.name, child, path, facts.linkage_id or NULL_ID)
    with same_content(child.name):
        formats.for_children_of(plan.target).relink(child, link_of(child.name, path, facts))


def _result(prepared: PreparedMerge, counted: tuple[int, int]) -> Merge:
    plan = prepared.plan
    merged = tuple(one.path for one in plan.names[:-1])
    return Merge(
        target=plan.names[-1].path,
        merged=merged,
        removed=merged,
        relinked=prepared.children,
        size_bytes=plan.size_bytes,
        data_bytes=counted[0],
        zero_bytes=counted[1],
        block_count=len(plan.moves.units),
    )
