# SPDX-License-Identifier: Apache-2.0
"""What makes a repository a copy of another one, and whether a source knows the state that a copy is in.

Decides what is recorded on both sides and what follows from it. Must not know nights, nor how files are copied.

    COPY/copy.json                 {format: 1, id, state, source}: only `backup copy` changes this repository
    COPY/copy.lock                 held while something is copied into it
    SOURCE/copies/COPY-ID.json     {format: 1, id, states}: the states that this source gave to that copy, oldest first

A copy has the id of its source, so that marks beside images, which name nights, stay valid for it. It is no longer a
copy after `end_copy`, and then is a repository of its own.

Each run gives the copy a new state, a random number, which the source records first. So a copy whose state the
source knows was last written from this source, as it is now or as it was earlier: a night that such a copy has and
the source has not was dropped from the source. In every other case (the source was put back to an older state; it is
itself a second copy, made with `cp -a`, that was used on; another source wrote to the copy) such a night may exist
nowhere else, and is not removed.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from vhdkit import errors
from vhdkit.arguments import AnyPath
from vhdkit.backup.documents import MAX_DOCUMENT_BYTES, encoded, parsed, time_word
from vhdkit.backup.names import is_unique_id, new_unique_id
from vhdkit.backup.repository import COPIES, COPY_FILE, REPOSITORY_FILE, Repository, is_unused, opened_root
from vhdkit.held_folder import HeldFolder, make_folder

_LOCK = "copy.lock"
_JSON = ".json"
MAX_STATES = 10_000  # of one copy, 35 bytes each: hourly for a year; older ones are forgotten


@dataclass(frozen=True, slots=True)
class CopyMark:
    """What a copy says about itself. `state` is None until the first run gives it one; `source` is for people."""

    id: str
    state: str | None
    source: str


def mark_of_copy(root: HeldFolder) -> CopyMark | None:
    """The mark of a copy; None for a repository that is none. Raises DamagedRepository."""
    try:
        fields = parsed(root.read(COPY_FILE, MAX_DOCUMENT_BYTES), os.path.join(root.path, COPY_FILE))
    except errors.NotFound:
        return None
    return CopyMark(
        fields.taken("id", is_unique_id),
        fields.optional("state", is_unique_id),
        fields.taken("source", lambda _: True),
    )


@contextlib.contextmanager
def copy_of(source: Repository, path: AnyPath) -> Iterator[tuple[Repository, CopyMark]]:
    """The copy of `source` in a folder, which is made if it is missing or empty, locked while the block runs.

    Raises InvalidArgument for anything but a copy of this repository, ImageInUse, DamagedRepository.
    """
    with make_folder(path) as root:
        _refuse_same(source.root, root)
        if not root.exists(REPOSITORY_FILE) and not is_unused(root, COPY_FILE, _LOCK):
            raise errors.InvalidArgument(
                "is neither a repository nor an empty folder", path=root.path, hint="name a new folder for the copy"
            )
        if root.exists(REPOSITORY_FILE):
            _require_copy(source, root)
        with root.held_lock(_LOCK, f"a copy (process {os.getpid()}, since {time_word(datetime.now(UTC))})"):
            if not root.exists(REPOSITORY_FILE):
                if not root.exists(COPY_FILE):  # first, so that no copy is ever taken for a repository of its own
                    _write_mark(root, CopyMark(new_unique_id(), None, source.path))
                document = {"format": 1, "id": source.id, "created": time_word(source.created)}
                root.write(REPOSITORY_FILE, encoded(document))
            mark = _require_copy(source, root)
            yield opened_root(root), mark


def _refuse_same(source: HeldFolder, other: HeldFolder) -> None:
    if source.is_same(other):
        raise errors.InvalidArgument("is the repository that is to be copied", path=other.path)


def _require_copy(source: Repository, root: HeldFolder) -> CopyMark:
    """The mark of a copy of this source. Raises InvalidArgument."""
    found = opened_root(root)
    if found.id != source.id:
        raise errors.InvalidArgument(
            f"is another repository than {errors.printable(source.path)}",
            path=root.path,
            expected=source.id,
            found=found.id,
            hint="name a new folder for the copy",
        )
    mark = mark_of_copy(root)
    if mark is None:
        raise errors.InvalidArgument(
            "has the id of the repository that is to be copied, but `vhdkit backup copy` did not make it: it may have"
            " nights of its own",
            path=root.path,
            hint="name a new folder for the copy",
        )
    return mark


def knows_state(source: Repository, mark: CopyMark) -> bool:
    """Whether this source, as it is now, has given the copy the state that it is in. Raises DamagedRepository."""
    return mark.state is not None and mark.state in _states(source.root, mark.id)


def give_state(source: Repository, other: Repository, mark: CopyMark) -> CopyMark:
    """Give the copy a new state, known to the source; both are on the device when this returns.

    A source that cannot be written to gives none, and the copy keeps the one that it has.
    """
    new = replace(mark, state=new_unique_id(), source=source.path)
    assert new.state is not None
    states = [*_states(source.root, mark.id), new.state][-MAX_STATES:]
    try:
        with source.root.made_folder(COPIES) as folder:
            document = {"format": 1, "id": mark.id, "states": states}
            folder.write(mark.id + _JSON, encoded(document), replace=True)
    except (errors.ReadOnly, errors.AccessDenied):
        return mark
    _write_mark(other.root, new)
    return new


@contextlib.contextmanager
def ending_copy(repository: Repository) -> Iterator[None]:
    """When the block ends without an error, the repository is no longer a copy. Raises InvalidArgument, ImageInUse."""
    if mark_of_copy(repository.root) is None:
        raise errors.InvalidArgument("is not a copy of another repository", path=repository.path)
    with repository.root.held_lock(_LOCK, f"the end of the copy (process {os.getpid()})"):
        yield
        repository.root.remove(COPY_FILE)
        repository.root.sync()


def _states(root: HeldFolder, copy_id: str) -> list[str]:
    try:
        folder = root.folder(COPIES)
    except errors.NotFound:
        return []
    with folder:
        try:
            raw = folder.read(copy_id + _JSON, MAX_DOCUMENT_BYTES)
        except errors.NotFound:
            return []
        fields = parsed(raw, os.path.join(folder.path, copy_id + _JSON))
        if fields.taken("id", is_unique_id) != copy_id:
            raise fields.damaged("id", "is that of another copy")
        return list(fields.texts("states", MAX_STATES))


def _write_mark(root: HeldFolder, mark: CopyMark) -> None:
    document = {"format": 1, "id": mark.id, "state": mark.state, "source": mark.source[:1000]}
    root.write(COPY_FILE, encoded(document), replace=True)
