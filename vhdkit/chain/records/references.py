# SPDX-License-Identifier: Apache-2.0
"""The marks beside an image which say that it reads, with all layers below it, as this disk did in that night.

A backup leaves one on the layer that it has frozen; the next night saves only what lies above that layer. Decides
where the record lies, what it contains, and when a mark is believed. Must not know repositories, nor what follows from
a mark. A wrong mark would leave changes out of a backup; so (`INV-MARK-TRUE`)

    removed first    before anything is written to an image, its marks are removed, durably (`pending.settle`)
    state            a mark records the image's id, length and modification time, and is believed only while the file
                     has these, so a change by a program that does not know marks makes them invalid
    comparison       each night compares some blocks outside the increment with the repository

The second does not make the first superfluous: data is flushed without the file's time, so after a power cut a file
may have new bytes and its old time. For the same reason the time is made durable before a mark with it is written.

A mark is left before its night exists: it names the night's id, which is drawn for that attempt, and means nothing
until the repository has a night of this id. So no stop of the machine can separate the two, and an attempt that
failed, or a night that was deleted, leaves a mark that is not followed.

A change that leaves the content as it is (`content_stays`: other names of a parent) keeps the marks: they get the new
state. Until then they are not believed, which costs a comparison and never a change. A merge removes the marks of its
target before it copies; when the target is complete, and before the newest source is removed, the target gets that
source's marks (`hand_on`).

    .NAME.vhdkit-nights   {"format", "marks": [{"repository", "machine", "disk", "night", "night_id",
                                                "id", "size", "mtime_ns", "child"}, ...]}

The record is as untrusted as the image: a damaged one has no marks. A raw image has no id; its marks rest on the
other two. A device gets no marks.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vhdkit import errors, formats
from vhdkit.errors import printable
from vhdkit.folder import exists, read_whole, regular_files, remove_file, sidecar_path, write_whole
from vhdkit.image import ID_BYTES, NULL_ID
from vhdkit.store import FileStore
from vhdkit.units import KIB
from vhdkit.xattrs import record_held

KIND = "nights"
MAX_MARKS = 64  # repositories that keep one layer each as their reference; far more than a disk is saved to
MAX_NAME_LENGTH = 128  # of a repository, a machine, a disk, a night's id
MAX_RECORD_BYTES = 64 * KIB  # 64 marks with names of 128 characters
_MAX_NUMBER = 2**63 - 1
_FORMAT = "vhdkit nights record 1"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SavedNight:
    """A night of one disk of one machine in one repository.

    Two copies of a repository may both go on, with the same numbers for other nights; `number` is for messages.
    `child` is the id of the image that the backup made on the layer to freeze it, `NULL_ID` for one that has no
    permanent id; None if no backup froze the layer.
    """

    repository: str
    machine: str
    disk: str
    number: int
    night_id: str
    child: str | None = None

    @property
    def place(self) -> tuple[str, str, str]:
        """The disk in its repository, which has one mark at most on each layer."""
        return self.repository, self.machine, self.disk


@dataclass(frozen=True, slots=True)
class FileState:
    """What identifies a file with its present content; `image_id` is `NULL_ID` for a raw image."""

    image_id: bytes
    size_bytes: int
    modified_ns: int


@dataclass(frozen=True, slots=True)
class NightMark:
    """A night, and the state in which the image reads as it did."""

    night: SavedNight
    state: FileState

    @property
    def document(self) -> dict[str, Any]:
        """The mark's form in the record."""
        night, state = self.night, self.state
        return {
            "repository": night.repository,
            "machine": night.machine,
            "disk": night.disk,
            "night": night.number,
            "night_id": night.night_id,
            "id": state.image_id.hex(),
            "size": state.size_bytes,
            "mtime_ns": state.modified_ns,
        } | ({} if night.child is None else {"child": night.child})


def record_path(image_path: str) -> str:
    """The path of the record about an image."""
    return sidecar_path(image_path, KIND)


def state_of(store: FileStore) -> FileState:
    """The present state of an image's file. Raises IoFailed."""
    return FileState(formats.present_id(store) or NULL_ID, store.size(), store.modified_ns())


def marks_of(store: FileStore) -> tuple[NightMark, ...]:
    """The marks of an image that are about its present state.

    The caller holds the image, if only as a reader. Raises AccessDenied, IoFailed.
    """
    if store.is_device or not exists(record_path(store.name)):
        return ()
    now = state_of(store)
    return tuple(one for one in _read(record_path(store.name)) if one.state == now)


def mark(store: FileStore, night: SavedNight) -> FileState | None:
    """Record durably that the image reads as in this night, in place of an earlier night of the same disk.

    Returns the state that is recorded; None for a device, which gets no mark. The caller holds the image, and what is
    in it is on the device. Raises AccessDenied, NoSpace, IoFailed, ImageInUse, `Replaced`.
    """
    if store.is_device:
        return None
    store.require_name()
    store.sync_times()
    state = state_of(store)
    _change(store, [NightMark(night, state)])
    return state


def unmark(store: FileStore, repository: str, machine: str, disk: str) -> None:
    """Remove the mark of this disk, because another layer has it now. Raises AccessDenied, NoSpace, IoFailed."""
    if not store.is_device and exists(record_path(store.name)):
        _change(store, (), without=[(repository, machine, disk)])


def no_longer_frozen(store: FileStore) -> None:
    """The image gets a child, perhaps the user's: no mark may say that a backup made it, where no id proves that.

    A record that cannot be changed stays as it is.
    """
    if store.is_device or not exists(path := record_path(store.name)):
        return
    with contextlib.suppress(errors.VhdkitError), record_held(path):
        marks = _read(path)
        if any(one.night.child == NULL_ID.hex() for one in marks):
            _write(store, [replace(one, night=replace(one.night, child=None)) for one in marks])


def remove(store: FileStore) -> None:
    """Remove all marks of an image, durably, before it is written to. The caller holds it as a writer.

    Raises AccessDenied, NoSpace, IoFailed; then nothing may be written to the image.
    """
    if store.is_device or not exists(path := record_path(store.name)):
        return
    try:
        # Emptied first, so that it is no record if its name reappears after a power cut.
        with FileStore.open(path, writable=True, follow_links=False) as record:
            record.truncate(0)
            record.sync()
    except (errors.NotFound, errors.InvalidArgument):  # gone; or a link, a folder: such a thing is never read
        return
    except errors.AccessDenied:
        pass  # perhaps the folder can be written to
    else:
        with contextlib.suppress(errors.AccessDenied):
            remove_file(path)
        return
    try:
        remove_file(path)
    except errors.VhdkitError as error:
        error.problem += "; it records that the image beside it was backed up, and must not outlive the next change"
        error.hint = f"remove it, then open the image again: rm {errors.quoted(path)}"
        raise


@contextlib.contextmanager
def content_stays(path: str) -> Iterator[None]:
    """The block changes the file at `path`, but not what it reads as: marks that are believed get the new state.

    If that fails, or the block raises, they are not believed any more. The caller holds the image as a writer.
    """
    before = marks_at(path)
    yield
    if before:
        _try_to_mark(path, before, only_known=True)


def hand_on(source_path: str, target_path: str) -> None:
    """Give the target of a merge the marks of its newest source, as which it now reads, durably.

    Both are held, and the target is complete on the device. If it cannot be marked, that is logged: the next night of
    this disk compares its content.
    """
    put_back(target_path, marks_at(source_path))


def marks_at(path: str) -> tuple[NightMark, ...]:
    """`marks_of` the image at a path; none if they cannot be found out."""
    with contextlib.suppress(errors.VhdkitError):
        if exists(record_path(path)):
            with FileStore.open(path) as store:
                return marks_of(store)
    return ()


def put_back(path: str, marks: Sequence[NightMark]) -> None:
    """Give an image that is complete on the device, and reads as these marks say, the marks with its present state.

    If it cannot be marked, that is logged.
    """
    if marks:
        _try_to_mark(path, marks)


def forget_marks(image_path: str) -> None:
    """Remove the record of an image that is gone or was moved away. If that fails, it stays."""
    with contextlib.suppress(errors.VhdkitError):
        path = record_path(image_path)
        if exists(path):
            remove_file(path)


def orphans(directory: str) -> list[str]:
    """The records in a folder whose image no longer exists there."""
    beside = {sidecar_path(path, KIND, is_real=True) for path in regular_files(directory)}
    records = [path for path in regular_files(directory) if path.endswith(f".vhdkit-{KIND}")]
    return [path for path in records if path not in beside and _is_record(path)]


def _try_to_mark(path: str, marks: Sequence[NightMark], *, only_known: bool = False) -> None:
    """`put_back`; with `only_known` no mark that was removed in the meantime."""
    try:
        with FileStore.open(path) as store:
            store.sync_times()
            state, known = state_of(store), _read(record_path(path))
            _change(store, [replace(one, state=state) for one in marks if one in known or not only_known])
    except errors.VhdkitError as error:
        _log.warning(
            "%s could not be marked as saved (%s): its next backup compares all of it", printable(path), error.problem
        )


def _change(store: FileStore, new: Sequence[NightMark], *, without: Collection[tuple[str, str, str]] = ()) -> None:
    """Add marks to the record, in place of those of the same disks, and remove others; an empty record is removed."""
    path = record_path(store.name)
    if not new and not without:
        return
    with record_held(path):
        gone = {one.night.place for one in new} | set(without)
        marks = [*(one for one in _read(path) if one.night.place not in gone), *new]
        if len(marks) > MAX_MARKS:
            raise errors.NoSpace(
                f"already has marks of {MAX_MARKS} disks in backup repositories",
                path=path,
                hint="remove the record; the next backup of each compares the content",
            )
        if not marks:
            remove_file(path)
            return
        _write(store, marks)


def _write(store: FileStore, marks: Sequence[NightMark]) -> None:
    raw = json.dumps({"format": _FORMAT, "marks": [one.document for one in marks]}, indent=1).encode() + b"\n"
    write_whole(record_path(store.name), raw, like=store)


def _read(path: str) -> list[NightMark]:
    """The marks in a record; none if it is damaged, or not a regular file. Raises AccessDenied, IoFailed."""
    raw = read_whole(path, MAX_RECORD_BYTES)
    try:
        document = json.loads(raw or b"{}")
        if document["format"] != _FORMAT:
            raise ValueError("unknown format")
        marks = [_mark_of(one) for one in document["marks"]]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []
    places = {one.night.place for one in marks}
    return marks if len(places) == len(marks) <= MAX_MARKS else []


def _mark_of(document: Any) -> NightMark:
    words = [document[name] for name in ("repository", "machine", "disk", "night_id")]
    numbers = [document[name] for name in ("night", "size", "mtime_ns")]
    image_id, child = bytes.fromhex(document["id"]), document.get("child")
    named = words if child is None else [*words, child]
    if not all(isinstance(one, str) and 0 < len(one) <= MAX_NAME_LENGTH for one in named):
        raise ValueError("no name")
    if not all(type(one) is int and 0 <= one <= _MAX_NUMBER for one in numbers) or len(image_id) != ID_BYTES:
        raise ValueError("no number")
    night = SavedNight(words[0], words[1], words[2], numbers[0], words[3], child)
    return NightMark(night, FileState(image_id, numbers[1], numbers[2]))


def _is_record(path: str) -> bool:
    try:
        return bool(_read(path))
    except errors.VhdkitError:
        return False
