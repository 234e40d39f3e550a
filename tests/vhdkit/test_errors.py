# SPDX-License-Identifier: Apache-2.0
"""Every error class: errno, exit code, and one printable line with the place and what to do."""

from __future__ import annotations

import copy
import errno
import inspect
import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhdkit import errors
from vhdkit.errors import CorruptImage, CorruptReason, VhdkitError
from vhdkit.finding import Finding, Severity, finding_of

# Exit codes are those of DESIGN.md section 8: scripts rely on them.
TABLE: dict[type[VhdkitError], tuple[int, int]] = {
    errors.VhdkitError: (errno.EIO, 1),
    errors.InvalidArgument: (errno.EINVAL, 2),
    errors.DiskClosed: (errno.EBADF, 2),
    errors.OutOfRange: (errno.EINVAL, 1),
    errors.ReadOnly: (errno.EROFS, 1),
    errors.NotFound: (errno.ENOENT, 1),
    errors.AlreadyExists: (errno.EEXIST, 1),
    errors.AccessDenied: (errno.EACCES, 1),
    errors.UnsupportedFormat: (errno.ENOTSUP, 1),
    errors.IoFailed: (errno.EIO, 1),
    errors.SyncFailed: (errno.EIO, 1),
    errors.Cancelled: (errno.ECANCELED, 130),
    errors.Unprotected: (errno.ENOLCK, 1),
    errors.NoSpace: (errno.ENOSPC, 7),
    errors.CorruptImage: (errno.EIO, 3),
    errors.AddressInUse: (errno.EADDRINUSE, 5),
    errors.ImageInUse: (errno.EBUSY, 5),
    errors.Replaced: (errno.EBUSY, 5),
    errors.HasChildren: (errno.EBUSY, 5),
    errors.NotesUnwritten: (errno.EBUSY, 5),
    errors.ParentError: (errno.ENOENT, 6),
    errors.ParentMissing: (errno.ENOENT, 6),
    errors.ParentMismatch: (errno.ENOENT, 6),
    errors.ParentRefused: (errno.EPERM, 6),
}
HOSTILE = "a\nb\x1b[31m\u202e\r\t\udcff.vhd"


def _classes() -> set[type[VhdkitError]]:
    members = (value for _, value in inspect.getmembers(errors, inspect.isclass))
    return {one for one in members if issubclass(one, VhdkitError)}


def _make(kind: type[VhdkitError], **places: object) -> VhdkitError:
    if issubclass(kind, CorruptImage):
        return kind(CorruptReason.NO_FOOTER, "is wrong", **places)  # type: ignore[arg-type]
    return kind("is wrong", **places)  # type: ignore[arg-type]


def test_every_class_is_in_the_table() -> None:
    """A new error class needs a row here, with its errno and exit code."""
    assert _classes() == set(TABLE)


@pytest.mark.parametrize("kind", TABLE)
def test_errno_and_exit_code(kind: type[VhdkitError]) -> None:
    """Adapters use these two, which belong to the class."""
    assert (kind.errno, kind.exit_code) == TABLE[kind]
    assert issubclass(kind, VhdkitError)


@pytest.mark.parametrize("kind", TABLE)
def test_the_message_has_place_values_and_hint(kind: type[VhdkitError]) -> None:
    """File, structure at its byte, the problem, both values, and what to do next, in that order."""
    error = _make(
        kind,
        path="/d/x.vhd",
        structure="BAT entry 7",
        offset_bytes=0x61C,
        expected=1,
        found=0,
        hint="look again",
    )
    assert str(error) == "/d/x.vhd: BAT entry 7 at byte 0x61c: is wrong (expected 1, found 0); look again"
    assert (error.path, error.structure, error.offset_bytes) == ("/d/x.vhd", "BAT entry 7", 0x61C)
    assert (error.expected, error.found, error.hint) == (1, 0, "look again")


@pytest.mark.parametrize("kind", TABLE)
def test_every_error_survives_pickling(kind: type[VhdkitError]) -> None:
    """A process pool passes errors on unchanged: class, text, fields, notes and a special exit code."""
    places = {"path": "/d/x.vhd", "structure": "footer", "offset_bytes": 7, "expected": 1, "found": b"x", "hint": "h"}
    error = _make(kind, **places)
    error.exit_code = 42
    error.add_note("and more")
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        again = pickle.loads(pickle.dumps(error, protocol))
        assert type(again) is kind and str(again) == str(error) and again.args == error.args
        assert vars(again) == vars(error) and again.errno == error.errno
    assert vars(copy.copy(error)) == vars(error)


@pytest.mark.parametrize("path", [b"/d/\xff.vhd", Path("/d/x.vhd"), "/d/x.vhd"])
def test_any_kind_of_path_can_be_shown(path: object) -> None:
    """Bytes, a Path or a text: the error has the path as text, and can be printed."""
    error = VhdkitError("is wrong", path=path)  # type: ignore[arg-type]
    assert isinstance(error.path, str) and str(error).startswith("/d/")


@pytest.mark.parametrize(
    ("places", "text"),
    [
        ({}, "is wrong"),
        ({"path": "x"}, "x: is wrong"),
        ({"structure": "footer"}, "footer: is wrong"),
        ({"offset_bytes": 5}, "is wrong"),
        ({"expected": 0}, "is wrong (expected 0)"),
        ({"found": 0}, "is wrong (found 0)"),
        ({"hint": "wait"}, "is wrong; wait"),
    ],
)
def test_unknown_parts_are_left_out(places: dict[str, object], text: str) -> None:
    """There are no empty brackets and no stray colons."""
    assert str(_make(VhdkitError, **places)) == text


@pytest.mark.parametrize("kind", TABLE)
def test_a_hostile_name_stays_one_printable_line(kind: type[VhdkitError]) -> None:
    """Line ends, escape sequences, direction marks and undecodable bytes of a name are escaped."""
    text = str(_make(kind, path=HOSTILE, structure="footer"))
    assert text.isprintable()
    text.encode("utf-8")
    assert "\\n" in text and "\\x1b" in text and "\\u202e" in text


@given(st.text(st.characters()))
def test_printable_text_is_unchanged(text: str) -> None:
    """Any text becomes printable; printable text is unchanged."""
    shown = errors.printable(text)
    assert all(one.isprintable() for one in shown)
    shown.encode("utf-8")
    if text.isprintable():
        assert shown == text


def test_corrupt_image_carries_its_reason() -> None:
    """The reason is machine-readable and becomes the code of a finding."""
    error = CorruptImage(
        CorruptReason.BLOCK_SIZE, "impossible", path="x", structure="dynamic header", offset_bytes=512, found=3
    )
    finding = finding_of(error, "other")
    assert error.reason is CorruptReason.BLOCK_SIZE
    assert finding == Finding(Severity.ERROR, "block-size", "impossible (found 3)", "x", "dynamic header", 512)
    assert str(finding) == "x: dynamic header at byte 0x200: impossible (found 3)"


def test_a_finding_about_a_hostile_name_is_one_printable_line() -> None:
    """Findings are printed like errors."""
    assert str(Finding(Severity.NOTE, "code", "is odd", HOSTILE, "footer")).isprintable()


def test_reasons_are_distinct_words() -> None:
    """Each reason has its own stable name, lower case with hyphens."""
    assert len({one.value for one in CorruptReason}) == len(list(CorruptReason))
    assert all(one.value == one.name.lower().replace("_", "-") for one in CorruptReason)
