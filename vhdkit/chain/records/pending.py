# SPDX-License-Identifier: Apache-2.0
"""Records of unfinished work beside an image, and what opening the image does about them.

Decides where an undo log lies, whether it is applied, and what is reported about it. This is the only module that
does: code that opens an image passes the file just opened, and continues with the result.

    read-only open   ->  the image as it was before the change; nothing is written
    writable open    ->  the change is undone in the file, then its log removed (the writer's lock is held)

The record of a merge is reported here, too; a writable open of a `Disk` handles it (`chain.verbs.merge_recovery`).

A log that is incomplete, or does not belong to this image in its present state, is left alone and reported as a
finding, because applying it could damage the image. It is never followed as a link, and must be a regular file.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from vhdkit import errors, formats
from vhdkit.chain.records import references, tracking
from vhdkit.chain.records.intent import merge_findings
from vhdkit.errors import printable
from vhdkit.finding import Finding, Severity, left_by_repair
from vhdkit.folder import NewFile, exists, remove_file, sidecar_path
from vhdkit.formats import remember
from vhdkit.formats.undo import (
    UndoLog,
    UndoneStore,
    apply_change,
    belongs,
    encode,
    mentions,
    plan_change,
    read_log,
    roll_back,
)
from vhdkit.image import NULL_ID, Layer
from vhdkit.local_volume import LOCAL
from vhdkit.store import Buffer, FileStore, ReadStore, Store
from vhdkit.volume import Volume, VolumeFile

_UNDO = "undo"


@dataclass(frozen=True, slots=True)
class Look:
    """How an image must be read, and the findings about records beside it."""

    store: Store
    findings: tuple[Finding, ...]


def undo_path(image_path: str, volume: Volume = LOCAL) -> str:
    """The place of an image's undo log."""
    return undo_path_beside(volume.real(image_path))


def undo_path_beside(image_path: str) -> str:
    """The same for a path known to have no links, which is not examined."""
    return sidecar_path(image_path, _UNDO, is_real=True)


def log_mentions(image_path: str, ids: Collection[bytes], volume: Volume = LOCAL) -> bool:
    """True if a file that looks like an undo log lies beside the image and contains one of these ids anywhere.

    Then the image may have another parent once the change is undone. Searches the bytes once, without parsing.
    """
    try:
        with volume.open_record(undo_path(image_path, volume)) as record:
            return mentions(record, ids)
    except errors.VhdkitError:
        return False


def look(store: VolumeFile, volume: Volume = LOCAL) -> Look:
    """The image as it must be read, whether or not its lock is held. Nothing is changed.

    `volume` is the one that opened the file. Raises AccessDenied or IoFailed if the log cannot be read, since the
    image may be half changed.
    """
    log, findings = _find(store, volume)
    if not store.is_device:
        findings += merge_findings(store.name, store.in_use(), volume)
    if (file := file_of(store)) is not None and not file.is_device:
        findings += remember.findings(file)
    if store.lacks_locks():
        message = left_by_repair(
            "its file system has no locks: another program could write to it while it is read",
            "that does not depend on the image",
        )
        findings += (Finding(Severity.WARNING, "no-locks", message, store.name),)
    return Look(store if log is None else UndoneStore(store, log), findings)


def view(store: VolumeFile, volume: Volume = LOCAL) -> Store:
    """The image as it must be read, without findings."""
    return look(store, volume).store


def settle(store: FileStore, *, content_stays: bool = False) -> None:
    """Undo an unfinished change to the image. The caller holds the writer's lock and is about to write.

    Marks of nights beside it are removed, unless the content stays: then each write is in a block of
    `references.content_stays`, as in one of `lineage.same_content`.

    Raises NotesUnwritten, with nothing changed; NoSpace, IoFailed, SyncFailed, AccessDenied; the log then remains, and
    the next open tries again.
    """
    remember.disown(store)
    if not content_stays:
        references.remove(store)
    tracking.warn(store)
    log, _ = _find(store, LOCAL)
    if log is not None:
        roll_back(store, log)
        _remove(undo_path(store.name))
    elif not store.is_device and _was_being_removed(undo_path(store.name), LOCAL):
        remove_file(undo_path(store.name))


def id_of(store: ReadStore) -> bytes:
    """The id by which undo logs, notes and marks identify an image; `NULL_ID` if it has none that never changes.

    For a file that was just opened, pass its `view`.
    """
    return formats.file_id(store) or NULL_ID


def present_id_of(store: ReadStore) -> bytes:
    """The id by which the records of merges identify an image as it is now; `NULL_ID` for a raw disk.

    It may change when the image is written to. For a file that was just opened, pass its `view`.
    """
    return formats.present_id(store) or NULL_ID


def file_of(store: ReadStore) -> FileStore | None:
    """The file behind a store that `look` gave; None for a store that is not a file of the file system."""
    if isinstance(store, UndoneStore):
        store = store.store
    return store if isinstance(store, FileStore) else None


def files_of(layers: Sequence[Layer]) -> list[FileStore]:
    """The files of those layers that have one."""
    return [file for layer in layers if (file := file_of(layer.store)) is not None]


def change(
    store: FileStore,
    writes: Sequence[tuple[int, Buffer]],
    size_after_bytes: int | None = None,
    *,
    unique_id: bytes | None = None,
) -> None:
    """Apply `writes`, (offset, bytes), to the image and change its size, atomically even across a power cut.

    `unique_id` is the id that the image will have, if it has none now.

    The caller holds the writer's lock and has called `settle`. Raises InvalidArgument (too large a change, or a record
    of another one exists), `Replaced`, NoSpace, IoFailed, SyncFailed; the file then has its old content.
    """
    store.require_name()  # the log is placed beside the file of that name
    log = plan_change(store, id_of(store) if unique_id is None else unique_id, writes, size_after_bytes)
    with _logged(store, log):
        apply_change(store, log)


@contextlib.contextmanager
def _logged(store: FileStore, log: UndoLog) -> Iterator[None]:
    """Keep the log beside the image while the block runs; if the block fails, undo the change."""
    path = undo_path(store.name)
    write_log(path, log, like=store)
    try:
        yield
    except BaseException:  # Ctrl-C too
        with contextlib.suppress(errors.VhdkitError):  # on failure the log stays, and the next open tries again
            roll_back(store, log)
            _remove(path)
        raise
    _remove(path)


def _remove(path: str) -> None:
    """Remove the log durably: empty it first, so that it is not a log if its name reappears after a power cut."""
    with FileStore.open(path, writable=True, follow_links=False) as record:
        record.truncate(0)
        record.sync()
    remove_file(path)


def _was_being_removed(path: str, volume: Volume) -> bool:
    """True for the empty file that remains of a log if the machine stopped in `_remove`."""
    try:
        with volume.open_record(path) as record:
            return record.size() == 0
    except errors.VhdkitError:
        return False


def write_log(path: str, log: UndoLog, *, like: FileStore) -> None:
    """Write the log under its name, durably; the users who may read `like` may read it.

    Raises InvalidArgument if a complete log, or something other than a regular file, exists there; NoSpace, IoFailed.
    """
    if exists(path) and _load(path, LOCAL) is not None:
        raise errors.InvalidArgument(
            f"there is a record of an earlier change at {printable(path)}",
            path=like.name,
            hint="examine the image with `vhdkit check`; move the record away if the image is sound without it",
        )
    with NewFile(path, whatever=True, like=like) as new:
        new.store.pwrite(0, encode(log))
        new.commit()


def _find(store: VolumeFile, volume: Volume) -> tuple[UndoLog | None, tuple[Finding, ...]]:
    """The log to apply, and the findings."""
    if store.is_device:
        return None, ()
    path = undo_path(store.name, volume)
    if not volume.exists(path):
        return None, ()
    try:
        log = _load(path, volume, store)
    except errors.NotFound:  # removed in the meantime: the change is complete
        return None, ()
    except errors.InvalidArgument as error:
        return None, (_ignored(store, path, f"is not a regular file ({error.problem})"),)
    if log is None and _was_being_removed(path, volume):
        return None, ()
    if log is None:
        why = "is not a complete undo log of this image as it is: the change was not started, or is of another image"
        return None, (_ignored(store, path, why),)
    if not belongs(store, log):
        return None, (_ignored(store, path, "is an undo log of another image, or this one has since been changed"),)
    return log, (_unfinished(store, path),)


def _load(path: str, volume: Volume, image: ReadStore | None = None) -> UndoLog | None:
    """The log under this name, or None; see `read_log`.

    Raises InvalidArgument for anything but a regular file, including a link.
    """
    with volume.open_record(path) as record:
        return read_log(record, image)


def _ignored(store: VolumeFile, path: str, problem: str) -> Finding:
    message = left_by_repair(
        f"{printable(path)} {problem}; it is ignored", "it removes no file; remove it yourself if it is not needed"
    )
    return Finding(Severity.WARNING, "undo-log-ignored", message, store.name)


def _unfinished(store: VolumeFile, path: str) -> Finding:
    if store.in_use():
        message = "is being changed by another program; it reads as it was before"
        return Finding(Severity.NOTE, "change-under-way", message, store.name)
    message = (
        f"an unfinished change will be undone at the next writable open (undo log {printable(path)});"
        " until then it reads as it was before"
    )
    return Finding(Severity.WARNING, "change-unfinished", message, store.name)
