# SPDX-License-Identifier: Apache-2.0
"""Detects parents that were written to after their child was made; locks and marks do not stop other programs.

Decides what is recorded about a parent's state, and what follows from it. Notes in extended attributes:

    at the child     the parent's id, its generation, and its state then: length, modification time, inode
    at the parent    a generation, and the state in which the parent has that generation

A child is fine if its parent is in the state that it recorded, or if the parent's note says that its present state is
still the child's generation: a vhdkit command that changes a parent without changing what its children read
(`same_content`) notes the new state under the old generation. During such a command, and after it was killed, there is
no state to compare with. While a merge into the parent is unfinished, the images that it merges read as before: they
are fine, images of which it knows nothing are not. If a note is missing, as after most ways of copying, or the parent
is now a different file, nothing is concluded. Nothing is written to the images themselves. The notes detect accidents;
they do not protect against malicious changes.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterator
from typing import NamedTuple

from vhdkit import errors, formats
from vhdkit.chain.names.parents import parent_format, parent_of
from vhdkit.chain.records import references
from vhdkit.chain.records.intent import intent_of
from vhdkit.chain.records.pending import file_of, view
from vhdkit.errors import printable, quoted
from vhdkit.finding import Finding, Severity, left_by_repair
from vhdkit.folder import real_path
from vhdkit.image import ID_BYTES, ImageFacts, ParentRef
from vhdkit.local_volume import LOCAL
from vhdkit.store import FileStore, Store
from vhdkit.volume import Volume, VolumeFile
from vhdkit.xattrs import drop_attribute, read_attribute, write_attribute

_CHILD, _PARENT = "parent", "generation"  # names of the notes
_GENERATION_SIZE = 16
_NO_GENERATION = bytes(_GENERATION_SIZE)  # if the parent could not be given one
_STATE = struct.Struct(">QqQ")
_AT_CHILD = struct.Struct(f">B{ID_BYTES}s{_GENERATION_SIZE}s")
_AT_PARENT = struct.Struct(f">B{_GENERATION_SIZE}s")
_VERSION = 1
WRITTEN = "parent-written"  # the code of its finding


class _State(NamedTuple):
    """Identifies the state of a file, as long as it is not written to."""

    size_bytes: int
    modified_ns: int
    inode: int


# In place of a parent's state: one of our programs is changing the file, or was killed during a change.
_CHANGING = _State(0, 0, 0)


def _state_of(store: FileStore) -> _State:
    return _State(store.size(), store.modified_ns(), store.identity[1])


def _generation_of(store: FileStore) -> tuple[bytes, _State] | None:
    """The parent's note: its generation, and the state that has that generation."""
    raw = read_attribute(store, _PARENT, _AT_PARENT.size + _STATE.size)
    if raw is None or len(raw) != _AT_PARENT.size + _STATE.size:
        return None
    version, generation = _AT_PARENT.unpack_from(raw)
    return (generation, _State(*_STATE.unpack_from(raw, _AT_PARENT.size))) if version == _VERSION else None


def _note_generation(store: FileStore, generation: bytes, state: _State | None = None) -> bool:
    noted = _state_of(store) if state is None else state
    return write_attribute(store, _PARENT, _AT_PARENT.pack(_VERSION, generation) + _STATE.pack(*noted))


def record_parent(child: Store, parent: Store, parent_id: bytes) -> None:
    """Note at the child the present state of its parent, which must not be written to meanwhile.

    If no note can be written, an old one is removed.
    """
    from secrets import token_bytes  # a slow import that only new children need

    image, base = file_of(child), file_of(parent)
    if image is None or base is None:
        return
    state = _state_of(base)
    known = _generation_of(base)
    is_known = known is not None and known[1] in (state, _CHANGING)
    generation = known[0] if known is not None and is_known else token_bytes(_GENERATION_SIZE)
    if known is None or known[1] != state:
        generation = generation if _note_generation(base, generation) else _NO_GENERATION
    if not write_attribute(image, _CHILD, _AT_CHILD.pack(_VERSION, parent_id, generation) + _STATE.pack(*state)):
        drop_attribute(image, _CHILD)


def forget_parent(child: Store) -> None:
    """Remove the note about the parent's state."""
    image = file_of(child)
    if image is not None:
        drop_attribute(image, _CHILD)


def record_parents(path: str, parent_path: str, parent_id: bytes) -> None:
    """Like `record_parent`, for files that may be open elsewhere too. A file that cannot be opened gets no note."""
    with (
        contextlib.suppress(errors.VhdkitError),
        FileStore.open(path) as child,
        FileStore.open(parent_path) as parent,
    ):
        record_parent(child, parent, parent_id)


def inherit_parent(child: Store, above: Store, parent_id: bytes) -> bool:
    """Note at the child of a new parent what `above`, the layer that was the parent's child, noted of its state.

    So that a parent which was written to since is reported as before. False without such a note: the child has none.
    """
    image, file = file_of(child), file_of(above)
    if image is None or file is None:
        return False
    raw = read_attribute(file, _CHILD, _AT_CHILD.size + _STATE.size)
    if raw is not None and len(raw) == _AT_CHILD.size + _STATE.size:
        version, _, generation = _AT_CHILD.unpack_from(raw)
        if write_attribute(image, _CHILD, _AT_CHILD.pack(version, parent_id, generation) + raw[_AT_CHILD.size :]):
            return True
    drop_attribute(image, _CHILD)
    return False


def was_written_since(child: Store, parent: Store, recorded: ParentRef) -> bool:
    """True if the parent was written to after the child, which records this of it, was made; False if unknown."""
    image, base = file_of(child), file_of(parent)
    if image is None or base is None:
        return False
    raw = read_attribute(image, _CHILD, _AT_CHILD.size + _STATE.size)
    if raw is None or len(raw) != _AT_CHILD.size + _STATE.size:
        return False
    version, noted_id, generation = _AT_CHILD.unpack_from(raw)
    noted, state = _State(*_STATE.unpack_from(raw, _AT_CHILD.size)), _state_of(base)
    is_about_it = version == _VERSION and noted_id in (recorded.linkage_ids or (recorded.linkage_id,))
    if not is_about_it or noted == state or noted.inode != state.inode:
        return False
    if generation != _NO_GENERATION and _generation_of(base) in ((generation, state), (generation, _CHANGING)):
        return False
    return not _is_half_changed(base) and not _is_merged_into(base, image)


def _is_half_changed(store: FileStore) -> bool:
    """True if one of our changes is unfinished: the image reads as before it, and will again once it is undone."""
    return view(store) is not store


def _is_merged_into(parent: FileStore, child: FileStore) -> bool:
    """True if a merge of the child into its parent is unfinished: the child hides what was copied."""
    intent = intent_of(parent.name, (os.sep,))  # only its names are compared
    return intent is not None and real_path(child.name) in [one.path for one in intent.sources]


@contextlib.contextmanager
def same_content(path: str) -> Iterator[None]:
    """The block changes the file at `path`, but not what its children read, so they need no warning.

    This is noted before the file changes, so it holds even if the block is interrupted or killed. Marks of nights that
    are not removed in the block stay valid.
    """
    generation = None
    with contextlib.suppress(errors.VhdkitError), FileStore.open(path) as store:
        known = _generation_of(store)
        if known is not None and (known[1] in (_state_of(store), _CHANGING) or _is_half_changed(store)):
            generation = known[0] if _note_generation(store, known[0], _CHANGING) else None
    try:
        with references.content_stays(path):
            yield
    finally:
        if generation is not None:
            with contextlib.suppress(errors.VhdkitError), FileStore.open(path) as store:
                _note_generation(store, generation)


def finding_of(child: Store, facts: ImageFacts, parent: Store) -> Finding | None:
    """The warning about a parent that was written to after its child was made."""
    if not was_written_since(child, parent, parent_of(facts)):
        return None
    message = left_by_repair(
        f"its parent {printable(parent.name)} was written after this image was made, so what is read through it may"
        " have changed",
        "it cannot know whether it has; if you know that it has not,"
        f" vhdkit rebase {quoted(facts.path)} --parent {quoted(parent.name)} accepts the parent as it is now",
    )
    return Finding(Severity.WARNING, WRITTEN, message, facts.path)


def timestamp_finding(facts: ImageFacts, parent: VolumeFile, volume: Volume = LOCAL) -> Finding | None:
    """The note about a parent whose time stamp differs from the child's record: only a hint.

    XenServer records when the parent's file was written, others when the parent was made.
    """
    recorded = parent_of(facts).timestamp
    try:
        found = parent_format(facts).facts(view(parent, volume)).timestamp
    except (errors.CorruptImage, errors.InvalidArgument):
        return None
    if found is None or recorded in (0, found, _written_at(facts, parent)):
        return None
    message = (
        f"records {recorded} as the time stamp of {printable(parent.name)}, which has {found}; tools that write to"
        " parents change it"
    )
    return Finding(Severity.NOTE, "parent-timestamp", message, facts.path, "dynamic header")


def _written_at(facts: ImageFacts, parent: Store) -> int | None:
    """When the parent's file was last modified, as XenServer records it."""
    file = file_of(parent)
    return None if file is None else formats.named(facts.format_name).written_at(file.modified_ns())


def findings_about(child: Store, facts: ImageFacts, parent: VolumeFile, volume: Volume = LOCAL) -> list[Finding]:
    """All findings about the state of the parent."""
    found = (timestamp_finding(facts, parent, volume), finding_of(child, facts, parent))
    return [one for one in found if one is not None]
