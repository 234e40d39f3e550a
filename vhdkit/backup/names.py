# SPDX-License-Identifier: Apache-2.0
"""The names in a repository: which ones are allowed, and what they are called.

Decides which text can be an id, a file name, the name of a machine, a night's number, and how the place of an image is
written. A repository is untrusted input: a name that is not allowed here reaches no system call. Pure.

    machines/MACHINE-ID/images/DISK-ID/00018.avhd     written "images/DISK-ID/00018.avhd" in a manifest
    bases/IMAGE-ID.vhd                                 written "bases/IMAGE-ID.vhd"
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

MAX_NAME_CHARACTERS = 128
MAX_NIGHT = 999_999_999
IMAGES, BASES = "images", "bases"
SUMS_SUFFIX = ".sums"
_NAME = re.compile(rf"[A-Za-z0-9_][A-Za-z0-9._-]{{0,{MAX_NAME_CHARACTERS - 1}}}")
# A superset of the names that vmm gives to machines. "@" is not among them: NAME@NIGHT has one meaning.
_MACHINE = re.compile(rf"[A-Za-z0-9][A-Za-z0-9 ._-]{{0,{MAX_NAME_CHARACTERS - 1}}}")
_ID = re.compile(r"[0-9a-f]{32}")
_NIGHT = re.compile(r"[0-9]{5}|[1-9][0-9]{5,8}")
_NUMBER_OF_FILE = re.compile(r"([0-9]{5}|[1-9][0-9]{5,8})(?:\.|$)")


def is_name(text: str) -> bool:
    """True for an id or a file name: letters, digits, `.`, `_` and `-`; the first is a letter, a digit or `_`."""
    return _NAME.fullmatch(text) is not None


def is_machine_name(text: str) -> bool:
    """True for what a machine may be called. Spaces are allowed inside."""
    return _MACHINE.fullmatch(text) is not None and text[-1] not in " ."


def is_unique_id(text: str) -> bool:
    """True for an id that a repository, a night or a lease was given: 32 random hexadecimal digits."""
    return _ID.fullmatch(text) is not None


def new_unique_id() -> str:
    """A new random id."""
    return os.urandom(16).hex()


def night_word(number: int) -> str:
    """A night as its files are named: at least five digits."""
    assert 0 < number <= MAX_NIGHT
    return f"{number:05d}"


def night_of(text: str) -> int | None:
    """The night that the word stands for; None for other text."""
    return (int(text) or None) if _NIGHT.fullmatch(text) else None


def night_of_file(name: str) -> int | None:
    """The night in which a file with this name was made: what stands before the first dot. None for other names."""
    found = _NUMBER_OF_FILE.match(name)
    return (int(found[1]) or None) if found else None


@dataclass(frozen=True, slots=True, order=True)
class ImagePlace:
    """Where an image lies: the disk of the machine to which it belongs, None for a shared base; and its file name."""

    disk_id: str | None
    name: str

    @property
    def text(self) -> str:
        """As manifests have it."""
        return f"{BASES}/{self.name}" if self.disk_id is None else f"{IMAGES}/{self.disk_id}/{self.name}"

    @property
    def sums_name(self) -> str:
        """The file name of the table of sums beside it."""
        return self.name + SUMS_SUFFIX

    @classmethod
    def of_text(cls, text: str) -> ImagePlace | None:
        """The place that is written so; None for anything else."""
        match text.split("/"):
            case ["bases", name] if is_image_name(name):
                return cls(None, name)
            case ["images", disk_id, name] if is_name(disk_id) and is_image_name(name):
                return cls(disk_id, name)
        return None


def is_image_name(text: str) -> bool:
    """True for a file name that an image can have; its table of sums has a name, too."""
    return is_name(text) and is_name(text + SUMS_SUFFIX) and not text.endswith(SUMS_SUFFIX)
