# SPDX-License-Identifier: Apache-2.0
"""The media in a machine's drives: how a medium is identified, and whether it is still the one that the guest had.

Decides that a medium is identified by its content and not by its name: a guest that continues with another medium in
the drive must be notified, otherwise it uses cached directories and pages of the old medium. An image that was moved
is the same medium; a newer image under the old name is not. Content is compared by samples, which distinguish images
that were made separately: those differ in their volume descriptors and in the location of files.

Must not know QEMU's commands, nor where a saved machine's description is stored. Light: the command line starts
machines with it.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from vmm.model.errors import InvalidSpec, Refused, VmmError, of_os_error

if TYPE_CHECKING:
    from vmm.model.spec import DiskSpec, MachineSpec

MIB = 1 << 20
_EDGE_BYTES, _SAMPLE_BYTES, _SAMPLES = MIB, 64 << 10, 64

Media = Mapping[str, str | None]  # drive -> identity of its medium, None if empty; a Media of None: not recorded


def identity_of(descriptor: int) -> str:
    """The identity of an open medium: a hash of its size, its first and last MiB, and 64 samples. Raises OSError."""
    import hashlib  # slow to import, and few machines have media

    size = os.lseek(descriptor, 0, os.SEEK_END)
    digest = hashlib.sha256(b"%d" % size)
    for start, length in _samples(size):
        while length:
            piece = os.pread(descriptor, min(length, MIB), start)
            if not piece:
                break  # the file was truncated meanwhile: another medium
            digest.update(piece)
            start, length = start + len(piece), length - len(piece)
    return digest.hexdigest()


def _samples(size: int) -> Iterator[tuple[int, int]]:
    """(offset, length) of the samples."""
    if size <= 2 * _EDGE_BYTES + _SAMPLES * _SAMPLE_BYTES:
        yield 0, size
        return
    yield 0, _EDGE_BYTES
    step = (size - 2 * _EDGE_BYTES - _SAMPLE_BYTES) // (_SAMPLES - 1)
    for number in range(_SAMPLES):
        yield _EDGE_BYTES + number * step, _SAMPLE_BYTES
    yield size - _EDGE_BYTES, _EDGE_BYTES


def known_by(descriptor: int, path: str | None) -> str:
    """As `identity_of`. Raises AccessDenied, VmmError, naming the path."""
    try:
        return identity_of(descriptor)
    except OSError as error:
        raise of_os_error(error, "read the medium", path=path) from error


def look_at_medium(path: str) -> str:
    """The identity of the medium at a path. Raises NotFound, AccessDenied, InvalidSpec, VmmError."""
    descriptor = open_medium(path)
    try:
        return known_by(descriptor, path)
    finally:
        os.close(descriptor)


def open_medium(path: str) -> int:
    """Open an ISO image for reading. Raises NotFound, AccessDenied, InvalidSpec."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise of_os_error(error, "open the file", path=path) from error
    facts = os.fstat(descriptor)
    if not (stat.S_ISREG(facts.st_mode) or stat.S_ISBLK(facts.st_mode)) or not os.lseek(descriptor, 0, os.SEEK_END):
        os.close(descriptor)
        raise InvalidSpec("is neither a file with content nor a block device", path=path)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def is_device(descriptor: int) -> bool:
    """True for a block device, for which QEMU needs another driver."""
    return stat.S_ISBLK(os.fstat(descriptor).st_mode)


# -- missing files -------------------------------------------------------------------------------------------------


def change_hint(name: str, drive: DiskSpec) -> str:
    """Hint: how to change or remove the medium of a drive."""
    return f"vmm disk change {name} {drive.id} FILE puts a medium in, and --eject leaves the drive empty"


def kernel_hint(name: str, what: str) -> str:
    """Hint: how to change or remove a machine's kernel or initrd."""
    none = "--kernel ''" if what == "kernel" else "--initrd ''"
    return f"vmm set {name} --{what} FILE sets another one, and {none} removes it"


def open_in_drive(spec: MachineSpec, drive: DiskSpec) -> int:
    """Open the medium of a drive for reading. Raises NotFound, AccessDenied, InvalidSpec with a hint."""
    assert drive.path is not None
    try:
        return open_medium(drive.path)
    except VmmError as error:
        error.hint = error.hint or change_hint(spec.name, drive)
        raise


def look_at_files(spec: MachineSpec) -> None:
    """Raise, with a hint, whatever prevents the media, the kernel or the initrd of a machine from being opened."""
    for disk in spec.disks:
        if disk.kind == "iso" and disk.path is not None:
            os.close(open_in_drive(spec, disk))
    for what, path in (("kernel", spec.kernel), ("initrd", spec.initrd)):
        if path is not None:
            try:
                os.close(open_medium(path))
            except VmmError as error:
                error.hint = error.hint or kernel_hint(spec.name, what)
                raise


def media_of(spec: MachineSpec) -> dict[str, str | None]:
    """Drive -> identity of its medium. Raises NotFound, AccessDenied, InvalidSpec, VmmError."""
    return {
        disk.id: None if disk.path is None else look_at_medium(disk.path) for disk in spec.disks if disk.kind == "iso"
    }


# -- when a guest continues ----------------------------------------------------------------------------------------


def refuse_other_media(spec: MachineSpec, then: Media | None, accepted: Media) -> None:
    """Raise Refused unless each drive has the medium that the guest had, or one that the user has inserted since.

    `then`: None if the media were not recorded. Missing files are refused as well.
    """
    with _as_refusal(spec):
        look_at_files(spec)
    for drive in spec.disks:
        if drive.kind != "iso" or then is None or drive.id not in then:
            continue
        now = None if drive.path is None else look_at_medium(drive.path)
        if now != then[drive.id] and not (drive.id in accepted and accepted[drive.id] == now):
            had = "another medium" if then[drive.id] is not None else "no medium"
            raise Refused(
                f"the saved state does not fit: the guest had {had} in {drive.id}", machine=spec.name,
                path=drive.path, hint=f"{change_hint(spec.name, drive)}: the guest will notice the change",
            )  # fmt: skip


@contextlib.contextmanager
def _as_refusal(spec: MachineSpec) -> Iterator[None]:
    """Refuse missing files that a saved machine needs; its memory is kept, also if the user follows the hint."""
    try:
        yield
    except VmmError as error:
        raise Refused(
            f"the saved state needs it: {error.problem}", machine=spec.name, path=error.path,
            hint=f"{error.hint}; the saved memory is kept. The guest notices another medium in a drive, and"
            " uses another kernel or initrd once it restarts",
        ) from error  # fmt: skip


def changed_drives(spec: MachineSpec, then: Media | None, accepted: Media, now: Media) -> list[str]:
    """The drives for which the guest must be notified of another medium."""
    drives = [disk.id for disk in spec.disks if disk.kind == "iso"]
    if then is None:
        return [one for one in drives if one in accepted]
    return [one for one in drives if one in then and now.get(one) != then[one]]
