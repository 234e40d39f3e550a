# SPDX-License-Identifier: Apache-2.0
"""Completing or undoing an interrupted operation while the machine is off.

    CreateOff, Apply    the new leaves were never used: they are removed, and so are unfinished folders
    CreateLive          the guest may have written to the new leaves: they become the machine's disks, and the images
                        below them, which belong to no snapshot, are merged when it is off
    PutInPlace          its contents are put in place again
    Delete              the remaining folders are removed
    MergeOff            if its data is complete it is finished; otherwise it continues at the next opportunity
    MergeLive           the newest image in the chain that the merge left becomes the machine's disk
    Backup              as CreateLive, without folders; or, if the machine was off, as Apply
    the note of a backup    becomes such a journal

Decides nothing about images that are not in the journal, and removes no image that contains data. The machine does not
run, and its tree is locked. The operations of a running machine are settled by its worker (`worker.recovery`).
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import assert_never

import vhdkit
from vmm.model.errors import InUse, Refused, VmmError
from vmm.model.events import add_event
from vmm.model.formats import child_format
from vmm.model.spec import MachineSpec
from vmm.snapshots.dependents import parent_folders
from vmm.snapshots.steps import (
    commit,
    finish_merge,
    options_of_all,
    options_to_change,
    pivoted,
    relocated,
    store_problem,
)
from vmm.store import registry
from vmm.store.backup_note import has_note, read_note, remove_note
from vmm.store.images import guarded
from vmm.store.registry import Changing, Machine
from vmm.store.removal import refuse_needed_folder, remove_image
from vmm.store.snapshots.journal import (
    Apply,
    Backup,
    CreateLive,
    CreateOff,
    Delete,
    Journal,
    MergeLive,
    MergeOff,
    Pivot,
    PutInPlace,
    words_of,
)
from vmm.store.snapshots.memory import SnapshotFolder, applied_folder
from vmm.store.snapshots.proof import is_unused, options_on, stands_on
from vmm.store.snapshots.snapshot import Image
from vmm.store.snapshots.store import Held, tree_path


@contextlib.contextmanager
def taken_back(held: Held, doing: str) -> Iterator[None]:
    """If the block fails for any reason, Ctrl-C included, settle the operation at once.

    Raises VmmError for failures of files and images.
    """
    try:
        yield
    except BaseException as error:
        with contextlib.suppress(VmmError):  # for example, a full disk: the next command settles it
            held.reload()
            settle(held)
        if isinstance(error, OSError | vhdkit.VhdkitError):
            raise store_problem(error, doing) from error
        raise


def is_pending(held: Held) -> bool:
    """True if an interrupted operation must be settled."""
    return held.tree.journal is not None or has_note(held.machine)


def settle(held: Held) -> Changing:
    """Settle an interrupted operation; returns the machine. Raises VmmError, and the next command retries."""
    journal = held.take_over()
    if journal is not None:
        settle_journal(held, journal)
    if has_note(held.machine):
        settle_journal(held, take_over_note(held))
    return registry.load_for_change(held)


def settle_journal(held: Held, journal: Journal) -> None:
    """Settle a journal that the caller has taken over. Raises VmmError; the journal then stays."""
    try:
        match journal:
            case CreateLive(folder, pivots):
                adopt(held, pivots, must=journal.pivoted)
                discard(held, folder)
                held.done()
            case CreateOff(folder, pivots):
                remove_unused(held, pivots)
                discard(held, folder)
                held.done()
            case Apply(pivots):
                remove_unused(held, pivots)
                shutil.rmtree(applied_folder(held.machine), ignore_errors=True)
                held.done()
            case PutInPlace():
                commit(held)
            case Delete(folders):
                for folder in folders:
                    discard(held, folder)
                held.done()
            case MergeOff():
                _settle_merge(held, journal)
            case MergeLive():
                _follow(held, journal)
                held.done()
            case Backup():
                _settle_backup(held, journal)
            case _:
                assert_never(journal)
    except OSError as error:
        raise store_problem(error, "settle the machine's snapshots") from error
    except vhdkit.VhdkitError as error:
        raise store_problem(error, "settle the machine's snapshots") from error
    add_event(held.machine.events, "snapshots-settled", after=words_of(journal))


def _damaged(held: Held, problem: str) -> VmmError:
    return VmmError(f"is damaged: {problem}", machine=held.name, path=tree_path(held.machine))


def discard(held: Held, folder: str) -> None:
    """Remove vmm's files from a snapshot's folder, unless the tree knows the snapshot. Reports files that stay."""
    if os.path.basename(folder) in held.tree.snapshots:
        return
    try:
        refuse_needed_folder(folder, held)
    except InUse as error:
        add_event(held.machine.events, "snapshot-left", problem=error.problem, path=folder)
        return
    left = SnapshotFolder(folder).discard()
    if left:
        add_event(held.machine.events, "snapshot-left", problem="is not a file of a snapshot, and stays", path=left[0])


# -- new leaves ------------------------------------------------------------------------------------------------------


def remove_unused(held: Held, pivots: Sequence[Pivot]) -> None:
    """Remove new leaves that hold no data; report and keep any other file."""
    folders = parent_folders(registry.load_for_change(held).spec)
    for one in pivots:
        if not os.path.lexists(one.child):
            continue
        problem = None
        if os.path.islink(one.child) or not stands_on(one.child, one.frozen, folders):
            problem = f"does not stand on {one.frozen}"
        elif not is_unused(one.child, options_on(one.frozen, folders)):
            problem = "holds data"
        if problem is None:
            remove_image(one.child, held)
        else:
            add_event(held.machine.events, "snapshot-left", problem=f"{problem}, and stays", path=one.child)


def adopt(
    held: Held, pivots: Sequence[Pivot], *, ids: Mapping[str, str | None] | None = None, must: bool = False
) -> Changing:
    """Make the new leaves that exist the machine's disks. `ids`: the ids of leaves that are known to be served.

    `must`: the guest wrote to them, so a missing leaf is an error. Raises Refused, StoreFailed, VmmError.
    """
    there, folders = [], parent_folders(registry.load_for_change(held).spec)
    for one in pivots:
        if ids is None and not os.path.lexists(one.child):
            if must:
                raise Refused(
                    f"the newest image of {one.disk}, to which the guest wrote last, is missing",
                    machine=held.name, path=one.child,
                    hint=f"put it back; vmm repair {held.name} shows which images exist",
                )  # fmt: skip
            continue
        if ids is None and (os.path.islink(one.child) or not stands_on(one.child, one.frozen, folders)):
            raise Refused(
                f"does not stand on {one.frozen}, though it was made for {one.disk}", machine=held.name,
                path=one.child, hint=f"vmm repair {held.name} shows which images exist",
            )  # fmt: skip
        there.append(one)
    for one in there:
        child_id = vhdkit.image_id(one.child) if ids is None else ids.get(one.child)
        held.tree.grow(one.frozen, one.child, one.format, child_id=child_id)
    held.save()  # before the definition: an unknown image is never removed
    return registry.update(held, lambda spec: pivoted(spec, there), check_images=False)


# -- backups ---------------------------------------------------------------------------------------------------------


def take_over_note(held: Held) -> Backup:
    """Turn the note that 0.1.0 left of an interrupted backup into a journal. Raises StoreFailed for a damaged note."""
    note = read_note(held.machine)
    journal = Backup(tuple(
        Pivot(disk.id, one.frozen, one.child, "raw" if disk.format == "raw" else "vhd")
        for disk in registry.load_for_change(held).spec.disks
        if (one := note.get(disk.id)) is not None and _is_on(disk.path, one.frozen)
    ))  # fmt: skip
    held.begin(journal)
    remove_note(held.machine)
    return journal


def _is_on(path: str | None, frozen: str) -> bool:
    return path is not None and os.path.realpath(path) == os.path.realpath(frozen)


def _settle_backup(held: Held, journal: Backup) -> None:
    """Make the newest images the machine's disks, or remove new leaves that no guest has seen. What was frozen is in
    no snapshot, so it is merged when the machine is off, or by its next backup.
    """
    for one in journal.pivots:
        _finish_complete(registry.load_for_change(held), _known(held, one.frozen))
    if journal.merging:
        for one in journal.pivots:
            _follow(held, MergeLive(one.disk, one.frozen, (one.child,)))
    elif journal.live:
        adopt(held, journal.pivots, must=journal.pivoted)
    else:
        remove_unused(held, journal.pivots)
    for one in journal.pivots:
        held.tree.forget_users_image(_known(held, one.frozen))
    held.done()
    held.remove_empty()


# -- merges ----------------------------------------------------------------------------------------------------------


def _settle_merge(held: Held, journal: MergeOff) -> None:
    target = _known(held, journal.target)
    step = target
    for path in reversed(journal.layers):
        image = held.tree.images.get(path)
        if image is None or not image.ours or image.parent != step or step not in held.tree.images:
            raise _damaged(held, "its journal records a merge of images that it does not list")
        step = path
    _finish_complete(registry.load_for_change(held), target)
    if os.path.lexists(journal.layers[0]):
        held.done()
        return
    finish_merge(held, target, journal.layers)


def _known(held: Held, path: str) -> str:
    """The path by which the tree knows an image: 0.1.0 recorded links unresolved."""
    return path if path in held.tree.images else os.path.realpath(path)


def _finish_complete(machine: Machine, target: str) -> None:
    """Finish a merge whose data is complete, so that its layers and its record are removed: otherwise the next program
    that opens a leaf above it for writing would finish it, and the tree would not be updated. A merge whose data is
    not complete continues later.

    Raises VhdkitError; the journal or note then stays.
    """
    options = guarded(options_to_change(machine))
    if vhdkit.merge_under_way(target, options=options) is not None:
        with contextlib.suppress(vhdkit.InvalidArgument):
            vhdkit.resume_merge(target, options=options, only_complete=True)


def _follow(held: Held, journal: MergeLive) -> None:
    """After a live merge whose end was not seen: find the disk's newest image and what it really stands on."""
    machine = registry.load_for_change(held)
    disk = machine.spec.disk(journal.disk)
    if disk is None or disk.path is None:
        return
    _finish_complete(machine, _known(held, journal.target))
    path = disk.path
    if not os.path.exists(path):  # it was merged away, and its target took its place
        if path not in journal.layers or _known(held, journal.target) not in held.tree.images:
            raise _damaged(held, "its journal records a merge of images that it does not list")
        path = _known(held, journal.target)
    while children := [one for one in vhdkit.find_children([path])[path] if one not in held.tree.images]:
        if len(children) > 1:
            raise Refused(
                f"{len(children)} images stand on it, and which of them is the newest is unknown",
                machine=held.name, path=path, hint=f"vmm repair {held.name} lists them",
            )  # fmt: skip
        path = children[0]  # a leaf that the merge put on top in the meantime
    chain = vhdkit.chain_paths(path, options=options_of_all(machine.spec))
    record_chain(held, journal, {one: vhdkit.image_id(one) for one in chain})


def record_chain(held: Held, journal: MergeLive, chain: Mapping[str, str | None]) -> Changing:
    """Record the chain that the disk has after a merge (leaf first, path -> id) in definition and tree.

    The definition is written, and the tree with the caller's next step: repeating this with the same journal has the
    same result.
    """
    tree, paths = held.tree, list(chain)
    if not os.path.lexists(journal.layers[0]):
        tree.merged(_known(held, journal.target), journal.layers)
    image = tree.images.get(paths[0])
    disk = registry.load_for_change(held).spec.disk(journal.disk)
    made = child_format(disk.format if disk is not None else None)  # of images that the merge made
    leaf = (paths[0], image.format if image is not None else made)
    for child, parent in reversed(list(pairwise(paths))):  # the oldest first: a new leaf may stand on a new one
        known = tree.images.get(child)
        if known is None and parent in tree.images:
            tree.images[child] = Image(parent, ours=True, format=made, id=chain[child])
        elif known is not None and known.ours:
            tree.images[child] = replace(known, parent=parent, id=known.id or chain[child])
    for path in [path for path, one in tree.images.items() if one.ours and not os.path.lexists(path)]:
        tree.forget(path)

    def follow(spec: MachineSpec) -> MachineSpec:
        disk = spec.disk(journal.disk)
        if disk is None or disk.path == leaf[0]:
            return spec
        return relocated(spec, {journal.disk: leaf})

    return registry.update(held, follow, check_images=False)
