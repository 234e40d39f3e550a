# SPDX-License-Identifier: Apache-2.0
"""The record that children in other folders leave beside their parent, so that vhdkit knows about them.

Decides where the record lies, what it contains, and that concurrent writers lose no mark. Its content is not trusted:
code that reads a mark examines the child that it names (`children`).

A child beside its parent needs no mark, because that folder is searched anyway. The mark is on the device before the
child has its name, so a power cut leaves at most a mark without a child, which is ignored. A mark that cannot
be written is not a failure; it is logged.

    .NAME.vhdkit-children    {"format", "parent", "children": [{"path", "id", "parent_id", "trail"}, ...]}
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vhdkit import errors, formats
from vhdkit.chain.records.pending import id_of, view
from vhdkit.chain.records.references import KIND as NIGHTS
from vhdkit.errors import printable
from vhdkit.folder import (
    NewFile,
    exists,
    is_file_name,
    real_path,
    regular_files,
    remove_file,
    sidecar_path,
    sidecars_of,
)
from vhdkit.image import ID_BYTES
from vhdkit.local_volume import LOCAL
from vhdkit.store import FileStore, Store
from vhdkit.units import MIB
from vhdkit.volume import Trail, Volume, read_whole
from vhdkit.xattrs import record_held

KIND = "children"
MAX_MARKS = 4096  # each is examined before the parent is written to
MAX_RECORD_BYTES = 4 * MIB  # 4096 children with paths of 800 characters
_FORMAT = "vhdkit children record 1"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Mark:
    """A child: its real path and file id, its parent's linkage id, and what identifies the folders that lead to it."""

    path: str
    file_id: bytes
    parent_id: bytes
    trail: Trail

    @property
    def document(self) -> dict[str, Any]:
        """The mark's form in the record."""
        return {"path": self.path, "id": self.file_id.hex(), "parent_id": self.parent_id.hex(), "trail": self.trail}


@dataclass(frozen=True, slots=True)
class Record:
    """All marks beside an image, and the path that it had when they were left."""

    parent_path: str
    marks: tuple[Mark, ...] = ()


def record_path(parent_path: str, volume: Volume = LOCAL) -> str:
    """The path of the record about an image."""
    return sidecar_path(volume.real(parent_path), KIND, is_real=True)


def read_record(parent_path: str, volume: Volume = LOCAL) -> Record:
    """The marks beside an image. Raises InvalidArgument for a damaged record, AccessDenied, IoFailed."""
    return read_file(record_path(parent_path, volume), volume) or Record(volume.real(parent_path))


def read_file(path: str, volume: Volume = LOCAL) -> Record | None:
    """The record at `path`, None if there is none; raises as `read_record` does."""
    raw = read_whole(volume, path, MAX_RECORD_BYTES) if volume.exists(path) else None
    if raw is None:
        if not volume.exists(path):
            return None
        raise _damaged(path, "is not a regular file, or is too long")
    if not raw:  # being created: see `record_held`
        return None
    try:
        document = json.loads(raw)
        if document["format"] != _FORMAT:
            raise ValueError("unknown format")
        record = Record(_path(document["parent"]), tuple(_mark(one) for one in document["children"]))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise _damaged(path, "is damaged") from error
    if len(record.marks) > MAX_MARKS:
        raise _damaged(path, f"names more than {MAX_MARKS} images")
    return record


def _mark(document: Any) -> Mark:
    ids = bytes.fromhex(document["id"]), bytes.fromhex(document["parent_id"])
    trail = tuple((int(inode), begins is True) for inode, begins in document["trail"])
    if any(len(one) != ID_BYTES for one in ids):
        raise ValueError("no id")
    return Mark(_path(document["path"]), ids[0], ids[1], trail)


def _path(text: Any) -> str:
    if not isinstance(text, str) or not is_file_name(text) or not os.path.isabs(text):
        raise ValueError("no absolute path")
    return os.path.normpath(text)


def _damaged(path: str, problem: str) -> errors.InvalidArgument:
    return errors.InvalidArgument(
        f"{problem}: it should name the children of the image beside it",
        path=path,
        hint=f"if you know that the image has no children, remove the record: rm {errors.quoted(path)}",
    )


@contextlib.contextmanager
def marked(children: Sequence[tuple[str, Store, str]]) -> Iterator[None]:
    """Leave marks for children, (path, the new image, its parent's path), around the block that names them."""
    marks = [(parent, mark) for path, image, parent in children for mark in _marks_of(path, image, parent)]
    left = [(parent, mark) for parent, mark in marks if _leave(parent, mark) is None]
    try:
        yield
    except BaseException:  # Ctrl-C too
        for parent, mark in left:
            _take_back(parent, mark)
        raise
    for parent, mark in left:  # once more: a process that tidied the record meanwhile found no child yet
        _leave(parent, mark)


def mark_child(path: str, image: Store, parent_path: str, parent_id: bytes | None = None) -> str | None:
    """Leave the mark of a child that already has its name; if that fails, returns and logs the reason.

    `parent_id` is the id that it is about to record for its parent.
    """
    problems = [_leave(parent_path, mark) for mark in _marks_of(path, image, parent_path, parent_id)]
    return next((one for one in problems if one is not None), None)


def _marks_of(path: str, image: Store, parent_path: str, parent_id: bytes | None = None) -> list[Mark]:
    """The marks that the child needs: one for each id that it records for its parent; none if it lies beside that."""
    real = real_path(path)
    folder = os.path.dirname(real)
    if folder == os.path.dirname(real_path(parent_path)):
        return []
    ids: tuple[bytes, ...] = () if parent_id is None else (parent_id,)
    if parent_id is None:
        parent = formats.probed(image).facts(image).parent
        assert parent is not None
        ids = parent.linkage_ids or (parent.linkage_id,)
    return [Mark(real, id_of(image), one, LOCAL.trail_of(folder)) for one in ids]


def _leave(parent_path: str, mark: Mark) -> str | None:
    """Add the mark to the parent's record, durably; if that fails, returns and logs the reason."""
    path = record_path(parent_path)
    problem = None
    try:
        with record_held(path):
            marks, _ = marks_about(parent_path)
            if mark not in marks:
                marks = [one for one in marks if (one.path, one.parent_id) != (mark.path, mark.parent_id)]
                if len(marks) >= MAX_MARKS:
                    raise errors.NoSpace(f"already names {MAX_MARKS} images", path=path)
                _write(parent_path, [*marks, mark])
    except errors.VhdkitError as error:
        problem = (
            f"{printable(mark.path)} could not be recorded beside its parent {printable(parent_path)}"
            f" ({error.problem}): vhdkit will not notice the child when it changes the parent"
        )
        _log.warning("%s", problem)
    return problem


def _take_back(parent_path: str, mark: Mark) -> None:
    with contextlib.suppress(errors.VhdkitError), record_held(record_path(parent_path)):
        _replace(parent_path, [one for one in marks_about(parent_path)[0] if one != mark])


def marks_about(parent_path: str, volume: Volume = LOCAL) -> tuple[list[Mark], bool]:
    """The marks that may be about the image at `parent_path`, and whether its record was left for that very path.

    If the image was moved or copied, its children may have come along: they are searched at the same place relative to
    it. The children of the original do not count for a copy. Raises as `read_record` does.
    """
    record, real = read_record(parent_path, volume), volume.real(parent_path)
    if record.parent_path == real:
        return list(record.marks), True
    is_copy, found = _is_copy(record.parent_path, real, volume), []
    for mark in record.marks:
        came = _came_along(mark, record.parent_path, real, volume)
        if not is_copy and (came is None or volume.exists(mark.path)):
            found.append(mark)
        found += [came] if came is not None else []
    return found, False


def _is_copy(original: str, parent_path: str, volume: Volume) -> bool:
    """True if the image for which the marks were left still exists, and the one at `parent_path` is another file."""
    try:
        with volume.open_regular(original) as store, volume.open_regular(parent_path) as parent:
            is_other = store.identity != parent.identity
            return is_other and id_of(view(store, volume)) == id_of(view(parent, volume))
    except errors.VhdkitError:
        return False


def _came_along(mark: Mark, old_parent: str, new_parent: str, volume: Volume) -> Mark | None:
    """The mark of the child at the same place relative to the parent's new path; None if there is none."""
    path = os.path.relpath(mark.path, os.path.dirname(old_parent))
    path = os.path.normpath(os.path.join(os.path.dirname(new_parent), path))
    if path == mark.path or not is_file_name(path):
        return None
    try:
        with volume.open_regular(path) as store:
            is_it = id_of(view(store, volume)) == mark.file_id
        return replace(mark, path=path, trail=volume.trail_of(os.path.dirname(path))) if is_it else None
    except errors.VhdkitError:
        return None


def keep_only(parent_path: str, wanted: Sequence[Mark]) -> None:
    """Drop all other marks, and the record with the last one.

    The caller holds the parent's writer's lock, so no child is made meanwhile. Raises AccessDenied, NoSpace, IoFailed.
    """
    with record_held(record_path(parent_path)):
        _replace(parent_path, wanted)


def other_records(image_path: str) -> list[str]:
    """The records of unfinished work beside an image."""
    return [path for path in sidecars_of(image_path) if not path.endswith((f".vhdkit-{KIND}", f".vhdkit-{NIGHTS}"))]


def marked_images(directory: str) -> list[str]:
    """The images directly in a folder that have a record of children beside them."""
    return [path for path in regular_files(directory) if exists(sidecar_path(path, KIND, is_real=True))]


def orphans(directory: str) -> list[str]:
    """The records of children in a folder whose image no longer exists there."""
    beside = {sidecar_path(path, KIND, is_real=True) for path in regular_files(directory)}
    records = [path for path in regular_files(directory) if path.endswith(f".vhdkit-{KIND}")]
    return [path for path in records if path not in beside and _is_record(path)]


def _is_record(path: str) -> bool:
    try:
        return read_file(path) is not None
    except errors.VhdkitError:
        return False


def forget(parent_path: str) -> None:
    """Remove the record of an image that is gone or was moved away. If that fails, it stays."""
    with contextlib.suppress(errors.VhdkitError):
        path = record_path(parent_path)
        if exists(path):
            remove_file(path)


def _replace(parent_path: str, marks: Sequence[Mark]) -> None:
    """Make these the only marks; without any, the record is removed."""
    path = record_path(parent_path)
    if marks:
        _write(parent_path, marks)
    elif exists(path):
        remove_file(path)


def _write(parent_path: str, marks: Sequence[Mark]) -> None:
    """Replace the record, which every user who may read the image can read."""
    path = record_path(parent_path)
    document = {"format": _FORMAT, "parent": real_path(parent_path), "children": [one.document for one in marks]}
    raw = json.dumps(document, indent=1).encode() + b"\n"
    if len(raw) > MAX_RECORD_BYTES:
        raise errors.NoSpace("would become too long", path=path)
    with FileStore.open(parent_path) as parent, NewFile(path, whatever=True, like=parent) as new:
        new.store.pwrite(0, raw)
        new.commit()
