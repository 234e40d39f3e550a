# SPDX-License-Identifier: Apache-2.0
"""Steps shared by taking and applying snapshots: new leaves, the commit, and tidying up.

    journal: prepare     new images and folders are made; an operation that ends here is undone
    journal: commit      it takes effect: definition, saved memory and UEFI variables are put in place, repeatably
    no journal           leftovers are removed, according to the delete rule

Decides the name of a new leaf and how a disk's definition changes with it. A new leaf lies beside the image on which
it stands, as with Hyper-V 2008 R2: our programs that open that image for writing look there for children, and refuse.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import vhdkit
from vmm.model.errors import Refused, VmmError, hint_of_vhdkit, of_os_error, store_error
from vmm.model.formats import ImageFormat, child_format, child_suffix
from vmm.model.paths import sync_folder, write_whole
from vmm.model.spec import DiskSpec, MachineSpec
from vmm.snapshots.dependents import drop_unneeded, judge, parent_folders
from vmm.store import registry
from vmm.store.known_images import refuse_used_elsewhere
from vmm.store.registry import Changing, Machine
from vmm.store.removal import remove_image
from vmm.store.snapshots.journal import NO_VARIABLES, MergeLive, MergeOff, Pivot, PutInPlace
from vmm.store.snapshots.memory import adapt_saved, drop_saved, put_saved
from vmm.store.snapshots.snapshot import Image
from vmm.store.snapshots.store import Held, tree_path
from vmm.store.snapshots.tree import Tree

_OWN_STEM = re.compile(r"(.+)_[0-9a-f]{8}")
_MAX_STEM_BYTES = 200  # a file name has at most 255 bytes
_MAX_VARIABLES_BYTES = 64 << 20  # UEFI firmware uses a few MiB


@dataclass(frozen=True, slots=True)
class Tidied:
    """What was removed, and how many merges are left. `kept`: image -> why it stays though it is in no snapshot."""

    removed: tuple[str, ...]
    merges: int
    kept: Mapping[str, str]


def options_of(disk: DiskSpec) -> vhdkit.OpenOptions:
    """Options for opening the disk's chain."""
    return vhdkit.OpenOptions(parent_dirs=disk.parent_dirs, allow_raw_parent=disk.allow_raw_parent)


def options_of_all(spec: MachineSpec) -> vhdkit.OpenOptions:
    """Options for opening any chain of the machine: with all folders that any of its disks allows."""
    raw = any(disk.allow_raw_parent or disk.format == "raw" for disk in spec.disks)
    return vhdkit.OpenOptions(parent_dirs=parent_folders(spec), allow_raw_parent=raw)


def options_to_change(machine: Machine) -> vhdkit.OpenOptions:
    """The same for changing the images of a machine that is off, or giving them children.

    What a killed disk server had noted is written to them first, if its notes still exist.
    """
    return replace(options_of_all(machine.spec), notes_folder=machine.runtime.notes_left)


def pivots_for(spec: MachineSpec, tree: Tree, frozen: Mapping[str, str]) -> list[Pivot]:
    """A new leaf for each of the machine's own disks, on the images given by disk id."""
    found = []
    for disk in spec.disks:
        if disk.is_writable_image and disk.id in frozen:
            path = frozen[disk.id]
            kind = format_of(tree, path, disk)
            found.append(Pivot(disk.id, path, child_path(path, kind), kind))
    return found


def format_of(tree: Tree, path: str, disk: DiskSpec) -> ImageFormat:
    """The format of an image that is the disk's in some state of the machine; the guest may have written anything."""
    known = tree.images.get(path)
    return known.format if known is not None else (disk.format or "vhd")


def child_path(frozen: str, kind: ImageFormat = "vhd") -> str:
    """An unused path for a new leaf beside an image of this format: its name and eight random hexadecimal digits."""
    folder, name = os.path.split(frozen)
    stem = os.path.splitext(name)[0]
    if ours := _OWN_STEM.fullmatch(stem):
        stem = ours[1]
    stem = os.fsdecode(os.fsencode(stem)[:_MAX_STEM_BYTES])
    while True:
        path = os.path.join(folder, f"{stem}_{os.urandom(4).hex()}{child_suffix(kind)}")
        if not os.path.lexists(path):
            return path


def pivoted(spec: MachineSpec, pivots: Sequence[Pivot]) -> MachineSpec:
    """The definition with the new leaves as its disks."""
    return relocated(spec, {one.disk: (one.child, child_format(one.format)) for one in pivots})


def relocated(spec: MachineSpec, images: Mapping[str, tuple[str, ImageFormat]]) -> MachineSpec:
    """The definition with other images: disk id -> (path, format)."""
    disks = []
    for disk in spec.disks:
        if disk.id in images:
            path, kind = images[disk.id]
            raw_below = disk.allow_raw_parent or (disk.format == "raw" and kind != "raw")
            disk = disk.model_copy(update={"path": path, "format": kind, "allow_raw_parent": raw_below})
        disks.append(disk)
    return spec.changed(disks=disks)


# -- taking effect ----------------------------------------------------------------------------------------------------


def commit(held: Held) -> Changing:
    """Put the contents of the journal in place. Raises VmmError; the next command retries."""
    journal = held.tree.journal
    assert isinstance(journal, PutInPlace)
    spec = journal.spec(tree_path(held.machine))
    if spec.id != registry.load_for_change(held).spec.id:
        raise VmmError(
            "is damaged: the definition to put in place belongs to another machine",
            machine=held.name, path=tree_path(held.machine),
        )  # fmt: skip
    machine = registry.update(held, lambda _: spec, check_images=False)
    match journal.saved:
        case "adapt":
            adapt_saved(machine.paths, spec)
        case "put":
            put_saved(machine.paths)
            adapt_saved(machine.paths, spec)
        case "drop":
            drop_saved(machine.paths)
    if journal.uefi == NO_VARIABLES:  # the next start creates new ones
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(machine.paths.uefi_variables)
            sync_folder(machine.paths.folder)
        except OSError as error:
            raise of_os_error(error, "remove the UEFI variables", path=machine.paths.uefi_variables) from error
    elif journal.uefi is not None:
        try:
            descriptor = os.open(journal.uefi, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            with open(descriptor, "rb") as file:
                write_whole(machine.paths.uefi_variables, file.read(_MAX_VARIABLES_BYTES))
        except OSError as error:
            raise of_os_error(error, "restore the UEFI variables", path=journal.uefi) from error
    held.done()
    return machine


# -- tidying ---------------------------------------------------------------------------------------------------------


def tidy(held: Held) -> Tidied:
    """Remove what the plan says can be removed now; merges are left to `background_merge`.

    Raises VmmError, InUse while a journal is pending.
    """
    held.need_settled()
    machine = registry.load_for_change(held)
    drop_unneeded(held, machine)
    plan = judge(machine, held.tree)
    removed = []
    kept = dict(plan.kept)
    for path in plan.unlink:
        try:
            remove_image(path, held)
        except VmmError as error:
            kept[path] = error.problem
            break  # everything that it stands on stays as well
        removed.append(path)
        held.tree.forget(path)
    for path in plan.forget:
        held.tree.forget(path)
    if removed or plan.forget:
        held.save()
    return Tidied(tuple(removed), len(plan.merges), kept)


def chain_of(disk: DiskSpec) -> list[str]:
    """The real paths of a disk's images, leaf first. Raises StoreFailed."""
    assert disk.path is not None
    options = options_of(disk)
    if disk.format is not None:
        options = replace(options, format_name=vhdkit.FormatName(disk.format))
    try:
        return vhdkit.chain_paths(disk.path, options=options)
    except vhdkit.VhdkitError as error:
        raise store_problem(error, "read the chain") from error


def check_chains(spec: MachineSpec, tree: Tree, disks: Mapping[str, str]) -> None:
    """Raise Refused, naming the file, if an image of a snapshot or one of its ancestors cannot be opened."""
    options = options_of_all(spec)
    for disk in spec.disks:
        if disk.id not in disks:
            continue
        path = disks[disk.id]
        kind = vhdkit.FormatName(format_of(tree, path, disk))
        try:
            vhdkit.chain_paths(path, options=replace(options, format_name=kind))
        except vhdkit.VhdkitError as error:
            raise Refused(
                f"the disk {disk.id} cannot be read: {error.problem}", machine=spec.name, path=error.path or path,
                hint=hint_of_vhdkit(error.hint),
            ) from error  # fmt: skip


def begin_merge(held: Held, journal: MergeOff | MergeLive) -> None:
    """Begin a merge of images that no other machine uses or can acquire. Raises InUse, NoSpace, AccessDenied."""
    held.begin(journal)
    try:
        with registry.standing_still():  # later acquisitions see the journal (`registry.check_disks`)
            refuse_used_elsewhere(held.name, (journal.target, *journal.layers))
    except BaseException:
        held.done()
        raise


def finish_merge(held: Held, target: str, layers: Sequence[str]) -> Changing:
    """`layers` were merged into `target`: replace every reference to the newest of them by the target."""
    image = held.tree.images.get(target, Image(None, ours=False))

    def follow(spec: MachineSpec) -> MachineSpec:
        moved = {disk.id: (target, image.format) for disk in spec.disks
                 if disk.path == layers[0] and disk.is_writable_image}  # fmt: skip
        return relocated(spec, moved)

    machine = registry.update(held, follow, check_images=False)
    held.tree.merged(target, layers)
    held.done()
    return machine


def store_problem(error: Exception, doing: str) -> VmmError:
    """A failure of files or images during an operation, as a VmmError."""
    if isinstance(error, VmmError):
        return error
    if isinstance(error, vhdkit.VhdkitError):
        return store_error(error)
    assert isinstance(error, OSError)
    return of_os_error(error, doing)
