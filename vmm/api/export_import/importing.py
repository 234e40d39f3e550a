# SPDX-License-Identifier: Apache-2.0
"""Making machines from folders that `exporting.export` wrote, or that claim so.

Decides in which order a folder becomes a machine, so that it appears whole or not at all. What may be in the
folder is decided in `arrival`; the folder may have been changed since then.

    look     the manifest and all definitions are read once, and everything that is refused is reported at once
    copy     files go into a private folder, under the names that the manifest has for them and no others
    check    the chains of the copies lie in that folder; no other user can change what is registered in place
    add      the machine appears in the registry, with its snapshots and its memory
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Callable, Collection
from dataclasses import replace

import vhdkit
from vmm.api.export_import.arrival import Arrival, chain_of, check_chains, judge_all, look_at_export, placed, resolved
from vmm.api.export_import.exporting import (
    MANIFEST,
    Progress,
    TransferResult,
    adopt_parents,
    need_room,
)
from vmm.api.export_import.foreign import Consent
from vmm.api.export_import.inside import Inside
from vmm.model import unfinished
from vmm.model.counting import Counter
from vmm.model.errors import AlreadyExists
from vmm.model.events import add_event
from vmm.model.paths import MachinePaths, default_folders, make_folders, runtime_of, sync_folder, write_whole
from vmm.model.spec import MachineSpec
from vmm.snapshots.dependents import images_of
from vmm.snapshots.steps import store_problem
from vmm.store import registry, saved
from vmm.store.images import note_marks
from vmm.store.media import media_of
from vmm.store.night_files import UEFI_VARIABLES
from vmm.store.snapshots.memory import SnapshotFolder, adapt_saved, share_file
from vmm.store.snapshots.store import tree_path
from vmm.store.snapshots.tree import Image, Tree
from vmm.store.state import note_unclean

_SNAPSHOT_PARTS = (".bin", ".vsv", ".nvram")  # beside the definition


def import_machine(
    folder: str,
    *,
    name: str | None = None,
    register: bool = False,
    consent: Consent | None = None,
    announce: Callable[[str], None] | None = None,
    progress: Progress | None = None,
) -> TransferResult:
    """Make a machine from an exported folder.

    The machine is a copy with a new id, in the host's folders; with `register` it uses the files where they are, with
    the old id. `consent` is what it may have besides the folder's own files; `announce` is called with each of these
    things before anything is created.

    Raises NotFound, InvalidSpec for a folder that is not an export, Refused for one that reaches outside itself,
    AlreadyExists for a name or id in use, NoSpace.
    """
    with Inside(folder) as inside:
        arrival = look_at_export(inside)
        spec = arrival.definitions[None]
        if name is not None:
            spec = spec.changed(name=name)
        if spec.name in registry.names():
            raise AlreadyExists(
                "a machine of that name already exists", machine=spec.name, hint="give another name: --name"
            )
        if register:
            refuse_known(spec, folder)
        else:
            spec = spec.changed(id=str(uuid.uuid4()))
        arrival.definitions[None] = spec
        judge_all(arrival, resolved(consent or Consent()), announce or (lambda words: None))
        check_chains(arrival, os.path.join(inside.root, "disks"))
        if register:
            return _registered(inside, arrival)
        return _copied(inside, arrival, progress or (lambda document: None))


def refuse_known(spec: MachineSpec, folder: str) -> None:
    """Raise AlreadyExists if the id, or its part in the name of the runtime folder, is that of another machine."""
    for other in registry.load_all()[0]:
        if other.spec.id == spec.id or runtime_of(other.spec.id) == runtime_of(spec.id):
            raise AlreadyExists(f"is already the machine {other.name}", path=folder, hint="omit --register")


# -- making ------------------------------------------------------------------------------------------------------


class _Landing:
    """The final places of an import's files: names in the folder become paths, in definitions, too."""

    def __init__(self, arrival: Arrival, disks: str, media: str, snapshots: str) -> None:
        self._arrival = arrival
        self._disks, self._media, self._snapshots = disks, media, snapshots

    def path(self, name: str) -> str:
        """The path of an image or another file."""
        folder, _, base = name.lstrip("/").partition("/")
        return os.path.join({"disks": self._disks, "media": self._media}[folder], base)

    def folder(self, snapshot_id: str) -> str:
        """The folder of a snapshot."""
        return os.path.join(self._snapshots, snapshot_id)

    def spec(self, key: str | None) -> MachineSpec:
        """A judged definition with the paths on this host."""
        spec = self._arrival.judged[key]

        def moved(path: str | None) -> str | None:
            name = None if path is None else os.path.relpath(path, self._arrival.folder)
            is_inside = name in self._arrival.files and path == placed(self._arrival, str(name))
            return self.path(str(name)) if is_inside else path

        disks = [disk.model_copy(update={"path": moved(disk.path)}) for disk in spec.disks]
        return spec.changed(disks=disks, kernel=moved(spec.kernel), initrd=moved(spec.initrd))

    def tree(self) -> Tree:
        """The tree of snapshots with the paths on this host."""
        before = self._arrival.tree
        snapshots = {
            one.id: replace(one, disks={disk: self.path(path) for disk, path in one.disks.items()},
                            folder=self.folder(one.id))
            for one in before.snapshots.values()
        }  # fmt: skip
        images = {
            self.path(path): Image(None if one.parent is None else self.path(one.parent), one.ours, one.format)
            for path, one in before.images.items()
        }
        return Tree(snapshots, before.now, images, before.limit, None)


def _registered(inside: Inside, arrival: Arrival) -> TransferResult:
    inside.refuse_strangers([MANIFEST, *arrival.files])
    root = inside.root
    landing = _Landing(
        arrival, os.path.join(root, "disks"), os.path.join(root, "media"), os.path.join(root, "snapshots")
    )
    _adopt(arrival, os.path.join(root, "disks"))
    for key in arrival.tree.snapshots:
        SnapshotFolder(landing.folder(key)).write_definition(landing.spec(key))
    return _added(inside, arrival, landing, counter=None)


def _copied(inside: Inside, arrival: Arrival, progress: Progress) -> TransferResult:
    spec = arrival.judged[None]
    disks = os.path.join(os.path.realpath(spec.paths.disks or default_folders()["disks"]), spec.name)
    snapshots = os.path.join(os.path.realpath(spec.paths.snapshots or default_folders()["snapshots"]), spec.id)
    if os.path.lexists(disks) and not _is_empty(disks):  # a deleted machine may leave an empty folder
        raise _in_the_way(disks)
    landing = _Landing(arrival, disks, os.path.join(disks, "media"), snapshots)
    part = unfinished.folder_of(disks)
    made = [part]  # removed if this fails; never what another command created meanwhile
    try:
        make_folders(os.path.dirname(disks))
        unfinished.sweep(os.path.dirname(disks), folders=True)
        os.mkdir(part, 0o700)
        counter = Counter(progress)
        counter.expect(sum(inside.room(name) for name in arrival.files))
        _copy_files(inside, arrival, part, counter)
        check_chains(arrival, part)
        _adopt(arrival, part)
        for snapshot_id in arrival.tree.snapshots:
            made.append(snapshots)
            counter.begin("copying snapshots")
            _copy_snapshot(inside, arrival, landing, snapshot_id, counter)
        _name_folder(part, disks)
        made.append(disks)
        sync_folder(os.path.dirname(disks))
        counter.begin("copying memory")
        return _added(inside, arrival, landing, counter=counter)
    except (OSError, vhdkit.VhdkitError) as error:
        _take_away(made)
        raise store_problem(error, "import the machine") from error
    except BaseException:
        _take_away(made)
        raise


def _is_empty(folder: str) -> bool:
    return os.path.isdir(folder) and not os.path.islink(folder) and not os.listdir(folder)


def _name_folder(part: str, folder: str) -> None:
    """Raises AlreadyExists if another command was faster, OSError."""
    try:
        os.rename(part, folder)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise _in_the_way(folder) from error
        raise


def _in_the_way(folder: str) -> AlreadyExists:
    return AlreadyExists("is in the way of the new machine's disks", path=folder, hint="give another name: --name")


def _copy_files(inside: Inside, arrival: Arrival, part: str, counter: Counter) -> None:
    names = sorted(name for name in arrival.files if name.startswith(("disks/", "media/")) and name.count("/") == 1)
    need_room(part, sum(inside.room(name) for name in names))
    counter.begin("copying images")
    for name in names:
        target = os.path.join(part, name.removeprefix("disks/"))
        if name.startswith("media/"):
            make_folders(os.path.dirname(target))
        inside.copy(name, target, arrival.files[name], counter.did)


def _copy_snapshot(inside: Inside, arrival: Arrival, landing: _Landing, snapshot_id: str, counter: Counter) -> None:
    """Copy a snapshot: the definition as it was judged, not as it may be by now; memory and variables unchanged."""
    folder = SnapshotFolder(landing.folder(snapshot_id))
    make_folders(os.path.dirname(folder.folder))
    os.mkdir(folder.folder, 0o700)
    folder.write_definition(landing.spec(snapshot_id))
    for suffix in _SNAPSHOT_PARTS:
        name = f"snapshots/{snapshot_id}/{snapshot_id}{suffix}"
        if name in arrival.files:
            need_room(folder.folder, inside.room(name))
            target = os.path.join(folder.folder, f"{snapshot_id}{suffix}")
            inside.copy(name, target, arrival.files[name], counter.did)


def _adopt(arrival: Arrival, disks: str) -> None:
    """Let every image name the parent beside it. Raises StoreFailed."""
    parents: dict[str, str | None] = {}
    for leaf in sorted(arrival.leaves()):
        chain = chain_of(os.path.join(disks, os.path.basename(leaf)), arrival)
        parents |= dict(zip(chain, [*chain[1:], None], strict=True))
    try:
        adopt_parents(parents)
    except vhdkit.VhdkitError as error:
        raise store_problem(error, "give the images their parents") from error


def _take_away(folders: Collection[str]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _added(inside: Inside, arrival: Arrival, landing: _Landing, *, counter: Counter | None) -> TransferResult:
    """Add the machine to the registry together with its tree and memory, so that no command sees it without them.

    `counter` counts what is copied; it is None for a machine that uses the files where they are.
    """
    spec, tree = landing.spec(None), landing.tree()

    def fill(machine: MachinePaths) -> None:
        if tree.snapshots or tree.images:
            write_whole(tree_path(machine), tree.to_json())
        note_unclean(machine)  # how its guest ended is not known
        _bring_files(inside, arrival, machine, counter)
        if arrival.has_memory:
            adapt_saved(machine, spec)
            saved.accept_media(machine, media_of(spec))  # those of the export, or those that the user named instead

    with contextlib.ExitStack() as held:
        if (
            spec.adapters and counter is not None and not arrival.has_memory
        ):  # the guest in memory knows the old address
            from vmm.api.adapters import choosing_macs, with_new_macs

            held.enter_context(choosing_macs())
            spec = with_new_macs(spec)
        machine = registry.add(spec, fill=fill)
    add_event(machine.paths.events, "imported", folder=arrival.folder, granted=list(arrival.granted))
    note_marks(machine, spec.disks)
    count = len({*tree.images, *images_of(spec).values()})
    return TransferResult(spec.name, machine.paths.folder, count, len(tree.snapshots), arrival.granted)


def _bring_files(inside: Inside, arrival: Arrival, machine: MachinePaths, counter: Counter | None) -> None:
    if UEFI_VARIABLES in arrival.files:
        inside.copy(UEFI_VARIABLES, machine.uefi_variables, arrival.files[UEFI_VARIABLES])
    if arrival.has_memory:
        part = f"{machine.saved}.imported"
        os.mkdir(part, 0o700)
        for name in ("memory.bin", "state.json"):
            target = os.path.join(part, name)
            if counter is None and name == "memory.bin":
                share_file(os.path.join(inside.root, "saved", name), target)
            else:
                did = counter.did if counter is not None else lambda size_bytes: None
                inside.copy(f"saved/{name}", target, arrival.files[f"saved/{name}"], did)
        os.rename(part, machine.saved)
