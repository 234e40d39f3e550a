# SPDX-License-Identifier: Apache-2.0
"""The images that machines use, examined before a machine gets them.

Decides what a path on the command line means and which image may become a disk: it is opened as the machine will open
it, so that problems are reported at once. Everything about the images themselves is left to vhdkit.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import vhdkit
from vmm.model.errors import InvalidSpec, NotFound, Refused, store_error
from vmm.model.events import add_event
from vmm.model.formats import CHILD_SUFFIXES, ImageFormat, child_suffix, is_image_format
from vmm.model.spec import DiskSpec, PathsSpec, make_disk
from vmm.store.known_images import known_images
from vmm.store.media import open_medium
from vmm.store.registry import Machine

MIN_DISK_BYTES = 64 << 10  # a shorter file was most likely named by mistake
# The first volume descriptors follow a system area of 32 KiB (ECMA-119, 6.2.1; ECMA-167, 2/8.3.1).
_DESCRIPTORS_AT, _DESCRIPTORS_BYTES, _DESCRIPTOR_STEP = 32 << 10, 16 << 10, 2048
_CD_MARKS = (b"CD001", b"BEA01")


@dataclass(frozen=True, slots=True)
class KnownImage:
    """What was found out about an image by opening it."""

    path: str
    format: ImageFormat
    size_bytes: int
    sector_bytes: int
    physical_sector_bytes: int


def find_image(path: str, folder: str) -> str:
    """The real path of an image: the path as given, or in the folder for disks if a bare name does not exist here.

    Links are resolved once, now: snapshots lie beside the image, and a later change of the link has no effect.
    """
    if os.path.exists(path) or os.sep in path:
        return os.path.realpath(path)
    elsewhere = os.path.join(folder, path)
    return os.path.realpath(elsewhere if os.path.exists(elsewhere) else path)


def find_disk(machine: Machine, word: str) -> DiskSpec:
    """A machine's disk by its id, its serial, or any path of its image.

    Raises NotFound, and InvalidSpec if several disks have the path.
    """
    disks = machine.spec.disks
    for by in ([one for one in disks if one.id == word], [one for one in disks if one.serial == word]):
        if by:
            return by[0]
    path = os.path.realpath(word)
    found = [one for one in disks if one.path is not None and os.path.realpath(one.path) == path]
    if len(found) > 1:
        names = " and ".join(one.id for one in found)
        raise InvalidSpec(f"is used by {names}", machine=machine.name, path=word, hint="use the id of one of them")
    if found:
        return found[0]
    known = ", ".join(disk.id for disk in disks) or "none"
    raise NotFound(f"has no disk {word!r}; its disks: {known}", machine=machine.name)


def readable(path: str) -> str:
    """The real path of a file that can be opened. Raises NotFound, AccessDenied."""
    os.close(open_medium(path))
    return os.path.realpath(path)


def settings_with_real_paths(settings: Mapping[str, object]) -> dict[str, object]:
    """Settings with the real paths of files and folders. Raises NotFound, AccessDenied, InvalidSpec."""
    found = dict(settings)
    for key in ("kernel", "initrd"):
        if isinstance(path := settings.get(key), str):
            found[key] = readable(path)
    folders = settings.get("paths")
    if isinstance(folders, PathsSpec):
        folders = folders.model_dump()
    if isinstance(folders, Mapping):
        for folder in folders.values():
            if isinstance(folder, str) and not os.path.isdir(folder):
                raise InvalidSpec("is not a folder", path=folder, hint="create it first")
        found["paths"] = {
            key: os.path.realpath(folder) if isinstance(folder, str) else folder for key, folder in folders.items()
        }
    return found


def look_at(disk: DiskSpec, *, writable: bool = False, notes_folder: str | None = None) -> KnownImage:
    """Open the image of a disk as the machine would, and close it again.

    `writable`: also check that no other program uses it and that no image stands on it; what a killed disk server had
    noted in the machine's `notes_folder` is written. Raises NotFound, StoreFailed, InUse.
    """
    assert disk.path is not None
    kind = None if disk.format is None else vhdkit.FormatName(disk.format)
    try:
        with _open(disk, kind, lock=writable, writable=writable, notes_folder=notes_folder) as opened:
            if opened.size_bytes < MIN_DISK_BYTES:
                raise InvalidSpec(f"is too small for a disk: it has {opened.size_bytes} bytes", path=disk.path)
            leaf = opened.chain.leaf
            assert is_image_format(leaf.format_name)
            if leaf.format_name == "raw" and disk.format is None and is_cd_image(opened):
                raise InvalidSpec(
                    "contains the file system of a CD or DVD", path=disk.path,
                    hint="insert it as a medium (--cdrom), or force its use as a hard disk with ,format=raw",
                )  # fmt: skip
            sectors = leaf.sector_bytes, max(leaf.sector_bytes, leaf.facts.physical_sector_bytes)
            return KnownImage(disk.path, leaf.format_name, opened.size_bytes, *sectors)
    except vhdkit.NotFound as error:
        raise NotFound(
            "the image does not exist",
            path=error.path or disk.path,
            hint=_hint_for_missing(disk.path),
        ) from error
    except vhdkit.VhdkitError as error:
        raise store_error(error) from error


def _hint_for_missing(path: str) -> str:
    """How to make an image of this name, if its name says what it would be."""
    suffix, typed = os.path.splitext(path)[1].lower(), shlex.quote(path)
    if suffix in CHILD_SUFFIXES:
        return (
            "name the newest image of the disk, or make a child of another image:"
            f" vhdkit create {typed} --parent PARENT"
        )
    if is_image_format(suffix[1:]) and suffix != ".raw":
        return f"create it: vhdkit create {typed} --size 10G"
    return "name an image that exists"


def as_found(disk: DiskSpec) -> DiskSpec:
    """The disk with what its image says: its format and its sector sizes. Raises as `look_at`, and InvalidSpec."""
    found = look_at(disk)
    return make_disk(
        **disk.model_dump() | {"format": found.format, "sector_bytes": found.sector_bytes,
                               "physical_sector_bytes": found.physical_sector_bytes}
    )  # fmt: skip


def is_cd_image(opened: vhdkit.Disk) -> bool:
    """True if the content begins like an ISO 9660 or UDF image."""
    size = min(_DESCRIPTORS_BYTES, opened.size_bytes - _DESCRIPTORS_AT)
    content = opened.read(_DESCRIPTORS_AT, size) if size > 0 else b""
    return any(content[at + 1 : at + 6] in _CD_MARKS for at in range(0, len(content), _DESCRIPTOR_STEP))


def refuse_frozen(disk: DiskSpec) -> None:
    """Raise Refused if a guest would write to an image on which another image stands. Raises StoreFailed."""
    if disk.read_only or disk.path is None:
        return
    children = children_of(disk.path, parent_dirs=disk.parent_dirs)
    if children:
        more = f" and {len(children) - 1} more images stand" if len(children) > 1 else " stands"
        raise Refused(
            f"{children[0]}{more} on it: it is not the newest image, and must not change", path=disk.path,
            hint="add the newest one, which has the latest writes, or a child of its own: "
            f"vhdkit create NEW{child_suffix(disk.format)} --parent {disk.path}",
        )  # fmt: skip


def _open(
    disk: DiskSpec,
    kind: vhdkit.FormatName | None,
    *,
    lock: bool,
    writable: bool = False,
    notes_folder: str | None = None,
) -> vhdkit.Disk:
    options = vhdkit.OpenOptions(
        parent_dirs=disk.parent_dirs, allow_raw_parent=disk.allow_raw_parent, format_name=kind, lock=lock,
        notes_folder=notes_folder,
    )  # fmt: skip
    assert disk.path is not None
    return vhdkit.open_disk(disk.path, writable=writable, options=guarded(options) if writable else options)


def resize_image(disk: DiskSpec, size_bytes: int, *, shrink: bool, notes_folder: str | None) -> int:
    """Change the size of a disk's image that is not in use; returns the new size. Raises StoreFailed.

    What a killed disk server had noted in the machine's `notes_folder` is written first.
    """
    assert disk.path is not None
    options = guarded(
        vhdkit.OpenOptions(
            parent_dirs=disk.parent_dirs, allow_raw_parent=disk.allow_raw_parent, notes_folder=notes_folder
        )
    )
    try:
        return vhdkit.resize(disk.path, size_bytes, options=options, shrink=shrink).virtual_size_after_bytes
    except vhdkit.VhdkitError as error:
        raise store_error(error) from error


def guarded(options: vhdkit.OpenOptions) -> vhdkit.OpenOptions:
    """Options for operations that change an image: they refuse to change one on which an image of any machine stands.

    Taking a snapshot does not need them: it never writes to an image that has a child, and it is the way out for users
    whose machine writes to such an image.
    """
    return replace(options, known_images=known_images())


def children_of(path: str, *, parent_dirs: Sequence[str] = ()) -> list[str]:
    """The images that stand on this one: those that vhdkit finds, and those of all machines. Raises StoreFailed."""
    options = guarded(vhdkit.OpenOptions(parent_dirs=tuple(parent_dirs), allow_raw_parent=True))
    try:
        return vhdkit.find_children([path], everywhere=True, options=options)[path]
    except vhdkit.VhdkitError as error:
        raise store_error(error) from error


def note_marks(machine: Machine, disks: Sequence[DiskSpec]) -> None:
    """Mark the parents of disks that lie in other folders, so that vhdkit protects them even without vmm.

    A mark that cannot be set is recorded as an event and not raised: vmm knows the images of its machines anyway.
    """
    for disk in disks:
        if not disk.is_image or disk.path is None or disk.format == "raw":
            continue
        options = vhdkit.OpenOptions(parent_dirs=disk.parent_dirs, allow_raw_parent=disk.allow_raw_parent, lock=False)
        try:
            problems = [finding.message for finding in vhdkit.mark_parents(disk.path, options=options)]
        except vhdkit.VhdkitError as error:
            problems = [error.problem]
        for problem in problems:
            add_event(machine.paths.events, "parent-not-marked", disk=disk.id, problem=problem)
