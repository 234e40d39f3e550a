# SPDX-License-Identifier: Apache-2.0
"""A machine's snapshots, taken, applied, deleted and merged, for `soak` to kill: every state reads as it did.

The machine is off; what a guest would have written is written by us. After each verb the hash of every state is noted,
so that after a kill each state that is there can be judged.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from pathlib import Path

import vhdkit
import vmm
from vmm import registry
from vmm.snapshots import fold
from vmm.snapshots.door import MachineSnapshots
from vmm.snapshots.settle import settle as settle_held
from vmm.snapshots.store import holding, load_tree

NAME = "soak"
_DISK = 1 << 20
_IMAGES = ("one.vhd", "two.vhd")
_NOTE = "states.json"  # {"now" or snapshot: hash}
_VERBS = ("create", "write", "apply", "delete", "subtree", "merge")


def _here() -> None:
    """The machines of the working directory, which is another each time."""
    os.environ["VMM_HOME"] = os.path.abspath("home")
    os.environ["VMM_RUNTIME"] = os.path.abspath("run")


def prepare() -> None:
    """A machine with two disks. Its paths are absolute: those of the folder `work` beside this, a copy of it."""
    place = os.path.join(os.path.dirname(os.getcwd()), "work")
    os.symlink(os.getcwd(), place)
    try:
        os.environ.update(VMM_HOME=os.path.join(place, "home"), VMM_RUNTIME=os.path.join(place, "run"))
        images = [os.path.join(place, name) for name in _IMAGES]
        for image in images:
            vhdkit.create_image(image, _DISK, block_size_bytes=512 << 10)
        vmm.Manager().create(NAME, disks=[vmm.DiskWish(image) for image in images])
        _note()
    finally:
        os.unlink(place)


def _snapshots() -> MachineSnapshots:
    _here()
    snapshots = vmm.Manager().snapshots(NAME)
    snapshots._merge_in_background = lambda: None  # type: ignore[method-assign]
    return snapshots


def _digest(paths: dict[str, str]) -> str:
    found = hashlib.sha256()
    for _, path in sorted(paths.items()):
        with vhdkit.open_disk(path, options=vhdkit.OpenOptions(lock=False)) as disk:
            found.update(disk.read(0, disk.size_bytes))
    return found.hexdigest()


def _states() -> dict[str, str]:
    machine = registry.load(NAME)
    present = {disk.id: str(disk.path) for disk in machine.spec.disks}
    tree = load_tree(machine.paths)
    return {one.id: _digest(dict(one.disks)) for one in tree.snapshots.values()} | {"now": _digest(present)}


def _note() -> None:
    Path(f"{_NOTE}.new").write_text(json.dumps(_states()))
    os.rename(f"{_NOTE}.new", _NOTE)


def work() -> None:
    """Random verbs, one after the other, in a process that is killed."""
    snapshots = _snapshots()
    rng = random.Random(os.urandom(8))
    settle()
    _note()
    for _ in range(12):
        verb = rng.choice(_VERBS)
        there = list(snapshots.tree().snapshots)
        if verb == "create" or not there:
            snapshots.create()
        elif verb == "write":
            for disk in registry.load(NAME).spec.disks:
                with vhdkit.open_disk(str(disk.path), writable=True) as opened:
                    opened.write(rng.randrange(0, _DISK, 4096), rng.randbytes(4096))
        elif verb == "apply":
            snapshots.apply(rng.choice(there), discard_current=True)
        elif verb == "merge":
            snapshots.merge()
        else:
            snapshots.delete(rng.choice(there), subtree=verb == "subtree")
        _note()


def settle() -> None:
    """What any next command does first."""
    machine = registry.load(NAME)
    with holding(machine.paths, NAME) as held:
        settle_held(held)


def look(done: bool) -> None:
    """Each state that was noted and is there reads as it did; the present one too, unless it was being changed."""
    _here()
    before: dict[str, str] = json.loads(Path(_NOTE).read_text())
    settle()
    states = _states()
    for one, digest in states.items():
        if one in before and one != "now":
            assert digest == before[one], f"the snapshot {one} reads otherwise"
        elif one != "now":
            assert digest == before["now"], f"the new snapshot {one} is not what the machine was"
    if done:
        machine = registry.load(NAME)
        fold.Fold(machine.paths, machine.runtime).run()
        after = _states()
        assert after == states, "a merge changed what a state reads as"
        assert vmm.Manager().snapshots(NAME).merges_due() == 0
        tree = load_tree(machine.paths)
        known = {*tree.images, *(str(disk.path) for disk in machine.spec.disks), *map(os.path.abspath, _IMAGES)}
        stray = {os.path.abspath(name) for name in os.listdir() if name.endswith((".vhd", ".avhd"))} - known
        assert not stray, f"nobody knows of {stray}"
