# SPDX-License-Identifier: Apache-2.0
"""The record of a merge in progress: what is being merged into what, and how far it is.

Decides what the record contains and which records are accepted. It is a hidden file beside the target, is replaced as
a whole at each step, and says what must happen next if the machine stops. Moves no data and removes no files.

    copy     the target takes over what the sources own; the leaf reads the same throughout
    relink   the target is complete; children of the leaf are being repointed to it
    remove   only the target is still needed: the sources are being removed

A record is untrusted input like an image. A record that vhdkit cannot have written is damaged (`DamagedRecord`).
Names are confined to the target's folder, those below it, and the folders that the user allowed (`RecordRefused`).
A source always has an id, and a file without that id is not the source. Code that acts on a record compares the ids
first, and removes nothing else (`chain.verbs.merge_recovery`, `INV-RECORD-PROVEN`).

Some formats have no id that stays for the life of a file (`Format.file_id`), only one that changes with the first
write of each session. It stays the same as long as the image is a parent, so it identifies the merged layers; the
exception is a leaf that is written to after a merge was interrupted. The target gets another id with the first write
of the merge. That id is chosen before, and the record has both. Every attempt to resume the merge uses the same one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from vhdkit import errors
from vhdkit.errors import printable
from vhdkit.finding import Finding, Severity, left_by_repair
from vhdkit.folder import is_file_name, is_within, sidecar_path
from vhdkit.image import ID_BYTES
from vhdkit.local_volume import LOCAL
from vhdkit.units import MIB
from vhdkit.volume import Volume, read_whole

KIND = "merge"
MAX_RECORD_BYTES = MIB  # enough for 254 layers with paths of maximum length
_FORMAT = "vhdkit merge record 1"


class DamagedRecord(errors.InvalidArgument):
    """The file is not a record that vhdkit could have written."""


class RecordRefused(errors.InvalidArgument):
    """The record names files outside the folders that the user allowed."""


class Phase(StrEnum):
    """The progress of a merge; see above."""

    COPY = "copy"
    RELINK = "relink"
    REMOVE = "remove"


@dataclass(frozen=True, slots=True)
class Named:
    """A file of the merge: its absolute path, its unique id, and the one that it gets with the merge's first write.

    `renewed_id` is None if the file keeps its id.
    """

    path: str
    unique_id: bytes
    renewed_id: bytes | None = None

    @property
    def ids(self) -> tuple[bytes, ...]:
        """The ids that the file may have."""
        return (self.unique_id,) if self.renewed_id is None else (self.unique_id, self.renewed_id)

    def is_same_file(self, other: Named) -> bool:
        """Whether both name one file: they have the same path and an id in common."""
        return self.path == other.path and not set(self.ids).isdisjoint(other.ids)


@dataclass(frozen=True, slots=True)
class Intent:
    """A merge: `sources` are leaf first; with `relink` the children of the leaf will be repointed to the target."""

    phase: Phase
    target: Named
    sources: tuple[Named, ...]
    relink: bool

    @property
    def leaf(self) -> Named:
        """The image whose content the target gets."""
        return self.sources[0]

    def in_phase(self, phase: Phase) -> Intent:
        """The same merge in a later phase."""
        return replace(self, phase=phase)

    def encode(self) -> bytes:
        """The bytes of the record: a line of JSON, with paths relative to the target's folder, and its digest."""
        folder = os.path.dirname(self.target.path)
        document = {
            "format": _FORMAT,
            "phase": self.phase.value,
            "target": _named_document(self.target, folder),
            "sources": [_named_document(one, folder) for one in self.sources],
            "relink": self.relink,
        }
        line = json.dumps(document).encode() + b"\n"
        return line + hashlib.sha256(line).hexdigest().encode() + b"\n"


def _named_document(one: Named, folder: str) -> dict[str, str]:
    document = {"path": os.path.relpath(one.path, folder), "unique_id": one.unique_id.hex()}
    return document if one.renewed_id is None else {**document, "renewed_id": one.renewed_id.hex()}


def decode(
    raw: bytes, folder: str, allowed: tuple[str, ...], *, path: str | None = None, volume: Volume = LOCAL
) -> Intent:
    """Decode the record `raw`, which lies in `folder`, at `path`.

    Every file it names lies in `folder` or below it, or in one of the `allowed` folders or below. Raises DamagedRecord
    if it is invalid, RecordRefused if it names other files.
    """
    line, _, digest = raw.partition(b"\n")
    if digest.strip() != hashlib.sha256(line + b"\n").hexdigest().encode():
        raise _damaged("it is incomplete", path)
    try:
        document = json.loads(line)
        if document["format"] != _FORMAT:
            raise _damaged("it has an unknown format", path)
        phase, relink = Phase(document["phase"]), document["relink"]
        target = _named(document["target"], folder, volume)
        sources = tuple(_named(one, folder, volume) for one in document["sources"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged("a value is missing, or has a wrong type", path) from error
    names = [target, *sources]
    ids = [one_id for one in names for one_id in one.ids if any(one_id)]
    if not sources or not isinstance(relink, bool) or len({one.path for one in names}) != len(names):
        raise _damaged("it names no layers, or one of them twice", path)
    if (
        not all(any(one.unique_id) for one in sources)
        or len(set(ids)) != len(ids)
        or any(
            one.renewed_id is not None
            for one in sources  # nothing is written to a source
        )
    ):
        raise _damaged("a layer to be removed has no id in it, or the same id as another", path)
    for one in names:
        if not is_within(one.path, (folder, *allowed)):
            raise RecordRefused(
                f"the record of a merge names {printable(one.path)}, which is outside its folder",
                path=path,
                hint=f"if you trust it, add --allow-parent-dir {shlex.quote(printable(os.path.dirname(one.path)))};"
                " otherwise move the record away",
            )
    return Intent(phase, target, sources, relink)


def _damaged(problem: str, path: str | None) -> DamagedRecord:
    return DamagedRecord(
        f"damaged: {problem}; as the record of a merge it is ignored",
        path=path,
        hint="move it away; `vhdkit check` shows whether the images beside it are sound",
    )


def _named(document: Any, folder: str, volume: Volume) -> Named:
    unique_id, path = bytes.fromhex(document["unique_id"]), document["path"]
    renewed_id = bytes.fromhex(document["renewed_id"]) if "renewed_id" in document else None
    if len(unique_id) != ID_BYTES or os.path.basename(path) in ("", os.curdir, os.pardir):
        raise ValueError("no such name")
    if renewed_id is not None and (len(renewed_id) != ID_BYTES or not any(renewed_id) or not any(unique_id)):
        raise ValueError("no such id")
    path = os.path.join(folder, path)
    if not is_file_name(path):
        raise ValueError("no such name")
    path = os.path.join(volume.real(os.path.dirname(path)), os.path.basename(path))  # not followed
    return Named(path, unique_id, renewed_id)


def intent_of(target_path: str, allowed: tuple[str, ...] = ()) -> Intent | None:
    """The unfinished merge into this image, or None. Raises IoFailed, AccessDenied."""
    return read_intent(record_of(target_path), allowed)


def read_intent(record_path: str, allowed: tuple[str, ...] = (), volume: Volume = LOCAL) -> Intent | None:
    """The content of a record, or None if there is none or it is not accepted. Raises IoFailed, AccessDenied."""
    try:
        return demand_intent(record_path, allowed, volume)
    except (DamagedRecord, RecordRefused):
        return None


def demand_intent(record_path: str, allowed: tuple[str, ...] = (), volume: Volume = LOCAL) -> Intent | None:
    """The content of a record, or None if the file does not exist. A record must lie beside its own target.

    Raises DamagedRecord, RecordRefused, IoFailed, AccessDenied.
    """
    if not volume.exists(record_path):
        return None
    raw = read_whole(volume, record_path, MAX_RECORD_BYTES)
    if raw is None:
        raise _damaged("it is not a regular file, or is too long", record_path)
    intent = decode(raw, os.path.dirname(record_path), allowed, path=record_path, volume=volume)
    if record_of(intent.target.path, volume) != record_path:
        raise _damaged("it is beside the wrong image", record_path)
    return intent


def record_of(target_path: str, volume: Volume = LOCAL) -> str:
    """The path of the record of a merge into this image."""
    return sidecar_path(volume.real(target_path), KIND, is_real=True)


def resume_command(intent: Intent, image_path: str, volume: Volume = LOCAL) -> str:
    """The command that continues the merge, given this image of it."""
    here = os.path.dirname(volume.real(image_path))
    places = [os.path.dirname(one.path) for one in (intent.target, *intent.sources)]
    more = dict.fromkeys(place for place in places if place != here)
    words = ["vhdkit", "merge", "--resume", printable(image_path)]
    for place in more:
        words += ["--allow-parent-dir", printable(place)]
    return shlex.join(words)


def merge_findings(image_path: str, in_use: bool, volume: Volume = LOCAL) -> tuple[Finding, ...]:
    """Findings about a merge into this image: in progress, unfinished, or with a record that is not accepted."""
    record = record_of(image_path, volume)
    if not volume.exists(record):
        return ()
    try:
        intent = demand_intent(record, (os.sep,), volume)  # only for the message
    except DamagedRecord as error:
        message = left_by_repair(
            f"{printable(record)} is {error.problem}", "it removes no file; remove it yourself if it is not needed"
        )
        return (Finding(Severity.WARNING, "merge-record-ignored", message, image_path),)
    if intent is None:  # removed in the meantime
        return ()
    leaf = printable(intent.leaf.path)
    if in_use:
        message = (
            f"another program is merging {leaf} into it; until that has finished, only {leaf} shows the whole disk"
        )
        return (Finding(Severity.NOTE, "merge-under-way", message, image_path),)
    rest = f"`{resume_command(intent, image_path, volume)}` finishes it (`check --repair` does not merge)"
    if intent.phase is Phase.COPY:
        message = (
            f"a merge of {leaf} into it stopped while it was copying: {leaf} reads as before, but this image alone"
            f" is a mixture; {rest}"
        )
    else:
        left = "children to be repointed" if intent.phase is Phase.RELINK else "merged files to be removed"
        message = f"a merge of {leaf} into it is complete but for {left}; the next writable open, or {rest}"
    return (Finding(Severity.WARNING, "merge-unfinished", message, image_path),)


def intents_about(path: str, folders: tuple[str, ...], volume: Volume = LOCAL) -> list[Intent]:
    """The unfinished merges in these folders that have the image at `path`, which may be gone, as target or source."""
    place = volume.real(path)
    found = []
    for folder in folders:
        for record in volume.siblings(folder):
            if record.endswith(f".vhdkit-{KIND}"):
                intent = read_intent(record, folders, volume)
                if intent is not None and place in (intent.target.path, *(one.path for one in intent.sources)):
                    found.append(intent)
    return found


def refuse_sources(images: Sequence[Named], intents: Iterable[Intent]) -> None:
    """Raise ImageInUse if one of these images is about to be removed because its merge into another is complete.

    The images below it must not change then, or the merge could not be finished.
    """
    for intent in intents:
        found = next((one for one in images if any(one.is_same_file(source) for source in intent.sources)), None)
        if intent.phase is not Phase.COPY and found is not None:
            raise errors.ImageInUse(
                f"its merge into {printable(intent.target.path)} was interrupted",
                path=found.path,
                hint=f"finish it first: {resume_command(intent, found.path)}",
            )
