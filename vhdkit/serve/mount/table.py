# SPDX-License-Identifier: Apache-2.0
"""The kernel's mount table, and which of its mounts are vhdkit's. Pure.

Decides how a mount of vhdkit is recognised, from the kernel's own tables alone: nothing has to be recorded, so
nothing can be stale after a crash. Must not read files.

Our mounts have the type `fuse.vhdkit` and the image as their source. A file system in one is mounted from a loop
device over one of its files, or by a FUSE driver whose source is one of its files.

Source: proc_pid_mountinfo(5).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

OUR_TYPE = "fuse.vhdkit"
_OCTAL = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of the table. `device` is "major:minor"; `options` are those of the mount and of the file system."""

    device: str
    mountpoint: str
    file_system: str
    source: str
    options: frozenset[str]

    @property
    def is_ours(self) -> bool:
        """True for a mount that one of our servers answers."""
        return self.file_system == OUR_TYPE

    @property
    def is_writable(self) -> bool:
        """False when mounted read-only."""
        return "ro" not in self.options

    @property
    def owner_id(self) -> int | None:
        """Of a FUSE mount: the user who mounted it."""
        for option in self.options:
            if option.startswith("user_id="):
                return int(option.removeprefix("user_id="))
        return None


@dataclass(frozen=True, slots=True)
class Stack:
    """One of our mounts (`base`) and the file systems in it that are mounted elsewhere, each with its loop device."""

    base: Mount
    inside: tuple[tuple[Mount, str | None], ...] = ()

    @property
    def loops(self) -> tuple[str, ...]:
        """The loop devices under those file systems."""
        return tuple(loop for _, loop in self.inside if loop is not None)


def parse(text: str) -> list[Mount]:
    """Parse /proc/self/mountinfo, oldest mount first. Malformed lines are skipped."""
    found = []
    for line in text.split("\n"):  # not splitlines: names may contain every other line separator
        left, sign, right = line.partition(" - ")
        fields, more = left.split(" "), right.split(" ")
        if sign and len(fields) >= 6 and len(more) >= 3:
            options = frozenset([*fields[5].split(","), *more[2].split(",")])
            found.append(Mount(fields[2], _plain(fields[4]), _plain(more[0]), _plain(more[1]), options))
    return found


def _plain(text: str) -> str:
    """Decode the octal escapes of blanks and the like; the kernel leaves other bytes as they are."""
    return _OCTAL.sub(lambda match: chr(int(match[1], 8)), text)


def top_at(mounts: Sequence[Mount], path: str) -> Mount | None:
    """The visible mount at exactly this path: the last one there."""
    return next((one for one in reversed(mounts) if one.mountpoint == path), None)


def stacks(mounts: Sequence[Mount], loop_files: Mapping[str, str]) -> Iterator[Stack]:
    """All of our mounts. `loop_files`: the file behind each loop device ("/dev/loop3")."""
    for base in mounts:
        if base.is_ours:
            inside = []
            for one in mounts:
                loop = one.source if one.source in loop_files else None
                file = loop_files[one.source] if loop is not None else one.source
                if not one.is_ours and _is_below(file, base.mountpoint):
                    inside.append((one, loop))
            yield Stack(base, tuple(inside))


def stack_at(found: Sequence[Stack], path: str) -> Stack | None:
    """The newest stack whose base, or a file system in it, is mounted at that path."""
    for one in reversed(found):
        if any(path == mount.mountpoint for mount in (one.base, *(inner for inner, _ in one.inside))):
            return one
    return None


def _is_below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def driver_name(mount: Mount) -> str:
    """The driver of a mounted file system, as far as the table shows it: ntfs-3g gives FUSE no type of its own."""
    names = {"fuse": "ntfs-3g", "fuseblk": "ntfs-3g", "fuse.ext4": "fuse2fs"}
    return names.get(mount.file_system, mount.file_system)


def option_text(options: Mapping[str, str | bool]) -> str:
    """Options in libfuse's form for -o, with separators escaped."""
    words = []
    for name, value in options.items():
        if value is True:
            words.append(name)
        elif value is not False:
            words.append(f"{name}=" + value.replace("\\", "\\\\").replace(",", "\\,"))
    return ",".join(words)


def server_address(device: str) -> str:
    """The address at which other processes find the server of a mount: a name in the abstract socket namespace."""
    return f"\0vhdkit-mount-{device}"
