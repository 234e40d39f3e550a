# SPDX-License-Identifier: Apache-2.0
"""Other users of a machine's images: files that stand on them, and other machines that use them.

Decides where dependants are searched: beside the images, in every folder in which any registered machine or snapshot
has images, and in the folders that it allows for parents. What is done about them is decided by the delete rule.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace

import vhdkit
from vmm.model.errors import Refused, store_error
from vmm.model.spec import MachineSpec
from vmm.store import known_images, registry
from vmm.store.backup_note import is_child_name
from vmm.store.filling import images_being_filled
from vmm.store.registry import Machine
from vmm.store.snapshots import deletion_plan as rule
from vmm.store.snapshots.journal import OWN_NAME
from vmm.store.snapshots.kept import Kept
from vmm.store.snapshots.proof import doubt
from vmm.store.snapshots.store import Held, has_tree, load_tree, tree_path
from vmm.store.snapshots.tree import Tree


@dataclass(slots=True)
class Survey:
    """The result of a search. `problem` says why it may be incomplete."""

    foreign: dict[str, list[str]] = field(default_factory=dict)
    held: set[str] = field(default_factory=set)
    problem: str | None = None


def images_of(spec: MachineSpec) -> dict[str, str]:
    """Disk id -> image, for the images that the machine writes to."""
    return {disk.id: disk.path for disk in spec.disks if disk.is_writable_image and disk.path is not None}


def parent_folders(spec: MachineSpec) -> tuple[str, ...]:
    """Further folders in which the machine's images may have parents, besides their own."""
    return tuple(dict.fromkeys(folder for disk in spec.disks for folder in disk.parent_dirs))


def survey(machine: Machine, tree: Tree) -> Survey:
    """Find all files that stand on the tree's images, and machines that use them. Raises StoreFailed, AccessDenied."""
    found = Survey()
    present = {os.path.realpath(path): path for path in tree.images if os.path.exists(path)}
    folders = set(_folders(machine.spec))
    known = known_images.look()
    folders.update(map(os.path.dirname, known.images))
    others, failures = registry.load_all()
    for other in others:
        if other.paths.folder == machine.paths.folder:  # not by id: a copied folder has the id of its original
            continue
        folders.update(_folders(other.spec))
        if has_tree(other.paths):
            load_tree(other.paths)  # raises if it is damaged
        used = known.by_machine.get(other.name, frozenset())
        found.held.update(present[path] for path in used if path in present)
    if failures:
        found.problem = (
            f"the machine {failures[0].machine} cannot be read, and may need any image: {failures[0].problem}"
        )
    elif known.unread:
        found.problem = f"the machine {known.unread[0]} cannot be read, and may need any image"
    options = vhdkit.OpenOptions(parent_dirs=tuple(folders), allow_raw_parent=True, known_images=known.images)
    there = [one for one in folders if os.path.isdir(one)]
    try:
        families = vhdkit.find_children(list(present.values()), folders=there, everywhere=True, options=options)
    except vhdkit.VhdkitError as error:
        raise store_error(error) from error
    for path, family in families.items():
        real = os.path.realpath(path)
        strangers = [one for one in family if one not in present and _stands_on(one, real, tuple(folders))]
        if strangers:
            found.foreign[path] = strangers
    return found


def refuse_older(machine: Machine, tree: Tree) -> None:
    """Raise Refused if the machine's definition names an image on which a newer image of its own stands.

    A newer image is one that vmm made and that belongs to no other machine. If the older one were copied or frozen
    again, it would be mistaken for the present state. Raises StoreFailed.
    """
    paths = [path for path in images_of(machine.spec).values() if os.path.exists(path)]
    try:
        families = vhdkit.find_children(paths)
    except vhdkit.VhdkitError as error:
        raise store_error(error) from error
    children = {child: path for path, family in families.items() for child in family}
    if not children:
        return
    known = known_images.look().by_machine
    others = frozenset().union(*(images for name, images in known.items() if name != machine.name))
    for child, path in children.items():
        is_own = child in tree.images or OWN_NAME.fullmatch(os.path.basename(child)) or is_child_name(child)
        if is_own and os.path.realpath(child) not in others:
            raise Refused(
                f"{child} stands on it, and may have the latest writes", machine=machine.name, path=path,
                hint=f"vmm repair {machine.name} checks whether that is the newest image, and then uses it",
            )  # fmt: skip


def _stands_on(child: str, parent: str, folders: tuple[str, ...]) -> bool:
    """False only if the image certainly stands on another file with the same id: a copy of the parent."""
    options = vhdkit.OpenOptions(parent_dirs=folders, allow_raw_parent=True)
    try:
        return vhdkit.chain_paths(child, options=options)[1:2] == [parent]
    except vhdkit.VhdkitError:
        return True


def judge(machine: Machine, tree: Tree, *, proved: Collection[str] = ()) -> rule.Plan:
    """Apply the delete rule to the machine's images. Raises as `survey`.

    An image that is recorded as ours but may be a different file stays, and so does everything below it. `proved`:
    images that the caller has already verified.
    """
    if not tree.images:
        return rule.Plan()
    found = survey(machine, tree)
    folders = parent_folders(machine.spec)
    ours = {path: one for path, one in tree.images.items() if one.ours and path not in proved}
    doubts = {path: why for path, one in ours.items() if (why := doubt(path, one, folders)) is not None}
    filling = images_being_filled(machine.paths) - set(proved)
    needed = replace(tree, kept=tuple(needed_kept(machine, tree)))
    plan = rule.plan(
        tree.images, frozen=needed.frozen(), live=images_of(machine.spec).values(),
        foreign=found.foreign, held=found.held | set(doubts) | filling,
    )  # fmt: skip
    plan = replace(plan, kept={**plan.kept, **doubts})
    if found.problem is None:
        return plan
    doubtful = [*plan.unlink, *(one.target for one in plan.merges)]
    return rule.Plan(kept={**plan.kept, **dict.fromkeys(doubtful, found.problem)})


def needed_kept(machine: Machine, tree: Tree) -> list[Kept]:
    """The kept layers that still serve: a state of the machine stands on each, and the process that writes the night,
    if it is still being written, lives.
    """
    if not tree.kept:
        return []
    leaves = {
        *images_of(machine.spec).values(),
        *(path for one in tree.snapshots.values() for path in one.disks.values()),
    }
    below, facts = tree.below(leaves), os.stat(tree_path(machine.paths))
    return [
        one for one in tree.kept
        if one.image in below and (one.maker is None or not vhdkit.is_maker_dead(one.maker, facts))
    ]  # fmt: skip


def drop_unneeded(held: Held, machine: Machine) -> None:
    """End the keeping of layers that no longer serve. Raises NoSpace, AccessDenied."""
    needed = needed_kept(machine, held.tree)
    if held.tree.keep_only(lambda one: one in needed):
        held.save()


def possible_now(machine: Machine, merge: rule.LayerMerge) -> rule.LayerMerge | None:
    """What of a merge can be made while the machine runs: that of the layers of the disk's present size. None if that
    is nothing; the merge itself if it is not part of a disk to which the machine writes. Raises StoreFailed.
    """
    for disk in machine.spec.disks:
        if not disk.is_writable_image or disk.path is None:
            continue
        kind = None if disk.format is None else vhdkit.FormatName(disk.format)
        raw = disk.allow_raw_parent or disk.format == "raw"
        options = vhdkit.OpenOptions(parent_dirs=disk.parent_dirs, allow_raw_parent=raw, format_name=kind, lock=False)
        try:
            with vhdkit.open_disk(disk.path, options=options) as opened:
                sizes = {os.path.realpath(one.store.name): one.size_bytes for one in opened.chain.layers}
                present = opened.size_bytes
        except vhdkit.VhdkitError as error:
            raise store_error(error) from error
        newest_first = [*merge.layers, merge.target]
        if os.path.realpath(merge.target) not in sizes:
            continue
        wanted = [os.path.realpath(path) for path in newest_first]
        count = next((number for number, one in enumerate(wanted) if sizes.get(one) != present), len(wanted))
        fitting = newest_first[:count]
        return rule.LayerMerge(fitting[-1], tuple(fitting[:-1])) if len(fitting) > 1 else None
    return merge


def _folders(spec: MachineSpec) -> Iterable[str]:
    for disk in spec.disks:
        if disk.is_image and disk.path is not None:
            yield os.path.dirname(os.path.abspath(disk.path))
            yield from disk.parent_dirs
