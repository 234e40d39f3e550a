# SPDX-License-Identifier: Apache-2.0
"""Which driver mounts a file system, with which options. Pure: it returns command lines and runs nothing.

Decides the order in which drivers are tried and the options that each gets. Root gets the kernel's drivers first, on a
loop device with direct I/O, where this cannot deadlock (`host.loop_writes_are_safe`); everybody gets the FUSE
drivers. Images are not trusted: no set-user-id bits, no devices. Other users are not trusted, either: a FUSE driver
admits them only on request, and then to what the permissions inside allow. What the kernel's driver has refused is not
written to by another one (`is_verdict`).

A read-only mount of a file system that was not unmounted cannot replay its journal. It is first tried in the normal
way, and then without the journal: `leaves_journal` marks this, because what is in the journal is then missing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from vhdkit.formats.filesystems import CONTAINERS, FileSystem

_SAFE = "nosuid,nodev"
_EXT = ("ext2", "ext3", "ext4")
# The kernel's name where it is another.
_KERNEL_NAMES = {"ntfs": "ntfs3"}
_KERNEL = (*_EXT, "xfs", "btrfs", "ntfs", "exfat", "vfat", "squashfs", "iso9660")
# Two layers of one disk have the same XFS id, and the kernel refuses the second without this.
_KERNEL_OPTIONS = {"xfs": "nouuid"}
_WITHOUT_JOURNAL = {"ext3": "noload", "ext4": "noload", "xfs": "norecovery", "btrfs": "rescue=nologreplay"}
# FUSE drivers, and Debian's packages of them.
_FUSE = {**dict.fromkeys(_EXT, "fuse2fs"), "ntfs": "ntfs-3g"}
_SET_USER_ID = ("ntfs-3g",)
PACKAGES = {"fuse2fs": "fuse2fs", "ntfs-3g": "ntfs-3g"}


@dataclass(frozen=True, slots=True)
class Attempt:
    """One way to mount: `name` for people, the program with its words, whether the file is put on a loop device.

    `runs_as_root`: it is a set-user-id program.
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
    """What is to be tried, in this order."""
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
        if driver == "ntfs-3g":  # lets everybody in by itself, to everything
            options += ",umask=022" if allow_other else ",umask=077"
        elif not is_root and not allow_other:
            options += ",fakeroot"  # the owners inside are other people: whoever mounts the image may read it
        yield Attempt(driver, (driver, "-o", options), needs_loop=False, runs_as_root=driver in _SET_USER_ID)
        if driver == "fuse2fs" and not writable:
            yield Attempt(driver, (driver, "-o", f"{options},norecovery"), needs_loop=False, leaves_journal=True)


def _by_kernel(kind: str, options: str, *, leaves_journal: bool = False) -> Attempt:
    words = ("mount", "-i", "-t", kind, "-o", options)
    return Attempt(f"the kernel's {kind}", words, needs_loop=True, leaves_journal=leaves_journal)


def is_verdict(said: str) -> bool:
    """True when `mount` says that the kernel refused this very file system, not that it has no driver or may not."""
    said = said.lower()
    return not any(words in said for words in ("unknown filesystem type", "permission denied", "not permitted"))


def advice(found: FileSystem | None, *, is_root: bool, file: str) -> str:
    """What a person can do when there is nothing that mounts it."""
    if found is None:
        return f"mount it without --fs, and see what `file -s {file}` says there"
    if found.kind in CONTAINERS:
        return CONTAINERS[found.kind]
    driver = _FUSE.get(found.kind)
    ways = [] if is_root or found.kind not in _KERNEL else ["mount it as root"]
    if driver is not None:
        ways.append(f"install Debian's package {PACKAGES[driver]}")
    if found.kind == "vfat":
        ways.append("mount the disk without --fs and read the partition with mtools: `mdir -i FILE`, `mcopy -i FILE`")
    return ", or ".join(ways) or f"this system's kernel has no driver for {found.kind}"
