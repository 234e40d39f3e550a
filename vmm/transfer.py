# SPDX-License-Identifier: Apache-2.0
"""Machines on their way to another host: a folder that holds all of one, and a machine out of such a folder.

    DIR/vmm-export.json        the definition, the tree of snapshots, and every file with its size; paths are relative
        disks/                 all images in one folder, each naming its parent beside it
        snapshots/ID/          the folders of the snapshots
        saved/  uefi-vars.fd   memory of a saved machine, UEFI variables

Decides what goes along, that a folder appears whole or not at all, and what is checked before a machine is made of
one. A folder comes from outside: its paths must stay inside it, every file must be there with the size it had, and
every chain must open, before anything is changed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import vhdkit
from vmm import contact, registry, saved
from vmm.backup import check_target
from vmm.contact import Place
from vmm.devices import refuse_passed_through
from vmm.errors import AlreadyExists, InvalidSpec, NoSpace, NotFound, WrongState, of_os_error
from vmm.events import add_event
from vmm.paths import MachinePaths, default_folders, sync_folder, write_whole
from vmm.registry import Machine
from vmm.snapshots.apply import definition_of
from vmm.snapshots.memory import SnapshotFolder, adapt_saved, copy_file, share_file
from vmm.snapshots.settle import settle
from vmm.snapshots.steps import chain_of, options_of_all, relocated, store_problem
from vmm.snapshots.store import holding, tree_path
from vmm.snapshots.survey import images_of
from vmm.snapshots.tree import Image, Snapshot, Tree, read_tree
from vmm.spec import DiskSpec, MachineSpec, read_spec
from vmm.state import MachineState

FORMAT = 1
MANIFEST = "vmm-export.json"
_MAX_MANIFEST_BYTES = 32 << 20
Progress = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Transfer:
    """What was exported or imported: the folder or the machine's name, and how many images."""

    name: str
    folder: str
    images: int
    snapshots: int


# -- out -------------------------------------------------------------------------------------------------------------


def export(
    name: str, folder: str, *, snapshot: str | None = None, flat: bool = False, progress: Progress | None = None
) -> Transfer:
    """Put a machine that is off or saved, with all its snapshots, or one snapshot of a machine in any state, into
    `folder`.

    `flat`: one image without a parent for each disk, and no snapshots. Raises WrongState, Refused for passed-through
    disks, AlreadyExists, NotFound, NoSpace, StoreFailed; then there is no folder.
    """
    target = check_target(folder)
    with contact.changing(name) as machine:
        refuse_passed_through(machine.spec, "export")
        state = contact.state_of(Place(machine.name, machine.paths, machine.runtime))["state"]
        is_still = state in (MachineState.OFF, MachineState.SAVED)
        if snapshot is None and not is_still:
            raise WrongState(
                f"is {state}: its disks change", machine=name,
                hint=f"shut it down, or export a snapshot: vmm snapshot export {name} SNAPSHOT {folder}",
            )  # fmt: skip
        with holding(machine.paths, name) as held:
            if is_still:
                machine = settle(held, machine)
            part = f"{target}.part"
            try:
                os.mkdir(part, 0o700)
                work = _Export(machine, held.tree, part, progress or (lambda document: None))
                counted = work.one(held.tree.find(snapshot), flat) if snapshot is not None else work.whole(flat)
                os.rename(part, target)
                sync_folder(os.path.dirname(target))
            except (OSError, vhdkit.VhdkitError) as error:
                shutil.rmtree(part, ignore_errors=True)
                raise store_problem(error, "write the export") from error
            except BaseException:
                shutil.rmtree(part, ignore_errors=True)
                raise
    add_event(machine.paths.events, "exported", folder=target)
    return replace(counted, folder=target)


class _Export:
    """One folder being written."""

    def __init__(self, machine: Machine, tree: Tree, part: str, progress: Progress) -> None:
        self._machine = machine
        self._tree = tree
        self._part = part
        self._progress = progress
        self._names: dict[str, str] = {}  # real path of an image -> its name in disks/
        self._options = options_of_all(machine.spec)
        os.mkdir(os.path.join(part, "disks"), 0o700)

    def whole(self, flat: bool) -> Transfer:
        """The machine with its snapshots, or flat as it is now."""
        spec, tree = self._machine.spec, self._tree
        if flat:
            images, tree = self._flatten(spec), Tree()
        else:
            leaves = {disk.id: disk for disk in spec.disks if disk.kind == "vhd" and disk.path is not None}
            frozen = [path for one in tree.snapshots.values() for path in one.disks.values()]
            self._copy_images([*map(self._chain, leaves.values()), *(self._chain_at(path) for path in frozen)])
            images = {disk_id: self._names[os.path.realpath(str(disk.path))] for disk_id, disk in leaves.items()}
            tree = self._relative_tree(tree)
        has_memory = saved.is_saved(self._machine.paths)
        if has_memory:
            self._copy_saved(os.path.join(self._machine.paths.saved, "memory.bin"),
                             os.path.join(self._machine.paths.saved, "state.json"))  # fmt: skip
        if spec.firmware == "uefi" and os.path.exists(self._machine.paths.uefi_variables):
            shutil.copyfile(self._machine.paths.uefi_variables, os.path.join(self._part, "uefi-vars.fd"))
        return self._finish(spec, images, tree, "vhd" if flat else None)

    def one(self, snapshot: Snapshot, flat: bool) -> Transfer:
        """A machine that is what it was at the snapshot, with no snapshots of its own."""
        spec = definition_of(snapshot)
        if flat:
            images = self._flatten(spec)
        else:
            disks = [disk for disk in spec.disks if disk.kind == "vhd" and disk.path is not None]
            self._copy_images([self._chain(disk) for disk in disks])
            images = {disk.id: self._names[os.path.realpath(str(disk.path))] for disk in disks}
        folder = SnapshotFolder(snapshot.folder)
        if snapshot.memory_bytes is not None:
            self._copy_saved(folder.memory, folder.description)
        if os.path.exists(folder.uefi_variables):
            shutil.copyfile(folder.uefi_variables, os.path.join(self._part, "uefi-vars.fd"))
        return self._finish(spec, images, Tree(), "vhd" if flat else None)

    def _chain(self, disk: DiskSpec) -> list[str]:
        return chain_of(disk)

    def _chain_at(self, path: str) -> list[str]:
        return vhdkit.chain_paths(path, options=self._options)

    def _flatten(self, spec: MachineSpec) -> dict[str, str]:
        names = {}
        for disk in spec.disks:
            if disk.kind != "vhd" or disk.path is None:
                continue
            name = f"{disk.id}.vhd"
            options = replace(self._options, parent_dirs=(*self._options.parent_dirs, *disk.parent_dirs))
            if disk.format is not None:
                options = replace(options, format_name=vhdkit.FormatName(disk.format))

            def tell(done: int, total: int, disk_id: str = disk.id) -> None:
                self._progress({"step": f"copying {disk_id}", "done": done, "total": total})

            vhdkit.convert(
                disk.path, os.path.join(self._part, "disks", name), vhdkit.DiskFormat.DYNAMIC, options=options,
                progress=tell,
            )  # fmt: skip
            names[disk.id] = name
        return names

    def _copy_images(self, chains: list[list[str]]) -> None:
        """Every image of these chains, once, each named after its file; then each names its parent's copy."""
        parents: dict[str, str | None] = {}
        for chain in chains:
            parents |= dict(zip(chain, [*chain[1:], None], strict=True))
        _need_room(self._part, sum(os.stat(path).st_blocks * 512 for path in parents))
        for path in parents:
            self._names[path] = _free_name(os.path.basename(path), set(self._names.values()))
        for number, path in enumerate(parents):
            self._progress({"step": "copying images", "done": number, "total": len(parents)})
            copy_file(path, self._copy_of(path))
        adopt_parents({self._copy_of(path): None if parent is None else self._copy_of(parent)
                       for path, parent in parents.items()})  # fmt: skip

    def _copy_of(self, path: str) -> str:
        return os.path.join(self._part, "disks", self._names[path])

    def _copy_saved(self, memory: str, description: str) -> None:
        folder = os.path.join(self._part, "saved")
        os.mkdir(folder, 0o700)
        _need_room(folder, os.stat(memory).st_blocks * 512)
        copy_file(memory, os.path.join(folder, "memory.bin"))
        shutil.copyfile(description, os.path.join(folder, "state.json"))

    def _relative_tree(self, tree: Tree) -> Tree:
        """The tree with names in the folder. A path in a tree is absolute: here the folder is the root."""
        os.mkdir(os.path.join(self._part, "snapshots"), 0o700)
        snapshots = {}
        for one in tree.snapshots.values():
            self._copy_snapshot(one)
            disks = {disk: self._rooted(path) for disk, path in one.disks.items()}
            snapshots[one.id] = replace(one, disks=disks, folder=f"/snapshots/{one.id}")
        images = {}
        for path, image in tree.images.items():
            if os.path.realpath(path) in self._names:  # what no state needs stays here
                parent = None if image.parent is None else self._rooted(image.parent)
                images[self._rooted(path)] = replace(image, parent=parent)
        return Tree(snapshots, tree.now, images, tree.limit, None)

    def _rooted(self, path: str) -> str:
        return f"/disks/{self._names[os.path.realpath(path)]}"

    def _copy_snapshot(self, snapshot: Snapshot) -> None:
        folder = os.path.join(self._part, "snapshots", snapshot.id)
        os.mkdir(folder, 0o700)
        for name in sorted(os.listdir(snapshot.folder)):
            source = os.path.join(snapshot.folder, name)
            _need_room(folder, os.stat(source).st_blocks * 512)
            copy_file(source, os.path.join(folder, name))

    def _finish(self, spec: MachineSpec, images: dict[str, str], tree: Tree, kind: str | None) -> Transfer:
        files = {}
        for parent, _, names in os.walk(self._part):
            for name in names:
                path = os.path.join(parent, name)
                files[os.path.relpath(path, self._part)] = os.stat(path).st_size
        document = {
            "format": FORMAT,
            "definition": json.loads(spec.to_json()),
            "images": images,
            "flat": kind is not None,
            "tree": json.loads(tree.to_json()),
            "files": files,
        }
        write_whole(os.path.join(self._part, MANIFEST), json.dumps(document, indent=1).encode() + b"\n")
        count = sum(path.startswith("disks/") for path in files)
        return Transfer(spec.name, self._part, count, len(tree.snapshots))


def _need_room(folder: str, size_bytes: int) -> None:
    facts = os.statvfs(folder)
    if facts.f_bavail * facts.f_frsize < size_bytes:
        raise NoSpace(f"there is no room for {size_bytes >> 20} MiB", path=folder)


def _free_name(name: str, taken: set[str]) -> str:
    stem, suffix = os.path.splitext(name)
    numbered = (f"{stem}-{number}{suffix}" for number in range(2, len(taken) + 3))
    return name if name not in taken else next(one for one in numbered if one not in taken)


def adopt_parents(parents: dict[str, str | None]) -> None:
    """Let each image name the parent given, which is the one it stands on by its id. Raises VhdkitError."""
    options = vhdkit.OpenOptions(allow_raw_parent=True)
    done: set[str] = {path for path, parent in parents.items() if parent is None}
    left = {path: parent for path, parent in parents.items() if parent is not None}
    while left:  # parents first: the parent's own chain must open
        ready = [path for path, parent in left.items() if parent in done or parent not in parents]
        assert ready, "a chain that opened has no loop"
        for path in ready:
            vhdkit.rebase(path, left.pop(path), options=options)
            done.add(path)


# -- in --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Arrival:
    """A folder that was looked at: what is in it, with paths that lead there."""

    folder: str
    spec: MachineSpec
    tree: Tree
    flat: bool
    has_memory: bool


def look_at_export(folder: str) -> Arrival:
    """What an exported folder holds, every file of it checked. Raises NotFound, InvalidSpec with what is wrong."""
    root = os.path.realpath(folder)
    path = os.path.join(root, MANIFEST)
    try:
        with open(path, "rb") as file:
            document = json.loads(file.read(_MAX_MANIFEST_BYTES))
        if document["format"] != FORMAT:
            raise InvalidSpec("was exported by another version of vmm", path=path)
        spec = read_spec(json.dumps(document["definition"]).encode(), path)
        tree = read_tree(json.dumps(document["tree"]).encode(), path)
        files = {str(name): int(size) for name, size in document["files"].items()}
        images = {str(disk): str(name) for disk, name in document["images"].items()}
        flat = document["flat"] is True
    except FileNotFoundError as error:
        raise NotFound("is no export: it holds no vmm-export.json", path=folder) from error
    except OSError as error:
        raise of_os_error(error, "read the export", path=path) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InvalidSpec("is damaged: it describes no export", path=path) from error
    for name, size in files.items():
        _check_file(root, name, size)
    _check_names(images.values())
    disks = {disk: os.path.join(root, "disks", name) for disk, name in images.items()}
    spec = relocated(spec, {
        disk.id: (disks[disk.id], "vhd" if flat else disk.format or "vhd") for disk in spec.disks if disk.id in disks
    })  # fmt: skip
    alone = [disk.model_copy(update={"parent_dirs": ()}) if disk.id in disks else disk for disk in spec.disks]
    spec = spec.changed(disks=alone)  # all that they stand on lies beside them
    here = _moved_tree(tree, lambda path: _inside(root, path), lambda one: os.path.join(root, "snapshots", one.id))
    for chain_leaf in {*disks.values(), *here.frozen()}:
        _check_chain(chain_leaf, spec)
    return Arrival(root, spec, here, flat, os.path.isdir(os.path.join(root, "saved")))


def _check_file(root: str, name: str, size: int) -> None:
    path = os.path.join(root, name)
    if os.path.isabs(name) or os.path.normpath(name) != name or name.startswith(".."):
        raise InvalidSpec(f"names a file outside of it: {name!r}", path=root)
    if os.path.realpath(path) != path or not os.path.isfile(path):
        raise NotFound("is missing from the export", path=path)
    if os.stat(path).st_size != size:
        raise InvalidSpec(f"has {os.stat(path).st_size} bytes instead of {size}: copy it again", path=path)


def _check_names(names: Iterator[str] | Any) -> None:
    for name in names:
        if os.path.basename(name) != name or name in ("", ".", ".."):
            raise InvalidSpec(f"names an image outside of the export: {name!r}")


def _inside(root: str, path: str) -> str:
    inside = os.path.join(root, path.lstrip(os.sep))
    if os.path.realpath(inside) != inside or os.path.dirname(inside) != os.path.join(root, "disks"):
        raise InvalidSpec(f"names an image outside of the export: {path!r}", path=root)
    return inside


def _check_chain(path: str, spec: MachineSpec) -> None:
    raw = any(disk.path == path and disk.format == "raw" for disk in spec.disks)
    options = vhdkit.OpenOptions(allow_raw_parent=True, format_name=vhdkit.FormatName.RAW if raw else None)
    try:
        vhdkit.chain_paths(path, options=options)
    except vhdkit.VhdkitError as error:
        raise store_problem(error, "read the images") from error


def _moved_tree(tree: Tree, moved: Callable[[str], str], folder_of: Callable[[Snapshot], str]) -> Tree:
    """The tree with other paths."""
    snapshots = {
        one.id: replace(one, disks={disk: moved(path) for disk, path in one.disks.items()}, folder=folder_of(one))
        for one in tree.snapshots.values()
    }
    images = {
        moved(path): Image(None if one.parent is None else moved(one.parent), one.ours, one.format)
        for path, one in tree.images.items()
    }
    return Tree(snapshots, tree.now, images, tree.limit, None)


def import_machine(
    folder: str, *, name: str | None = None, register: bool = False, progress: Progress | None = None
) -> Transfer:
    """Make a machine out of an exported folder.

    A copy with an id of its own, in the host's folders; with `register` the very files become the machine's, where
    they lie, with the old id. Raises what `look_at_export` does, AlreadyExists for a name or id that is there,
    NoSpace.
    """
    arrival = look_at_export(folder)
    told = progress or (lambda document: None)
    spec = arrival.spec.changed(name=name) if name is not None else arrival.spec
    if spec.name in registry.names():
        raise AlreadyExists("there is a machine of that name already", machine=spec.name, hint="give another: --name")
    if register:
        for other in registry.load_all()[0]:
            if other.spec.id == spec.id:
                raise AlreadyExists(f"is the machine {other.name} already", path=folder, hint="without --register")
        return _registered(arrival, spec)
    return _copied(arrival, spec.changed(id=str(uuid.uuid4())), told)


def _registered(arrival: Arrival, spec: MachineSpec) -> Transfer:
    parents: dict[str, str | None] = {}
    options = vhdkit.OpenOptions(allow_raw_parent=True)
    try:
        for leaf in {*images_of(spec).values(), *arrival.tree.frozen()}:
            chain = vhdkit.chain_paths(leaf, options=options)
            parents |= dict(zip(chain, [*chain[1:], None], strict=True))
        adopt_parents(parents)
    except vhdkit.VhdkitError as error:
        raise store_problem(error, "register the images") from error
    return _added(arrival, spec, arrival.tree, share=True)


def _copied(arrival: Arrival, spec: MachineSpec, progress: Progress) -> Transfer:
    disks = os.path.join(spec.paths.disks or default_folders()["disks"], spec.name)
    if os.path.lexists(disks):
        raise AlreadyExists("is in the way of the new machine's disks", path=disks, hint="give another name: --name")
    snapshots = os.path.join(spec.paths.snapshots or default_folders()["snapshots"], spec.id)
    source = os.path.join(arrival.folder, "disks")
    part = f"{disks}.part"

    def moved(path: str) -> str:
        return os.path.join(disks, os.path.basename(path))

    try:
        os.makedirs(os.path.dirname(disks), mode=0o700, exist_ok=True)
        shutil.rmtree(part, ignore_errors=True)
        os.mkdir(part, 0o700)
        names = sorted(os.listdir(source))
        _need_room(part, sum(os.stat(os.path.join(source, one)).st_blocks * 512 for one in names))
        for number, one in enumerate(names):
            progress({"step": "copying images", "done": number, "total": len(names)})
            copy_file(os.path.join(source, one), os.path.join(part, one))
        os.rename(part, disks)
        sync_folder(os.path.dirname(disks))
        for snapshot_id in arrival.tree.snapshots:
            target = os.path.join(snapshots, snapshot_id)
            os.makedirs(target, mode=0o700)
            for one in os.listdir(os.path.join(arrival.folder, "snapshots", snapshot_id)):
                copy_file(os.path.join(arrival.folder, "snapshots", snapshot_id, one), os.path.join(target, one))
        here = {disk.id: (moved(str(disk.path)), disk.format or "vhd") for disk in spec.disks
                if disk.path is not None and os.path.dirname(disk.path) == source}  # fmt: skip
        tree = _moved_tree(arrival.tree, moved, lambda one: os.path.join(snapshots, one.id))
        landed = relocated(spec, here)
        parents: dict[str, str | None] = {}
        options = vhdkit.OpenOptions(allow_raw_parent=True)
        for leaf in {*(path for path, _ in here.values()), *tree.frozen()}:
            chain = vhdkit.chain_paths(leaf, options=options)
            parents |= dict(zip(chain, [*chain[1:], None], strict=True))
        adopt_parents(parents)
        return _added(arrival, landed, tree, share=False)
    except (OSError, vhdkit.VhdkitError) as error:
        _take_away(part, disks, snapshots)
        raise store_problem(error, "import the machine") from error
    except BaseException:
        _take_away(part, disks, snapshots)
        raise


def _take_away(*folders: str) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _added(arrival: Arrival, spec: MachineSpec, tree: Tree, *, share: bool) -> Transfer:
    """The machine in the registry: with its tree and memory first, so that nobody sees it without them."""
    has_memory = arrival.has_memory
    with contextlib.ExitStack() as held:
        if spec.adapters and not share and not has_memory:  # what is in memory knows the old address
            from vmm.adapters import choosing_macs, with_new_macs

            held.enter_context(choosing_macs())
            spec = with_new_macs(spec)
        machine = registry.add(spec)
    try:
        if tree.snapshots or tree.images:
            write_whole(tree_path(machine.paths), tree.to_json())
        _bring_files(arrival, machine.paths, share=share)
        if has_memory:
            adapt_saved(machine.paths, spec)
    except BaseException as error:
        registry.remove(machine)
        if isinstance(error, OSError):
            raise of_os_error(error, "import the machine's memory", machine=spec.name) from error
        raise
    add_event(machine.paths.events, "imported", folder=arrival.folder)
    count = len({*tree.images, *images_of(spec).values()})
    return Transfer(spec.name, machine.paths.folder, count, len(tree.snapshots))


def _bring_files(arrival: Arrival, machine: MachinePaths, *, share: bool) -> None:
    uefi = os.path.join(arrival.folder, "uefi-vars.fd")
    if os.path.exists(uefi):
        copy_file(uefi, machine.uefi_variables)
    if arrival.has_memory:
        part = f"{machine.saved}.imported"
        os.mkdir(part, 0o700)
        for name in ("memory.bin", "state.json"):
            source = os.path.join(arrival.folder, "saved", name)
            if share and name == "memory.bin":
                share_file(source, os.path.join(part, name))
            else:
                copy_file(source, os.path.join(part, name))
        os.rename(part, machine.saved)
