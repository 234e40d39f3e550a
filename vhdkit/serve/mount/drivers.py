# SPDX-License-Identifier: Apache-2.0
"""Which driver mounts a file system, and with which options. Pure: it returns command lines and runs nothing.

Decides the order in which drivers are tried and the options that each gets. Root gets the kernel's drivers first, on a
loop device with direct I/O, where this cannot deadlock (`host.loop_writes_are_safe`); every user gets the FUSE
drivers. Images are not trusted: no set-user-id bits, no devices. Other users are not trusted, either: a FUSE driver
admits them only on request, and then only to what the permissions inside allow. A file system that the kernel's driver
has refused is not written to by another driver (`is_verdict`).

A read-only mount of a file system that was not cleanly unmounted cannot replay its journal. It is first tried in the
normal way, then without the journal: `leaves_journal` marks this, because the changes in the journal are then missing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from vhdkit.formats.filesystems import CONTAINERS, FileSystem

_SAFE = "nosuid,nodev"
_EXT = ("ext2", "ext3", "ext4")
# The kernel's name if it differs.
_KERNEL_NAMES = {"ntfs": "ntfs3"}
_KERNEL = (*_EXT, "xfs", "btrfs", "ntfs", "exfat", "vfat", "squashfs", "iso9660")
# Two layers of one disk have the same XFS id, and the kernel refuses the second without this.
_KERNEL_OPTIONS = {"xfs": "nouuid"}
_WITHOUT_JOURNAL = {"ext3": "noload", "ext4": "noload", "xfs": "norecovery", "btrfs": "rescue=nologreplay"}
# FUSE drivers, and the Debian packages that contain them.
_FUSE = {**dict.fromkeys(_EXT, "fuse2fs"), "ntfs": "ntfs-3g"}
_SET_USER_ID = ("ntfs-3g",)
PACKAGES = {"fuse2fs": "fuse2fs", "ntfs-3g": "ntfs-3g"}


@dataclass(frozen=True, slots=True)
class Attempt:
    """One way to mount: `name` for messages, the program with its arguments, and whether it needs a loop device.

    `runs_as_root`: the program is set-user-id root.
    """

    name: str
    words: tuple[str, ...]
    needs_loop: bool
    leaves_journal: bool = False
    runs_as_root: bool = False

    def command(self, source: str, target: str) -> list[str]:
        """The command line."""
        return [*self.words, source, target]


def attempts(
    found: FileSystem, *, writable: bool, is_root: bool, allow_other: bool = False, safe_loop: bool = True
) -> Iterator[Attempt]:
    """The ways to try, in order."""
    access = "rw" if writable else "ro"
    if is_root and found.kind in _KERNEL and (safe_loop or not writable):
        kind = _KERNEL_NAMES.get(found.kind, found.kind)
        options = ",".join(filter(None, (access, _SAFE, _KERNEL_OPTIONS.get(found.kind))))
        yield _by_kernel(kind, options)
        if not writable and found.kind in _WITHOUT_JOURNAL:
            yield _by_kernel(kind, f"{options},{_WITHOUT_JOURNAL[found.kind]}", leaves_journal=True)
    driver = _FUSE.get(found.kind)
    if driver is not None:
        options = access + (",allow_other" if allow_other else "")
        if driver == "ntfs-3g":  # by default it gives every user full access
            options += ",umask=022" if allow_other else ",umask=077"
        elif not is_root and not allow_other:
            options += ",fakeroot"  # files inside belong to other users: the user who mounts may read them all
        yield Attempt(driver, (driver, "-o", options), needs_loop=False, runs_as_root=driver in _SET_USER_ID)
        if driver == "fuse2fs" and not writable:
            yield Attempt(driver, (driver, "-o", f"{options},norecovery"), needs_loop=False, leaves_journal=True)


def _by_kernel(kind: str, options: str, *, leaves_journal: bool = False) -> Attempt:
    words = ("mount", "-i", "-t", kind, "-o", options)
    return Attempt(f"the kernel's {kind}", words, needs_loop=True, leaves_journal=leaves_journal)


def is_verdict(message: str) -> bool:
    """True if `mount` reports that the kernel refused this file system, not that a driver or permission is missing."""
    message = message.lower()
    return not any(words in message for words in ("unknown filesystem type", "permission denied", "not permitted"))


def advice(found: FileSystem | None, *, is_root: bool, file: str) -> str:
    """What the user can do if nothing can mount it."""
    if found is None:
        return f"mount it without --fs, and examine it with `file -s {file}`"
    if found.kind in CONTAINERS:
        return CONTAINERS[found.kind]
    driver = _FUSE.get(found.kind)
    ways = [] if is_root or found.kind not in _KERNEL else ["mount it as root"]
    if driver is not None:
        ways.append(f"install Debian's package {PACKAGES[driver]}")
    if found.kind == "vfat":
        ways.append("mount the disk without --fs and read the partition with mtools: `mdir -i FILE`, `mcopy -i FILE`")
    return ", or ".join(ways) or f"this system's kernel has no driver for {found.kind}"
