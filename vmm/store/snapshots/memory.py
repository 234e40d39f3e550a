# SPDX-License-Identifier: Apache-2.0
"""The folder of one snapshot: its configuration, and its memory if it has any.

    ID.json        the definition when the snapshot was taken
    ID.bin         memory and devices, as QEMU wrote them (its migration stream)
    ID.vsv         the machine that they fit: QEMU, machine type, devices, size of the .bin
    ID.nvram       the UEFI variables, if the machine has them

Decides that a folder appears whole or not at all, that space for all the memory is reserved before anything is touched
(QEMU hangs a guest if the disk becomes full during its background capture), and how memory gets from a saved machine
into a snapshot and back. A memory file never changes once it is complete, so it is hard-linked instead of copied where
possible.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from vmm.kvm import memory_file
from vmm.model import unfinished
from vmm.model.errors import NoSpace, VmmError, of_os_error
from vmm.model.paths import MachinePaths, default_folders, make_folders, sync_folder, write_whole
from vmm.store import saved
from vmm.store.media import Media

if TYPE_CHECKING:
    from vmm.model.spec import MachineSpec

MIB = 1 << 20
# The guest's memory page by page with a header each, and the state of screen, firmware and devices.
PAGES_FACTOR, OTHER_BYTES = 1.01, 64 * MIB
_PIECE_BYTES = 32 * MIB  # size of a copy between two progress reports
_KEEP_SIZE = 1  # FALLOC_FL_KEEP_SIZE
_MAX_DESCRIPTION_BYTES = 8 << 20


def folder_of(spec: MachineSpec, snapshot_id: str) -> str:
    """The path at which a snapshot's folder is made. Raises VmmError."""
    base = spec.paths.snapshots or default_folders()["snapshots"]
    return os.path.join(os.path.abspath(base), spec.id, snapshot_id)


class SnapshotFolder:
    """The files of one snapshot."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.part = f"{folder}.part"
        self._name = os.path.basename(folder)

    @property
    def definition(self) -> str:
        """The configuration."""
        return os.path.join(self.folder, f"{self._name}.json")

    @property
    def memory(self) -> str:
        """The memory."""
        return os.path.join(self.folder, f"{self._name}.bin")

    @property
    def description(self) -> str:
        """The description of the machine that the memory fits."""
        return os.path.join(self.folder, f"{self._name}.vsv")

    @property
    def uefi_variables(self) -> str:
        """The UEFI variables."""
        return os.path.join(self.folder, f"{self._name}.nvram")

    def in_part(self, path: str) -> str:
        """The path of one of its files while the folder is incomplete."""
        return os.path.join(self.part, os.path.basename(path))

    # -- making ----------------------------------------------------------------------------------------------------

    def begin(self, spec: MachineSpec) -> None:
        """Make the folder with the configuration, under a name that marks it as incomplete. Raises NoSpace."""
        try:
            make_folders(os.path.dirname(self.folder))
            self._empty(self.part, "json|bin|vsv|nvram")
            os.mkdir(self.part, 0o700)
            write_whole(self.in_part(self.definition), spec.to_json())
        except OSError as error:
            raise of_os_error(error, "make the snapshot's folder", path=self.folder) from error

    def write_definition(self, spec: MachineSpec) -> None:
        """Replace the configuration in an existing folder, such as an imported one. Raises NoSpace."""
        write_whole(self.definition, spec.to_json())

    def open_memory(self, memory_bytes: int) -> tuple[int, bool]:
        """(a new file for memory of that size, whether all its space is reserved). Raises NoSpace, AccessDenied.

        Not reserved only if the file system does not support it; there is enough space at the moment.
        """
        path = self.in_part(self.memory)
        wanted = int(memory_bytes * PAGES_FACTOR) + OTHER_BYTES
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
            descriptor = os.open(path, flags, 0o600)
            try:
                return descriptor, _reserve(descriptor, wanted)
            except BaseException:
                os.close(descriptor)
                raise
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise NoSpace(f"not enough space for the machine's memory ({wanted // MIB} MiB)", path=path) from error
            raise of_os_error(error, "reserve space for the machine's memory", path=path) from error

    def complete_memory(self, descriptor: int, size_bytes: int, document: dict[str, Any]) -> None:
        """All memory is written: release the excess space, sync, and describe the file.

        Raises VmmError, also if the content is not a machine's memory.
        """
        path = self.in_part(self.memory)
        try:
            problem = memory_file.problem_of(descriptor, size_bytes)
            if problem is not None:
                raise VmmError(f"the memory was not captured: {problem}", path=path)
            os.ftruncate(descriptor, size_bytes)
            os.fsync(descriptor)
        except OSError as error:
            raise of_os_error(error, "store the machine's memory", path=path) from error
        document = {**document, "memory_file_bytes": size_bytes}
        write_whole(self.in_part(self.description), json.dumps(document, indent=1).encode() + b"\n")

    def copy_uefi(self, machine: MachinePaths, spec: MachineSpec) -> None:
        """Copy the UEFI variables, if there are any."""
        if spec.firmware == "uefi":
            with contextlib.suppress(FileNotFoundError):
                write_whole(self.in_part(self.uefi_variables), _content(machine.uefi_variables))

    def take_saved(self, machine: MachinePaths) -> int:
        """Take the memory of a saved machine for this snapshot as well; returns its size. Raises NoSpace, VmmError."""
        source = os.path.join(machine.saved, "memory.bin")
        share_file(source, self.in_part(self.memory))
        content = _content(os.path.join(machine.saved, "state.json"))
        write_whole(self.in_part(self.description), content)
        return os.stat(source).st_size

    def finish(self) -> None:
        """The folder is complete: give it its final name. Raises VmmError."""
        try:
            os.rename(self.part, self.folder)
            sync_folder(os.path.dirname(self.folder))
        except OSError as error:
            raise of_os_error(error, "name the snapshot's folder", path=self.folder) from error

    def discard(self) -> list[str]:
        """Remove the snapshot's files, complete or not. Other files in the folder stay, and are returned."""
        left = [path for folder in (self.part, self.folder) for path in self._empty(folder, "json|bin|vsv|nvram")]
        with contextlib.suppress(OSError):  # fails unless this was the machine's last snapshot
            os.rmdir(os.path.dirname(self.folder))
        return left

    def discard_memory(self) -> list[str]:
        """Remove the memory and keep the rest. Entries of these names that are not files stay, and are returned."""
        self._empty(self.folder, "bin|vsv")
        return [path for path in (self.memory, self.description) if os.path.lexists(path)]

    def _empty(self, folder: str, kinds: str) -> list[str]:
        """Remove a snapshot's regular files from its folder, and the folder if that is empty; return what is left."""
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return []
        except OSError:  # a link or a file, which is not ours
            return [folder]
        own = re.compile(rf"{re.escape(self._name)}\.({kinds})(\.[0-9]+\.part)?|{unfinished.FILE_PATTERN}")
        left = []
        try:
            for name in os.listdir(descriptor):
                facts = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
                if own.fullmatch(name) and stat.S_ISREG(facts.st_mode):
                    os.unlink(name, dir_fd=descriptor)
                else:
                    left.append(os.path.join(folder, name))
            if not left:
                os.rmdir(folder)
        except OSError:
            return left or [folder]
        finally:
            os.close(descriptor)
        return left

    # -- returning to the snapshot -----------------------------------------------------------------------------------

    def prepare_saved(self, machine: MachinePaths, spec: MachineSpec) -> str:
        """Make the folder of a saved state from this snapshot's memory, complete except for its name. Raises VmmError.

        `spec` is the definition that will be in force then.
        """
        folder = applied_folder(machine)
        try:
            shutil.rmtree(folder, ignore_errors=True)
            os.mkdir(folder, 0o700)
            share_file(self.memory, os.path.join(folder, "memory.bin"))
            document = json.loads(_content(self.description))
            document["had_kernel"] = saved.had_kernel(document)
            document["definition"] = json.loads(spec.to_json())
            write_whole(os.path.join(folder, "state.json"), json.dumps(document, indent=1).encode() + b"\n")
        except OSError as error:
            raise of_os_error(error, "restore the memory", path=folder) from error
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise VmmError("is damaged: it does not describe a machine's memory", path=self.description) from error
        return folder


def applied_folder(machine: MachinePaths) -> str:
    """The folder in which the saved state is prepared when a snapshot is applied."""
    return f"{machine.saved}.applied"


def put_saved(machine: MachinePaths) -> None:
    """Replace the machine's saved state with the prepared one. Idempotent.

    Raises VmmError.
    """
    try:
        if os.path.isdir(applied_folder(machine)):
            drop_saved(machine)
            os.rename(applied_folder(machine), machine.saved)
            sync_folder(machine.folder)
    except OSError as error:
        raise of_os_error(error, "restore the memory", path=machine.saved) from error


def adapt_saved(machine: MachinePaths, spec: MachineSpec) -> None:
    """Keep the saved state usable for the machine after its disks have changed their paths. Raises VmmError."""
    path = os.path.join(machine.saved, "state.json")
    try:
        document = json.loads(_content(path))
        document["had_kernel"] = saved.had_kernel(document)
        document["definition"] = json.loads(spec.to_json())
    except OSError as error:
        raise of_os_error(error, "read the saved state", path=path) from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise VmmError("is damaged: it does not describe a saved state", path=path) from error
    write_whole(path, json.dumps(document, indent=2).encode() + b"\n")
    saved.note_disks(machine, spec)


def drop_saved(machine: MachinePaths) -> None:
    """Remove the machine's saved state, if it has one."""
    if saved.is_saved(machine):
        saved.use_up(machine)


def description_document(
    spec: MachineSpec,
    *,
    qemu_version: str,
    accelerator: str,
    was_running: bool,
    media: Media,
    mtus: Mapping[str, int],
) -> dict[str, Any]:
    """The description written beside a memory file, in the form that `saved` reads."""
    return {
        "format": saved.FORMAT,
        "saved_at": time.time(),
        "qemu_version": qemu_version,
        "accelerator": accelerator,
        "was_running": was_running,
        **saved.machine_document(spec, media, mtus),
    }


def share_file(source: str, target: str) -> None:
    """Hard-link a file that never changes, or copy it if that is impossible. Raises OSError."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.EACCES):
            raise
        copy_file(source, target)


def copy_file(source: str, target: str, did: Callable[[int], None] = lambda size_bytes: None) -> None:
    """Copy a file and sync it; shares space if the file system can, and keeps holes. Raises OSError.

    `did` is called with the number of bytes of each copied piece.
    """
    with open(source, "rb") as reading:
        copy_open(reading.fileno(), target, did)


def copy_open(reading: int, target: str, did: Callable[[int], None] = lambda size_bytes: None) -> None:
    """As `copy_file`, from an open file. The copy is readable by our user only, whatever the umask. Raises OSError."""
    writing = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        size = os.fstat(reading).st_size
        os.truncate(writing, size)
        position = 0
        while position < size:
            try:
                start = os.lseek(reading, position, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    break  # a hole up to the end
                raise
            end = min(size, os.lseek(reading, start, os.SEEK_HOLE))
            _copy_range(reading, writing, start, end, did)
            position = end
        os.fsync(writing)
    finally:
        os.close(writing)


def _copy_range(reading: int, writing: int, start: int, end: int, did: Callable[[int], None]) -> None:
    while start < end:
        piece = min(end - start, _PIECE_BYTES)
        try:
            done = os.copy_file_range(reading, writing, piece, start, start)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            done = os.pwrite(writing, os.pread(reading, min(piece, 8 * MIB), start), start)
        if done == 0:
            raise OSError(errno.EIO, "the file became shorter while it was copied")
        start += done
        did(done)


def _reserve(descriptor: int, size_bytes: int) -> bool:
    """Reserve space without extending the file, so that its length shows how much was written."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    if libc.fallocate(descriptor, _KEEP_SIZE, 0, size_bytes) == 0:
        return True
    number = ctypes.get_errno()
    if number not in (errno.EOPNOTSUPP, errno.ENOSYS):
        raise OSError(number, os.strerror(number))
    facts = os.fstatvfs(descriptor)
    if facts.f_bavail * facts.f_frsize < size_bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return False


def _content(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read(_MAX_DESCRIPTION_BYTES)
