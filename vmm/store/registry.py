# SPDX-License-Identifier: Apache-2.0
"""The machines of this host, as files: the list of machines, their definitions, and who may change them.

Decides how a machine is added, found, changed and removed so that it exists whole or not at all, that one command
changes a machine at a time, and that no two machines write to one image. Must not know which machines run.

    home/machines/NAME/machine.json      or home/machines/NAME -> FOLDER/NAME if the machine lies elsewhere
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from vmm.host.loops import inode_of
from vmm.host.proc import HeldLock
from vmm.model import paths, unfinished
from vmm.model.errors import AlreadyExists, InUse, VmmError, of_os_error
from vmm.model.formats import child_suffix
from vmm.model.paths import MachinePaths, RuntimePaths, make_folders
from vmm.model.spec import DiskSpec, MachineSpec, read_spec
from vmm.store.known_images import being_merged
from vmm.store.snapshots.store import machine_turn

_FILE_IDENTITY = "file="  # prefix of the identity of a loop device in `host.block`
MAX_DEFINITION_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine's definition, and where its files are."""

    spec: MachineSpec
    paths: MachinePaths
    runtime: RuntimePaths

    @property
    def name(self) -> str:
        """Its name."""
        return self.spec.name


@dataclass(frozen=True, slots=True)
class Changing(Machine):
    """A machine whose definition was read while `lock` was held: the basis for a change."""

    lock: HeldLock


def names() -> list[str]:
    """The names of all machines, sorted. Raises AccessDenied."""
    folder = paths.registry_folder()
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if _is_name(entry.name))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise of_os_error(error, "list the machines", path=folder) from error


def load(name: str) -> Machine:
    """A machine by its name. Raises NotFound, InvalidSpec, AccessDenied."""
    machine = load_folder(paths.machine_folder(name))
    if machine.spec.name != name:  # a rename was interrupted: the folder's name is the valid one
        return Machine(machine.spec.changed(name=name), machine.paths, machine.runtime)
    return machine


def load_folder(folder: str) -> Machine:
    """The machine in a folder. Raises as `load` does."""
    where = MachinePaths(folder)
    spec = read_definition(where.definition)
    return Machine(spec, where, paths.runtime_of(spec.id))


def read_definition(path: str) -> MachineSpec:
    """Read a definition. Raises NotFound, AccessDenied, InvalidSpec."""
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_DEFINITION_BYTES + 1)
    except OSError as error:
        raise of_os_error(error, "read the machine's definition", path=path) from error
    return with_real_paths(read_spec(content[:MAX_DEFINITION_BYTES], path))


def with_real_paths(spec: MachineSpec) -> MachineSpec:
    """The definition with links in paths resolved.

    Paths are resolved when the user gives them; definitions of 0.1.0 may still hold links, and the folder of a link
    can differ from the folder of its image.
    """
    disks = [
        disk.model_copy(update={"path": os.path.realpath(disk.path)})
        if disk.path is not None and disk.kind != "pass-through" else disk
        for disk in spec.disks
    ]  # fmt: skip
    boot = {key: os.path.realpath(path) for key in ("kernel", "initrd") if (path := getattr(spec, key)) is not None}
    found = spec.model_copy(update={"disks": tuple(disks), **boot})
    return spec if found == spec else found


def load_all() -> tuple[list[Machine], list[VmmError]]:
    """All machines, and an error for each one that cannot be read."""
    machines, failures = [], []
    for name in names():
        try:
            machines.append(load(name))
        except VmmError as error:
            error.machine = name
            failures.append(error)
    return machines, failures


# -- changing ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def changing(name: str) -> Iterator[Changing]:
    """Lock the machine while the block runs. Raises InUse if it is locked by another command, and as `load`."""
    folder = paths.machine_folder(name)
    with machine_turn(folder, name) as lock:
        yield load_for_change(lock)


def load_for_change(lock: HeldLock) -> Changing:
    """The machine as it is now, with its lock held. Raises as `load`."""
    assert lock.is_held, "a machine is read for a change while its lock is held"
    found = load_folder(lock.folder)
    spec = found.spec if found.spec.name == lock.name else found.spec.changed(name=lock.name)  # as in `load`
    return Changing(spec, found.paths, found.runtime, lock)


def add(
    spec: MachineSpec, *, folder: str | None = None, fill: Callable[[MachinePaths], None] = lambda machine: None
) -> Machine:
    """Add a machine; its folder is made in `folder`, by default the host's folder for machines. It appears as a whole.

    `fill` puts further files into the folder before it becomes visible.

    Raises AlreadyExists if the name is taken, InUse for an image of another machine, InvalidSpec if the paths of its
    sockets would be too long, NoSpace, AccessDenied.
    """
    paths.runtime_of(spec.id)
    paths.make_home()
    parent = os.path.realpath(folder or paths.default_folders()["machines"])
    entry = os.path.join(paths.registry_folder(), spec.name)
    target = os.path.join(parent, spec.name)
    is_linked = parent != os.path.realpath(paths.registry_folder())
    part = unfinished.folder_of(target)
    try:
        make_folders(paths.registry_folder())
        make_folders(parent)
        with standing_still():
            if os.path.lexists(entry):
                raise AlreadyExists("a machine of that name already exists", machine=spec.name)
            if os.path.lexists(target):
                raise AlreadyExists(
                    "already exists where the new machine's folder would be", machine=spec.name, path=target
                )
            _refuse_known_id(spec)
            check_disks(spec)
            unfinished.sweep(parent, folders=True)
            os.mkdir(part, 0o700)
            try:
                os.mkdir(MachinePaths(part).logs, 0o700)
                _put(MachinePaths(part), spec)
                fill(MachinePaths(part))
                os.rename(part, target)
                if is_linked:
                    os.symlink(target, entry)
                paths.sync_folder(parent)
                paths.sync_folder(paths.registry_folder())
            except BaseException:
                shutil.rmtree(part, ignore_errors=True)
                raise
    except OSError as error:
        raise of_os_error(error, "make the machine's folder", machine=spec.name) from error
    return load(spec.name)


def _refuse_known_id(spec: MachineSpec) -> None:
    for other in load_all()[0]:
        if other.spec.id == spec.id:
            raise AlreadyExists(
                f"has the same id as the machine {other.name}", machine=spec.name, hint="a copy needs an id of its own"
            )


def save(machine: Changing, spec: MachineSpec) -> Changing:
    """Replace the definition that was read.

    Raises InUse if it has changed since, and for an image of another machine; NoSpace.
    """

    def change(present: MachineSpec) -> MachineSpec:
        if present != machine.spec:
            raise InUse("was changed by another command meanwhile", machine=machine.name, hint="try again")
        return spec

    return update(machine.lock, change)


def update(lock: HeldLock, change: Callable[[MachineSpec], MachineSpec], *, check_images: bool = True) -> Changing:
    """Change the current definition: reading and writing are one step, atomic with respect to all other writers.

    Raises whatever `change` raises, InUse for an image of another machine unless `check_images` is off, NoSpace.
    """
    with standing_still():
        machine = load_for_change(lock)
        spec = change(machine.spec)
        if check_images:
            check_disks(spec)
        _put(machine.paths, spec)
    return Changing(spec, machine.paths, machine.runtime, lock)


def _put(where: MachinePaths, spec: MachineSpec) -> None:
    """The only writer of definitions: the caller holds the machine's lock, or the folder is not visible yet."""
    paths.write_whole(where.definition, spec.to_json())


def rename(machine: Changing, spec: MachineSpec) -> None:
    """Rename a machine to the name in `spec`, under its lock. Raises AlreadyExists."""
    old, new = (os.path.join(paths.registry_folder(), name) for name in (machine.name, spec.name))
    target = os.path.join(os.path.dirname(machine.paths.folder), spec.name)
    is_link = os.path.islink(old)
    try:
        with standing_still():
            if os.path.lexists(new) or os.path.lexists(target):
                raise AlreadyExists("a machine or folder of that name already exists", machine=spec.name)
            # The definition is written last: until then the folder's name is the valid one.
            os.rename(machine.paths.folder, target)
            if is_link:
                os.symlink(target, new)
                os.unlink(old)
            _put(MachinePaths(target), spec)
            paths.sync_folder(paths.registry_folder())
    except OSError as error:
        raise of_os_error(error, "rename the machine", machine=machine.name) from error


def remove(machine: Changing) -> None:
    """Remove a machine, under its lock; its disks stay. Raises AccessDenied."""
    entry = os.path.join(paths.registry_folder(), machine.name)
    try:
        # Renamed first to a name that is not a machine's, so that half a machine is never visible.
        unfinished.sweep(os.path.dirname(machine.paths.folder), folders=True)
        hidden = unfinished.folder_of(machine.paths.folder, "removed")
        os.rename(machine.paths.folder, hidden)
        if os.path.islink(entry):
            os.unlink(entry)
        shutil.rmtree(hidden)
    except OSError as error:
        raise of_os_error(error, "remove the machine's folder", machine=machine.name) from error


@contextlib.contextmanager
def standing_still() -> Iterator[None]:
    """While the block runs, no other process writes a definition, or checks that an image is free to take or remove
    it.

    Not reentrant. Raises VmmError.
    """
    path = os.path.join(paths.home(), ".lock")
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise of_os_error(error, "lock the list of machines", path=path) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


# -- one image, one machine -------------------------------------------------------------------------------------


def check_disks(spec: MachineSpec) -> None:
    """Raise InUse if another machine uses an image or device of this one, and one of the two writes to it."""
    mine = {_identity(disk): disk for disk in spec.disks if disk.kind != "iso" and disk.path is not None}
    written = [_identity(disk) for disk in spec.disks if disk.kind != "iso"]
    if len(set(written)) != len(written):
        twice = next(disk for disk in spec.disks if written.count(_identity(disk)) > 1)
        raise InUse("is attached twice to this machine", machine=spec.name, path=twice.path)
    _refuse_merged(spec)
    others, _ = load_all()
    for other in others:
        if other.name == spec.name or other.spec.id == spec.id:  # same id: a copy, which may not use them anyway
            continue
        for disk in other.spec.disks:
            own = mine.get(_identity(disk)) if disk.kind != "iso" else None
            if own is not None and not (own.read_only and disk.read_only):
                new = f"NEW{child_suffix(own.format)}"
                child = f"give this machine a child of its own: vhdkit create {new} --parent {own.path}"
                raise InUse(
                    f"is already a disk of the machine {other.name}",
                    machine=spec.name,
                    path=own.path,
                    hint=child if own.is_image else f"vmm disk remove {other.name} {disk.id}",
                )


def _refuse_merged(spec: MachineSpec) -> None:
    """Raise InUse for an image that another machine's merge is changing or removing."""
    merged = being_merged(spec.id)
    for disk in spec.disks:
        if disk.path is not None and (other := merged.get(os.path.realpath(disk.path))) is not None:
            raise InUse(
                f"is being merged by the machine {other}", machine=spec.name, path=disk.path,
                hint=f"vmm snapshot tree {other} shows its progress; to use a copy instead: vhdkit convert",
            )  # fmt: skip


def other_user_of(disk: DiskSpec, name: str) -> str | None:
    """The name of a machine other than `name` that also has this image or device."""
    identity = _identity(disk)
    for other in load_all()[0]:
        if other.name != name and any(_identity(one) == identity for one in other.spec.disks if one.path is not None):
            return other.name
    return None


def _identity(disk: DiskSpec) -> object:
    """A value that is equal for different names of the same file or device."""
    path = disk.path or ""
    if disk.identity is not None and not disk.identity.startswith(_FILE_IDENTITY):
        return disk.identity  # the path may lead to another device by now
    if disk.identity is not None:  # a loop device counts as the file behind it
        path = disk.identity.removeprefix(_FILE_IDENTITY)
    try:
        facts = os.stat(path)
    except OSError:
        return disk.identity or os.path.realpath(path)
    if stat.S_ISBLK(facts.st_mode):
        return inode_of(path) or (facts.st_rdev,)
    return facts.st_dev, facts.st_ino


def _is_name(name: str) -> bool:
    try:
        paths.check_name(name)
    except ValueError:
        return False
    return True


def machine_of_port(port: str) -> tuple[str, str]:
    """(machine, adapter) of a switch's port; (port, "") if no machine has it."""
    prefix, _, adapter_id = port.partition(".")
    for machine in load_all()[0]:
        if machine.spec.id.replace("-", "").startswith(prefix) and adapter_id:
            return machine.name, adapter_id
    return port, ""
