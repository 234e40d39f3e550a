# SPDX-License-Identifier: Apache-2.0
"""Repairing a machine whose definition names an image that is not its newest.

    operation   an operation was interrupted: it is settled, as any command does
    adopt       images stand on the one that the definition names, and nothing else uses them: the newest becomes the
                machine's disk
    new leaf    the definition names an image that a snapshot keeps: it gets a new leaf
    give up     the image that the definition names is missing: the one below it becomes the disk, only on request

Decides which image is the newest, and never guesses: if two images stand on the same one, the user must say
which it is. Nothing is removed or moved here. The machine does not run.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, TypeGuard

import vhdkit
from vmm.api import machines
from vmm.model.errors import InUse, NotFound, VmmError, WrongState
from vmm.model.events import add_event
from vmm.model.formats import ImageFormat, child_format
from vmm.model.spec import DiskSpec
from vmm.snapshots.recovery import is_pending, settle, settle_journal
from vmm.snapshots.steps import child_path, options_to_change, relocated, store_problem
from vmm.store import registry
from vmm.store.backup_note import has_note, is_child_name, remove_note
from vmm.store.registry import Changing, Machine
from vmm.store.snapshots.journal import Backup, CreateLive, Journal, words_of
from vmm.store.snapshots.store import Held, holding, load_tree
from vmm.store.snapshots.tree import Tree

RepairKind = Literal["operation", "adopt", "new leaf", "give up"]
_MAX_DEPTH = 300
_OWN_NAME = re.compile(r".+_[0-9a-f]{8}(-[0-9]+)?\.avhdx?")  # of images made for snapshots, or by a merge of one


@dataclass(frozen=True, slots=True)
class RepairStep:
    """One problem that was found. `remedy` is what is done about it; if it is None, `hint` is what the user can do.

    `chain` are the images that become the disk, the newest last, each on the one before; the first exists already.
    """

    kind: RepairKind
    problem: str
    remedy: str | None
    disk: str | None = None
    path: str | None = None
    chain: tuple[str, ...] = ()
    hint: str | None = None


def look(machine: Machine, *, leaf: str | None = None, give_up_missing: bool = False) -> list[RepairStep]:
    """What is wrong with a machine's disks, as its files say now. `leaf` names the newest image if that
    cannot be determined. Raises NotFound for a leaf that is not one of them, StoreFailed, VmmError.
    """
    tree = load_tree(machine.paths)
    found: list[RepairStep] = []
    if tree.journal is not None or has_note(machine.paths):
        doing = words_of(tree.journal) if tree.journal is not None else "a backup"
        found.append(RepairStep("operation", f"{doing} was cut short", "it is settled, as by the next command"))
    if _needs_new_leaves(tree.journal):
        found += [
            _missing(one.disk, one.child, one.frozen, (), give_up=give_up_missing)
            for one in tree.journal.pivots if not os.path.lexists(one.child)
        ]  # fmt: skip
    wanted = None if leaf is None else os.path.realpath(leaf)
    others = _used_by_others(machine)
    for disk in machine.spec.disks:
        if disk.is_writable_image and disk.path is not None:
            step = _look_at(disk, disk.path, tree, others, wanted, give_up_missing)
            if step is not None:
                found.append(step)
    if wanted is not None and not any(step.chain[-1:] == (wanted,) for step in found):
        raise NotFound("is not one of the newest images of a disk", machine=machine.name, path=leaf)
    return found


def repair(
    name: str, *, dry_run: bool = False, leaf: str | None = None, give_up_missing: bool = False
) -> list[RepairStep]:
    """Look, and do what helps unless `dry_run`; see `Manager.repair`. Raises WrongState while it runs."""
    with machines.open(name, settles=False) as found:
        machine = found.opened
        if found.is_running:
            raise WrongState(
                "runs, and the server of its disks knows the newest images", machine=name,
                hint=f"any command settles what was cut short; or shut it down: vmm shutdown {name}",
            )  # fmt: skip
        if dry_run:
            return look(machine, leaf=leaf, give_up_missing=give_up_missing)
        with holding(machine.paths, name) as held:
            return _repair(held, leaf, give_up_missing)


def _repair(held: Held, leaf: str | None, give_up_missing: bool) -> list[RepairStep]:
    machine = registry.load_for_change(held)
    steps = look(machine, leaf=leaf, give_up_missing=give_up_missing)
    problem: VmmError | None = None
    if is_pending(held):
        try:
            settle(held)
        except VmmError as error:
            problem = error
            journal = held.take_over()
            if give_up_missing and _needs_new_leaves(journal):
                settle_journal(held, replace(journal, pivoted=False))
                problem = None
    done = [one for one in steps if one.kind == "operation" and problem is None]
    held.take_over()  # the rest is settled once every disk is on its newest image
    rest = look(registry.load_for_change(held), leaf=None, give_up_missing=give_up_missing)
    disks = [one for one in (rest if leaf is None else steps) if one.kind != "operation"]
    for step in disks:
        if step.remedy is not None:
            _take_on(held, step)
    if problem is not None:
        if not disks or any(one.remedy is None for one in disks):
            raise problem
        if held.tree.journal is not None:
            held.done()
        remove_note(held.machine)
    for step in disks:
        add_event(held.machine.events, "repaired", disk=step.disk, problem=step.problem, path=step.chain[-1:])
    return [*done, *disks]


def _needs_new_leaves(journal: Journal | None) -> TypeGuard[CreateLive | Backup]:
    """True if the guest wrote to the new leaves that the journal names, and none of them may be gone yet."""
    match journal:
        case CreateLive():
            return journal.pivoted
        case Backup():
            return journal.pivoted and not journal.merging
        case _:
            return False


def _take_on(held: Held, step: RepairStep) -> Changing:
    assert step.disk is not None and step.chain
    chain = list(step.chain)
    disk = registry.load_for_change(held).spec.disk(step.disk)
    known = held.tree.images.get(chain[0])
    kind: ImageFormat = "vhd"
    if known is not None:
        kind = known.format
    elif disk is not None and disk.format is not None:
        kind = disk.format
    above = child_format(kind)
    try:
        if not os.path.exists(chain[-1]):
            options = options_to_change(registry.load_for_change(held))
            below = vhdkit.FormatName(kind if len(chain) == 2 else above)
            vhdkit.create_child(chain[-1], chain[-2], options=replace(options, format_name=below))
        for parent, child in pairwise(chain):
            held.tree.grow(parent, child, kind if parent == chain[0] else above, child_id=vhdkit.image_id(child))
    except vhdkit.VhdkitError as error:
        raise store_problem(error, "adopt the newest image") from error
    held.save()  # before the definition: an unknown image is never removed
    newest = (chain[-1], above if len(chain) > 1 else kind)
    return registry.update(held, lambda spec: relocated(spec, {str(step.disk): newest}), check_images=True)


# -- looking --------------------------------------------------------------------------------------------------------


def _look_at(
    disk: DiskSpec, path: str, tree: Tree, others: set[str], wanted: str | None, give_up: bool
) -> RepairStep | None:
    start = path
    if not os.path.exists(path):
        below = _below(disk.id, path, tree)
        if below is None:
            return RepairStep(
                "give up", "is missing", None, disk.id, path, hint="put it back; nothing below it is known"
            )
        start = below
    frozen = {os.path.realpath(one) for one in tree.frozen()} | others
    tips = _tips(start, frozen)
    if wanted is not None:
        tips = [one for one in tips if one[-1] == wanted]
    if len(tips) > 1:
        names = ", ".join(one[-1] for one in tips)
        return RepairStep(
            "adopt", f"{len(tips)} images descend from it, and the newest cannot be determined: {names}", None,
            disk.id, start, hint="name the newest one: --leaf IMAGE",
        )  # fmt: skip
    if tips and wanted is None and not all(one in tree.images or _is_own_name(one) for one in tips[0]):
        return RepairStep(
            "adopt", f"{tips[0][-1]} stands on it, and its name is not one that vmm gives", None, disk.id, start,
            hint=f"if it is the machine's newest image: --leaf {tips[0][-1]}",
        )  # fmt: skip
    if tips:
        return RepairStep(
            "adopt", f"is not the newest image: {tips[0][-1]} stands on it, and no machine uses that image",
            f"{tips[0][-1]} becomes the disk", disk.id, start, (start, *tips[0]),
        )  # fmt: skip
    is_frozen = os.path.realpath(start) in frozen
    chain = (start, child_path(start, disk.format or "vhd")) if is_frozen else (start,)
    if start != path:
        return _missing(disk.id, path, start, chain, give_up=give_up)
    if is_frozen and os.path.realpath(start) not in others:
        return RepairStep(
            "new leaf", "a snapshot needs it unchanged, and the machine would write to it",
            f"it gets the new leaf {chain[-1]}", disk.id, path, chain,
        )  # fmt: skip
    return None


def _missing(disk_id: str, path: str, below: str, chain: tuple[str, ...], *, give_up: bool) -> RepairStep:
    remedy = f"the machine continues from {below}, without what was written to the missing image"
    return RepairStep(
        "give up", "is missing", remedy if give_up else None, disk_id, path, chain,
        hint=f"put it back; if it is lost: --give-up-missing continues from {below}",
    )  # fmt: skip


def _is_own_name(path: str) -> bool:
    return _OWN_NAME.fullmatch(os.path.basename(path)) is not None or is_child_name(path)


def _below(disk_id: str, path: str, tree: Tree) -> str | None:
    """The nearest image that a missing one stood on and that exists; None if unknown."""
    step: str | None = path
    while step is not None and not os.path.exists(step):
        image = tree.images.get(step)
        step = image.parent if image is not None else None
    if step is None and tree.now is not None:
        step = tree.snapshots[tree.now].disks.get(disk_id)
    return step if step is not None and os.path.exists(step) else None


def _tips(start: str, kept: set[str]) -> list[tuple[str, ...]]:
    """The paths from an image to the newest images that build on it, without images that are kept or in use."""
    found: list[tuple[str, ...]] = []
    ways: list[tuple[str, ...]] = [()]
    while ways:
        way = ways.pop()
        here = way[-1] if way else start
        try:
            children = vhdkit.find_children([here])[here] if len(way) < _MAX_DEPTH else []
        except vhdkit.VhdkitError as error:
            raise store_problem(error, "look for the newest image") from error
        free = [one for one in children if os.path.realpath(one) not in kept and one not in way]
        ways += [(*way, one) for one in free]
        if way and not free:
            found.append(way)
    return [one for one in found if not any(_leads_to_kept(image, kept) for image in one)]


def _leads_to_kept(path: str, kept: set[str]) -> bool:
    """True if a snapshot keeps an image that stands on this one, which then belongs to that branch."""
    return any(os.path.realpath(one) in kept for one in vhdkit.find_children([path])[path])


def _used_by_others(machine: Machine) -> set[str]:
    """Real paths of all images that other machines' definitions and snapshots name. Raises InUse, VmmError."""
    machines, failures = registry.load_all()
    if failures:
        raise InUse(
            f"the machine {failures[0].machine} cannot be read, and may use any image: {failures[0].problem}",
            machine=machine.name,
        )  # fmt: skip
    found: set[str] = set()
    for other in machines:
        if os.path.realpath(other.paths.folder) != os.path.realpath(machine.paths.folder):
            tree = load_tree(other.paths)
            disks = [disk.path for disk in other.spec.disks if disk.path is not None and disk.is_image]
            found.update(os.path.realpath(one) for one in (*disks, *tree.frozen(), *tree.images))
    return found
