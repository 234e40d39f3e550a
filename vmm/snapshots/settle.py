# SPDX-License-Identifier: Apache-2.0
"""What a command was in the middle of when it was killed: finished, or taken back.

    journal                     what is done
    create, apply: prepare      the new leaves were never used: they go, and so do unfinished folders
    create: prepare, live       the guest may have written to the new leaves: they are the machine's disks now, and the
                                images below them, on which no snapshot is, are merged when it is off
    commit                      put in place again what it says
    delete                      the folders that are left go
    merge                       when its data is complete it is finished; else it goes on at the next chance
    live merge                  the newest image in the line that the merge left is the machine's disk

Decides nothing about images that is not in the journal. The machine does not run, and nobody else is at its tree.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from itertools import pairwise

import vhdkit
from vmm import registry
from vmm.errors import InUse, VmmError
from vmm.registry import Changing, Machine
from vmm.removal import refuse_needed_folder, remove_image
from vmm.snapshots.memory import SnapshotFolder, applied_folder
from vmm.snapshots.steps import (
    Pivot,
    commit,
    finish_merge,
    options_of,
    options_of_all,
    pivoted,
    pivots_in,
    relocated,
    store_problem,
)
from vmm.snapshots.store import Held, load_tree
from vmm.snapshots.tree import Image
from vmm.spec import MachineSpec


@contextlib.contextmanager
def taken_back(held: Held, doing: str) -> Iterator[None]:
    """Whatever fails in the block, Ctrl-C too, is settled at once.

    Raises VmmError for failures of files and images.
    """
    try:
        yield
    except BaseException as error:
        with contextlib.suppress(VmmError):  # such as for a full disk: then the next command settles it
            held.tree = load_tree(held.machine)
            settle(held)
        if isinstance(error, OSError | vhdkit.VhdkitError):
            raise store_problem(error, doing) from error
        raise


def settle(held: Held) -> Changing:
    """Settle what the journal says; the machine as it is then. Raises VmmError, and tries again the next time."""
    journal = held.tree.journal
    machine = registry.load_for_change(held)
    if journal is None:
        return machine
    try:
        match journal["op"]:
            case "create" | "apply" if journal.get("live"):
                machine = adopt(held, pivots_in(journal))
                _discard(held, journal.get("folder"))
            case "create" | "apply":
                for one in pivots_in(journal):
                    remove_image(one.child, held)
                shutil.rmtree(applied_folder(machine.paths), ignore_errors=True)
                if journal["op"] == "create":
                    _discard(held, journal.get("folder"))
            case "commit":
                return commit(held)
            case "delete":
                for folder in journal["folders"]:
                    _discard(held, str(folder))
            case "merge":
                layers = [str(path) for path in journal["layers"]]
                _finish_complete(machine, layers[0])
                if not os.path.lexists(layers[0]):
                    _finish_removing(machine, str(journal["target"]))
                    machine = finish_merge(held, str(journal["target"]), layers)
            case "live-merge":
                machine = _follow(held, machine, str(journal["disk"]))
    except OSError as error:
        raise store_problem(error, "settle the machine's snapshots") from error
    held.note(None)
    return machine


def _finish_complete(machine: Machine, leaf: str) -> None:
    """A merge of the machine's own leaf whose data is complete is finished by opening the leaf, which is gone then."""
    for disk in machine.spec.disks:
        if disk.path == leaf and os.path.exists(leaf):
            with contextlib.suppress(vhdkit.VhdkitError):
                vhdkit.open_disk(leaf, writable=True, options=options_of(disk)).close()


def _finish_removing(machine: Machine, target: str) -> None:
    """The rest of a merge's layers, and its record, go."""
    options = options_of_all(machine.spec)
    with contextlib.suppress(vhdkit.VhdkitError):  # they only take up space
        if vhdkit.merge_under_way(target, options=options) is not None:
            vhdkit.resume_merge(target, options=options)


def adopt(held: Held, pivots: list[Pivot]) -> Changing:
    """The new leaves that are there are the machine's disks."""
    there = [one for one in pivots if os.path.exists(one.child)]
    for one in there:
        held.tree.grow(one.frozen, one.child, one.format)
    held.save()  # before the definition: an image that is not known is never removed
    return registry.update(held, lambda spec: pivoted(spec, there), check_images=False)


def _follow(held: Held, machine: Changing, disk_id: str) -> Changing:
    """After a live merge that nobody saw the end of: the disk's newest image, and what it really stands on."""
    disk = machine.spec.disk(disk_id)
    if disk is None or disk.path is None:
        return machine
    path = disk.path
    journal = held.tree.journal
    assert journal is not None
    try:
        if not os.path.exists(path):  # merged away: its target took its place
            path = str(journal["target"])
        while children := [one for one in vhdkit.find_children([path])[path] if one not in held.tree.images]:
            path = children[0]  # a leaf that the merge put on top meanwhile
        chain = vhdkit.chain_paths(path, options=options_of_all(machine.spec))
    except vhdkit.VhdkitError as error:
        raise store_problem(error, "follow the disk") from error
    return took_over(held, disk_id, chain)


def took_over(held: Held, disk_id: str, chain: list[str]) -> Changing:
    """The disk's chain is this one now, leaf first: the tree and the definition say so. The journal says the merge."""
    tree = held.tree
    journal = tree.journal
    assert journal is not None
    layers = [str(path) for path in journal["layers"]]
    if not os.path.lexists(layers[0]):
        tree.merged(str(journal["target"]), layers)
    image = tree.images.get(chain[0])
    leaf = (chain[0], image.format if image is not None else "vhd")
    for child, parent in pairwise(chain):
        known = tree.images.get(child)
        if known is None and parent in tree.images:
            tree.images[child] = Image(parent, ours=True)  # made by the merge
        elif known is not None and known.ours:
            tree.images[child] = Image(parent, ours=True, format=known.format)
    for path in [path for path, one in tree.images.items() if one.ours and not os.path.lexists(path)]:
        tree.forget(path)
    held.save()

    def follow(spec: MachineSpec) -> MachineSpec:
        disk = spec.disk(disk_id)
        assert disk is not None and disk.path is not None
        return spec if disk.path == leaf[0] else relocated(spec, {disk_id: leaf})

    return registry.update(held, follow, check_images=False)


def _discard(held: Held, folder: str | None) -> None:
    if folder is not None:
        with contextlib.suppress(InUse):  # another machine's by now
            refuse_needed_folder(folder, held)
            SnapshotFolder(folder).discard()
