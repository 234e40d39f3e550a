# SPDX-License-Identifier: Apache-2.0
"""What else needs a machine's images: files that stand on them, and other machines that use them.

Decides where dependants are looked for: beside the images, in every folder in which any registered machine or snapshot
has images, and in those in which it allows parents. What is done about them is decided by the rule.
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
from vmm.store.registry import Machine
from vmm.store.snapshots import deletion_plan as rule
from vmm.store.snapshots.journal import OWN_NAME
from vmm.store.snapshots.proof import doubt
from vmm.store.snapshots.store import has_tree, load_tree
from vmm.store.snapshots.tree import Tree


@dataclass(slots=True)
class Survey:
    """What was found. `problem` says why nobody can be sure that it is all."""

    foreign: dict[str, list[str]] = field(default_factory=dict)
    held: set[str] = field(default_factory=set)
    problem: str | None = None


def images_of(spec: MachineSpec) -> dict[str, str]:
    """Disk id -> image of what the machine writes to."""
    return {disk.id: disk.path for disk in spec.disks if disk.is_writable_image and disk.path is not None}


def parent_folders(spec: MachineSpec) -> tuple[str, ...]:
    """The folders in which one of the machine's images may have parents, besides its own."""
    return tuple(dict.fromkeys(folder for disk in spec.disks for folder in disk.parent_dirs))


def survey(machine: Machine, tree: Tree) -> Survey:
    """Look for all that stands on the tree's images or uses them. Raises StoreFailed, AccessDenied."""
    found = Survey()
    present = {os.path.realpath(path): path for path in tree.images if os.path.exists(path)}
    folders = set(_folders(machine.spec))
    known = known_images.look()
    folders.update(map(os.path.dirname, known.images))
    others, failures = registry.load_all()
    for other in others:
        if other.paths.folder == machine.paths.folder:  # not by id: a copied folder has that of another machine
            continue
        folders.update(_folders(other.spec))
        if has_tree(other.paths):
            load_tree(other.paths)  # raises for one that is damaged
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
    """Raise Refused for a machine whose definition names an image on which a newer one of its own stands.

    Newer ones are those that vmm made, for this machine as far as is known. Copied, or frozen once more, the older one
    would pass for the present state. Raises StoreFailed.
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
                f"{child} stands on it, and may hold what was written last", machine=machine.name, path=path,
                hint=f"vmm repair {machine.name} shows whether that is the newest image, and takes it on",
            )  # fmt: skip


def _stands_on(child: str, parent: str, folders: tuple[str, ...]) -> bool:
    """False only for an image that surely stands on another file of the same id: a copy of the parent."""
    options = vhdkit.OpenOptions(parent_dirs=folders, allow_raw_parent=True)
    try:
        return vhdkit.chain_paths(child, options=options)[1:2] == [parent]
    except vhdkit.VhdkitError:
        return True


def judge(machine: Machine, tree: Tree, *, proved: Collection[str] = ()) -> rule.Plan:
    """What the delete rule says about the machine's images now. Raises as `survey`.

    An image that is recorded as made for the machine, and may be another one, stays, and so does what it stands on.
    `proved`: of these somebody has made sure already.
    """
    if not tree.images:
        return rule.Plan()
    found = survey(machine, tree)
    folders = parent_folders(machine.spec)
    ours = {path: one for path, one in tree.images.items() if one.ours and path not in proved}
    doubts = {path: why for path, one in ours.items() if (why := doubt(path, one, folders)) is not None}
    plan = rule.plan(
        tree.images, frozen=tree.frozen(), live=images_of(machine.spec).values(),
        foreign=found.foreign, held=found.held | set(doubts),
    )  # fmt: skip
    plan = replace(plan, kept={**plan.kept, **doubts})
    if found.problem is None:
        return plan
    doubtful = [*plan.unlink, *(one.target for one in plan.merges)]
    return rule.Plan(kept={**plan.kept, **dict.fromkeys(doubtful, found.problem)})


def _folders(spec: MachineSpec) -> Iterable[str]:
    for disk in spec.disks:
        if disk.is_image and disk.path is not None:
            yield os.path.dirname(os.path.abspath(disk.path))
            yield from disk.parent_dirs
