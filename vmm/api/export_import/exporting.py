# SPDX-License-Identifier: Apache-2.0
"""Exporting machines for another host: a folder that contains a whole machine.

    DIR/vmm-export.json        the definition, the tree of snapshots, and every file with its size; paths are relative
        disks/                 all images in one folder, each naming its parent beside it
        media/                 ISO images, kernels and initrds
        snapshots/ID/          the folders of the snapshots
        saved/  uefi-vars.fd   memory of a saved machine, UEFI variables

Decides what is exported, and that the folder appears complete or not at all, for its owner only. How it becomes a
machine again is decided in `importing`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import vhdkit
from vmm.api import machines
from vmm.api.export_import.new_folder import check_target, copy_name, make_part
from vmm.model.counting import Counter
from vmm.model.errors import NoSpace, WrongState
from vmm.model.events import add_event
from vmm.model.formats import child_format
from vmm.model.paths import sync_folder, write_whole
from vmm.model.spec import DiskSpec, MachineSpec
from vmm.snapshots.dependents import refuse_older
from vmm.snapshots.preflight import definition_of
from vmm.snapshots.recovery import settle
from vmm.snapshots.steps import options_of, options_of_all, store_problem
from vmm.store import registry, saved
from vmm.store.devices import refuse_passed_through
from vmm.store.machine_document import MachineDocument
from vmm.store.night_files import UEFI_VARIABLES
from vmm.store.registry import Machine
from vmm.store.snapshots.memory import SnapshotFolder, copy_file
from vmm.store.snapshots.store import holding
from vmm.store.snapshots.tree import Snapshot, Tree

MANIFEST = "vmm-export.json"
Progress = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class TransferResult:
    """What was exported or imported: the folder or the machine's name, and how many images.

    `granted`: what an imported machine has, with the user's consent, from outside the folder.
    """

    name: str
    folder: str
    images: int
    snapshots: int
    granted: tuple[str, ...] = ()


# -- out -------------------------------------------------------------------------------------------------------------


def export(
    name: str, folder: str, *, snapshot: str | None = None, flat: bool = False, progress: Progress | None = None
) -> TransferResult:
    """Export a machine that is off or saved, with all its snapshots, or one snapshot of a machine in any state, to
    `folder`.

    `flat`: one image without a parent for each disk, and no snapshots. Raises WrongState, Refused for passed-through
    disks, AlreadyExists, NotFound, NoSpace, StoreFailed; then no folder is left.
    """
    target = check_target(folder)
    with machines.open(name) as found:
        machine, is_still = found.opened, not found.is_running
        refuse_passed_through(machine.spec, "an export")
        if snapshot is None and not is_still:
            raise WrongState(
                f"is {found.status().state}: its disks change", machine=name,
                hint=f"shut it down, or export a snapshot: vmm snapshot export {name} SNAPSHOT {folder}",
            )  # fmt: skip
        with holding(machine.paths, name) as held:
            machine = settle(held) if is_still else registry.load_for_change(held)
            if snapshot is None:
                refuse_older(machine, held.tree)
            part = make_part(target, name)
            try:
                with contextlib.ExitStack() as stack:
                    work = _Export(machine, held.tree, part, progress or (lambda document: None), stack)
                    counted = work.one(held.find(snapshot), flat) if snapshot is not None else work.whole(flat)
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

    def __init__(
        self, machine: Machine, tree: Tree, part: str, progress: Progress, stack: contextlib.ExitStack
    ) -> None:
        self._stack = stack  # ends the hold on the images
        self._chains: list[list[str]] = []
        self._machine = machine
        self._tree = tree
        self._part = part
        self._progress = progress
        self._counter = Counter(progress)
        self._names: dict[str, str] = {}  # real path of an image -> its name in disks/
        self._media: dict[str, str] = {}  # a path as the definition has it -> its name in the folder
        self._options = options_of_all(machine.spec)
        os.mkdir(os.path.join(part, "disks"), 0o700)

    def whole(self, flat: bool) -> TransferResult:
        """Export the machine with its snapshots, or flat as it is now."""
        spec, tree = self._machine.spec, self._tree
        has_memory = saved.is_saved(self._machine.paths)
        specs = [spec, *([] if flat else map(definition_of, tree.snapshots.values()))]
        self._counter.expect_files(media_files(specs))
        if has_memory:
            self._counter.expect_files([os.path.join(self._machine.paths.saved, "memory.bin")])
        if not flat:
            self._counter.expect_files(
                entry.path for one in tree.snapshots.values() for entry in os.scandir(one.folder)
            )
        if flat:
            images, tree = self._flatten(spec), Tree()
        else:
            leaves = {disk.id: disk for disk in spec.disks if disk.is_image and disk.path is not None}
            frozen = [path for one in tree.snapshots.values() for path in one.disks.values()]
            self._copy_images([*map(self._chain, leaves.values()), *(self._chain_at(path) for path in frozen)])
            images = {disk_id: self._names[os.path.realpath(str(disk.path))] for disk_id, disk in leaves.items()}
            tree = self._relative_tree(tree)
        if has_memory:
            self._copy_saved(os.path.join(self._machine.paths.saved, "memory.bin"),
                             os.path.join(self._machine.paths.saved, "state.json"))  # fmt: skip
        if spec.firmware == "uefi" and os.path.exists(self._machine.paths.uefi_variables):
            copy_file(self._machine.paths.uefi_variables, os.path.join(self._part, UEFI_VARIABLES))
        self._copy_media(specs)
        return self._finish(spec, images, tree, flat=flat)

    def one(self, snapshot: Snapshot, flat: bool) -> TransferResult:
        """Export the machine as it was at the snapshot, without snapshots."""
        spec = definition_of(snapshot)
        folder = SnapshotFolder(snapshot.folder)
        self._counter.expect_files([*media_files([spec]), *([] if snapshot.memory_bytes is None else [folder.memory])])
        if flat:
            images = self._flatten(spec)
        else:
            disks = [disk for disk in spec.disks if disk.is_image and disk.path is not None]
            self._copy_images([self._chain(disk) for disk in disks])
            images = {disk.id: self._names[os.path.realpath(str(disk.path))] for disk in disks}
        if snapshot.memory_bytes is not None:
            self._copy_saved(folder.memory, folder.description)
        if os.path.exists(folder.uefi_variables):
            copy_file(folder.uefi_variables, os.path.join(self._part, UEFI_VARIABLES))
        self._copy_media([spec])
        return self._finish(spec, images, Tree(), flat=flat)

    def _chain(self, disk: DiskSpec) -> list[str]:
        assert disk.path is not None
        options = options_of(disk)
        if disk.format is not None:
            options = replace(options, format_name=vhdkit.FormatName(disk.format))
        return self._chain_at(disk.path, options)

    def _chain_at(self, path: str, options: vhdkit.OpenOptions | None = None) -> list[str]:
        """The image at `path` and all that it stands on; they are not written to until the export is complete."""
        real = os.path.realpath(path)
        chain = next((one[one.index(real) :] for one in self._chains if real in one), None)
        if chain is None:
            chain = self._stack.enter_context(vhdkit.chain_held(path, options=options or self._options))
            self._chains.append(chain)
        return chain

    def _flatten(self, spec: MachineSpec) -> dict[str, str]:
        names = {}
        for disk in spec.disks:
            if not disk.is_image or disk.path is None:
                continue
            name = copy_name(disk)
            kind = vhdkit.DiskFormat.VHDX if child_format(disk.format) == "vhdx" else vhdkit.DiskFormat.DYNAMIC
            options = replace(self._options, parent_dirs=(*self._options.parent_dirs, *disk.parent_dirs))
            if disk.format is not None:
                options = replace(options, format_name=vhdkit.FormatName(disk.format))

            def tell(done: int, total: int, disk_id: str = disk.id) -> None:
                self._progress({"step": f"copying {disk_id}", "done": done, "total": total})

            vhdkit.convert(
                disk.path, os.path.join(self._part, "disks", name), kind, options=options, progress=tell,
            )  # fmt: skip
            os.chmod(os.path.join(self._part, "disks", name), 0o600)
            names[disk.id] = name
        return names

    def _copy_images(self, chains: list[list[str]]) -> None:
        """Copy every image of these chains once, named after its file; then let each name its parent's copy."""
        parents: dict[str, str | None] = {}
        for chain in chains:
            parents |= dict(zip(chain, [*chain[1:], None], strict=True))
        need_room(self._part, sum(os.stat(path).st_blocks * 512 for path in parents))
        for path in parents:
            self._names[path] = _free_name(os.path.basename(path), set(self._names.values()))
        self._counter.expect_files(parents)
        self._counter.begin("copying images")
        for path in parents:
            copy_file(path, self._copy_of(path), self._counter.did)
        adopt_parents({self._copy_of(path): None if parent is None else self._copy_of(parent)
                       for path, parent in parents.items()})  # fmt: skip

    def _copy_of(self, path: str) -> str:
        return os.path.join(self._part, "disks", self._names[path])

    def _copy_saved(self, memory: str, description: str) -> None:
        folder = os.path.join(self._part, "saved")
        os.mkdir(folder, 0o700)
        need_room(folder, os.stat(memory).st_blocks * 512)
        self._counter.begin("copying memory")
        copy_file(memory, os.path.join(folder, "memory.bin"), self._counter.did)
        copy_file(description, os.path.join(folder, "state.json"))

    def _copy_media(self, specs: list[MachineSpec]) -> None:
        """Copy ISO images, kernels and initrds; not those that do not exist, nor drives of this host."""
        there = media_files(specs)
        if there:
            os.mkdir(os.path.join(self._part, "media"), 0o700)
        for path in there:
            need_room(self._part, os.stat(path).st_blocks * 512)
            taken = {os.path.basename(name) for name in self._media.values()}
            self._media[path] = f"media/{_free_name(os.path.basename(path), taken)}"
            self._counter.begin("copying media")
            copy_file(path, os.path.join(self._part, self._media[path]), self._counter.did)

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
            if os.path.realpath(path) in self._names:  # images that no state needs are not exported
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
            need_room(folder, os.stat(source).st_blocks * 512)
            copy_file(source, os.path.join(folder, name), self._counter.did)

    def _finish(self, spec: MachineSpec, images: dict[str, str], tree: Tree, *, flat: bool) -> TransferResult:
        files = {}
        for parent, _, names in os.walk(self._part):
            for name in names:
                path = os.path.join(parent, name)
                files[os.path.relpath(path, self._part)] = os.stat(path).st_size
        document = MachineDocument(spec, images, self._media, flat, tree, files)
        write_whole(os.path.join(self._part, MANIFEST), document.encoded())
        count = sum(path.startswith("disks/") for path in files)
        return TransferResult(spec.name, self._part, count, len(tree.snapshots))


def media_files(specs: list[MachineSpec]) -> list[str]:
    """The ISO images, kernels and initrds of these definitions that exist, each once; no drives of this host."""
    wanted = [path for spec in specs for path in (spec.kernel, spec.initrd)]
    wanted += [disk.path for spec in specs for disk in spec.disks if disk.kind == "iso"]
    return [path for path in dict.fromkeys(wanted) if path is not None and os.path.isfile(path)]


def need_room(folder: str, size_bytes: int) -> None:
    """Raise NoSpace if a folder's file system has no room for so many bytes."""
    facts = os.statvfs(folder)
    if facts.f_bavail * facts.f_frsize < size_bytes:
        raise NoSpace(f"has no room for {size_bytes >> 20} MiB", path=folder)


def _free_name(name: str, taken: set[str]) -> str:
    stem, suffix = os.path.splitext(name)
    numbered = (f"{stem}-{number}{suffix}" for number in range(2, len(taken) + 3))
    return name if name not in taken else next(one for one in numbered if one not in taken)


def adopt_parents(parents: dict[str, str | None]) -> None:
    """Let each image name the given parent, whose id it already has as its parent's. Raises VhdkitError."""
    options = vhdkit.OpenOptions(allow_raw_parent=True)
    done: set[str] = {path for path, parent in parents.items() if parent is None}
    left = {path: parent for path, parent in parents.items() if parent is not None}
    while left:  # parents first: the parent's own chain must open
        ready = [path for path, parent in left.items() if parent in done or parent not in parents]
        assert ready, "a chain that opened has no loop"
        for path in ready:
            vhdkit.rebase(path, left.pop(path), options=options)
            done.add(path)
