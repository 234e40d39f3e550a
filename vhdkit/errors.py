# SPDX-License-Identifier: Apache-2.0
"""Every error the library raises, with its errno and the exit code of the command line.

Decides how a failure is named and worded: one sentence with the file, the structure, the byte offset and
what to do next. Knows nothing about files or formats. A caller catches `VhdkitError`, or the class whose cause
it can handle. Adapters (CLI, NBD, FUSE) translate by the class attributes, never by text.
"""

from __future__ import annotations

import errno as errnos
import os
import shlex
from enum import StrEnum
from typing import Any

CUT_SHORT_HINT = "if the file is a copy, it may be incomplete: copy it again"  # for what lies past a file's end


class CorruptReason(StrEnum):
    """One member per way an image can be wrong; `CorruptImage.reason` and `check` findings carry it."""

    NO_FOOTER = "no-footer"
    FOOTER_CHECKSUM = "footer-checksum"
    FOOTER_VERSION = "footer-version"
    FOOTER_POISONED = "footer-poisoned"
    DISK_TYPE = "disk-type"
    VIRTUAL_SIZE = "virtual-size"
    DATA_OUTSIDE_FILE = "data-outside-file"
    HEADER_OUTSIDE_FILE = "header-outside-file"
    HEADER_COOKIE = "header-cookie"
    HEADER_CHECKSUM = "header-checksum"
    HEADER_VERSION = "header-version"
    BLOCK_SIZE = "block-size"
    BAT_OUTSIDE_FILE = "bat-outside-file"
    BAT_TOO_SHORT = "bat-too-short"
    STRUCTURES_OVERLAP = "structures-overlap"
    BLOCK_OUTSIDE_FILE = "block-outside-file"
    BLOCK_OVER_METADATA = "block-over-metadata"
    BLOCKS_OVERLAP = "blocks-overlap"
    LOCATOR_OUTSIDE_FILE = "locator-outside-file"
    LOCATOR_LENGTH = "locator-length"
    LOCATOR_TEXT = "locator-text"
    FILE_IDENTIFIER = "file-identifier"
    HEADER_PAIR = "header-pair"
    HEADER_NUMBER = "header-number"
    LOG_VERSION = "log-version"
    LOG_PLACE = "log-place"
    LOG_SEQUENCE = "log-sequence"
    LOG_TRUNCATED = "log-truncated"
    LOG_ENTRY = "log-entry"
    LOG_OFFSET = "log-offset"
    LOG_OVER_DATA = "log-over-data"
    REGION_TABLE = "region-table"
    REGION_ENTRY = "region-entry"
    REGION_REQUIRED = "region-required"
    REGION_OUTSIDE_FILE = "region-outside-file"
    METADATA_TABLE = "metadata-table"
    ITEM_PLACE = "item-place"
    ITEM_REQUIRED = "item-required"
    ITEM_MISSING = "item-missing"
    ITEM_VALUE = "item-value"
    INCOMPLETE_FILE = "incomplete-file"
    SECTOR_SIZE = "sector-size"
    LOCATOR_TYPE = "locator-type"
    LOCATOR_KEYS = "locator-keys"
    BLOCK_STATE = "block-state"
    BITMAP_MISSING = "bitmap-missing"
    BAT_RESERVED = "bat-reserved"
    CHAIN_LOOP = "chain-loop"
    CHAIN_DEPTH = "chain-depth"
    CHAIN_SECTOR_SIZE = "chain-sector-size"


class VhdkitError(Exception):
    """Base of all errors of the library.

    `path` is the file, `structure` the part of it ("footer", "BAT entry 7"), `offset_bytes` where that part
    starts, `expected` and `found` the two values that differ, `hint` what a person can do next.
    """

    errno: int = errnos.EIO
    exit_code: int = 1

    def __init__(
        self,
        problem: str,
        *,
        path: str | None = None,
        structure: str | None = None,
        offset_bytes: int | None = None,
        expected: object = None,
        found: object = None,
        hint: str | None = None,
    ) -> None:
        self.problem = problem
        self.path = None if path is None else os.fsdecode(path)  # a caller may have given bytes, or a Path
        self.structure = structure
        self.offset_bytes = offset_bytes
        self.expected = expected
        self.found = found
        self.hint = hint
        super().__init__(problem)

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (type(self), self.args), self.__dict__

    def __str__(self) -> str:
        place = []
        if self.path is not None:
            place.append(printable(self.path))
        if self.structure is not None:
            at = "" if self.offset_bytes is None else f" at byte {self.offset_bytes:#x}"
            place.append(f"{self.structure}{at}")
        text = ": ".join([*place, self.problem])
        text += difference(self.expected, self.found)
        return f"{text}; {self.hint}" if self.hint else text


def _unpickled(kind: type[VhdkitError], args: tuple[object, ...]) -> VhdkitError:
    """An error without its fields, which are filled in next: each class takes its own arguments."""
    error = kind.__new__(kind)
    Exception.__init__(error, *args)
    return error


def difference(expected: object, found: object) -> str:
    """The two values that differ, in brackets; empty if neither is known."""
    known = {"expected": expected, "found": found}
    words = [f"{name} {value}" for name, value in known.items() if value is not None]
    return f" ({', '.join(words)})" if words else ""


def printable(text: str) -> str:
    """`text` with control characters and undecodable bytes escaped: names come from untrusted images."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "replace").decode() for c in text)


def as_clause(problem: str) -> str:
    """A problem worded for the middle of a sentence: "is a device", which follows a path, becomes "it is a device"."""
    return f"it {problem}" if problem.partition(" ")[0] in ("is", "has", "was", "lies", "belongs") else problem


def quoted(path: str) -> str:
    """A path as it is typed on a command line, for hints."""
    return shlex.quote(printable(path))


class InvalidArgument(VhdkitError):
    """The caller asked for something impossible: a bad size, a bad option, two that exclude each other."""

    errno = errnos.EINVAL
    exit_code = 2


class DiskClosed(InvalidArgument):
    """The disk was closed, by any thread, or it belongs to the process that forked this one."""

    errno = errnos.EBADF


class OutOfRange(VhdkitError):
    """A request reaches past the end of the disk."""

    errno = errnos.EINVAL


class ReadOnly(VhdkitError):
    """A write to a disk that was opened for reading."""

    errno = errnos.EROFS


class NotFound(VhdkitError):
    """The named file or its folder does not exist."""

    errno = errnos.ENOENT


class AlreadyExists(VhdkitError):
    """The file to create already exists."""

    errno = errnos.EEXIST


class AccessDenied(VhdkitError):
    """The system refuses the access."""

    errno = errnos.EACCES


class UnsupportedFormat(VhdkitError):
    """A file that is not a disk image vhdkit can read."""

    errno = errnos.ENOTSUP


class IoFailed(VhdkitError):
    """The system reported an error while reading or writing a file."""

    errno = errnos.EIO


class SyncFailed(IoFailed):
    """A flush to the device failed: writes since the last successful flush may be lost."""


class Cancelled(VhdkitError):
    """Work in progress was stopped on request; everything reads as before."""

    errno = errnos.ECANCELED
    exit_code = 130


class NoSpace(VhdkitError):
    """The file system, the quota or the file-size limit is full."""

    errno = errnos.ENOSPC
    exit_code = 7


class CorruptImage(VhdkitError):
    """The bytes of an image contradict the format. `reason` is the kind of contradiction."""

    errno = errnos.EIO
    exit_code = 3

    def __init__(
        self,
        reason: CorruptReason,
        problem: str,
        *,
        path: str | None = None,
        structure: str | None = None,
        offset_bytes: int | None = None,
        expected: object = None,
        found: object = None,
        hint: str | None = None,
    ) -> None:
        self.reason = reason
        super().__init__(
            problem,
            path=path,
            structure=structure,
            offset_bytes=offset_bytes,
            expected=expected,
            found=found,
            hint=hint,
        )


class ImageInUse(VhdkitError):
    """Another program, or another open disk of this one, holds the image."""

    errno = errnos.EBUSY
    exit_code = 5


class Replaced(ImageInUse):
    """The name of an open image now leads to another file, or to none."""


class NotesUnwritten(VhdkitError):
    """Writes that a killed server had acknowledged are only in its notes, in a folder that the caller did not give."""

    errno = errnos.EBUSY
    exit_code = 5


class Unprotected(VhdkitError):
    """The file system has no locks: nothing would keep other programs away from an image that is written to."""

    errno = errnos.ENOLCK


class AddressInUse(VhdkitError):
    """Another program listens on the socket's path or port."""

    errno = errnos.EADDRINUSE
    exit_code = 5


class HasChildren(ImageInUse):
    """An attempt to open for writing an image that has children."""


class ParentError(VhdkitError):
    """The parent of a differencing image cannot be used."""

    errno = errnos.ENOENT
    exit_code = 6


class ParentMissing(ParentError):
    """None of the files found in the places searched is the parent."""


class ParentMismatch(ParentError):
    """`INV-PARENT-ID`: a file with the parent's name has another unique id than the child recorded."""


class ParentRefused(ParentError):
    """The parent lies where an untrusted image may not point."""

    errno = errnos.EPERM
