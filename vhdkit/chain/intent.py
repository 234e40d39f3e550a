# SPDX-License-Identifier: Apache-2.0
"""The record of a merge under way: what is being merged into what, and how far it is.

Decides what stands in the record and which records are believed. It lies hidden beside the target, is replaced whole
at each step, and says what must happen next when the machine stops. Moves no data and removes no file.

    copy     the target takes over what the sources own; the leaf reads the same all the time
    relink   the target is complete; children of the leaf are being repointed to it
    remove   nothing but the target is needed any more: the sources are being removed

A record is untrusted input like an image: names are confined to the target's folder and those the user allowed, and
whoever acts on it compares the unique ids first.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from vhdkit.errors import printable
from vhdkit.finding import Finding, Severity
from vhdkit.folder import exists, is_file_name, is_within, read_whole, real_path, regular_files, sidecar_path
from vhdkit.formats.vhd.layout import UUID_SIZE
from vhdkit.units import MIB

KIND = "merge"
MAX_RECORD_BYTES = MIB  # 254 layers with the longest paths there are
_FORMAT = "vhdkit merge record 1"


class Phase(StrEnum):
    """How far a merge is; see above."""

    COPY = "copy"
    RELINK = "relink"
    REMOVE = "remove"


@dataclass(frozen=True, slots=True)
class Named:
    """A file of the merge: its absolute path, and the unique id by which it is known."""

    path: str
    unique_id: bytes


@dataclass(frozen=True, slots=True)
class Intent:
    """What is merged into what. `sources` are leaf first; `relink`: the children of the leaf are to be repointed."""

    phase: Phase
    target: Named
    sources: tuple[Named, ...]
    relink: bool

    @property
    def leaf(self) -> Named:
        """The image whose content the target gets."""
        return self.sources[0]

    def in_phase(self, phase: Phase) -> Intent:
        """The same merge, further on."""
        return replace(self, phase=phase)

    def encode(self) -> bytes:
        """The bytes of the record: a line of JSON, with paths from the target's folder, and a line of its digest."""
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
    return {"path": os.path.relpath(one.path, folder), "unique_id": one.unique_id.hex()}


def decode(raw: bytes, folder: str, allowed: tuple[str, ...]) -> Intent | None:
    """The intent in the record `raw` that lies in `folder`; None when it is torn, foreign, or names what it may not.

    Every file it names lies in `folder` or below it, or in one of the `allowed` folders.
    """
    line, _, digest = raw.partition(b"\n")
    if digest.strip() != hashlib.sha256(line + b"\n").hexdigest().encode():
        return None
    try:
        document = json.loads(line)
        if document["format"] != _FORMAT:
            return None
        target = _named(document["target"], folder)
        sources = tuple(_named(one, folder) for one in document["sources"])
        intent = Intent(Phase(document["phase"]), target, sources, document["relink"] is True)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    paths = [target.path, *(one.path for one in sources)]
    confined = all(is_within(path, (folder, *allowed)) for path in paths)
    return intent if sources and confined and len(set(paths)) == len(paths) else None


def _named(document: Any, folder: str) -> Named:
    unique_id = bytes.fromhex(document["unique_id"])
    path = os.path.join(folder, document["path"])
    if len(unique_id) != UUID_SIZE or not is_file_name(path):
        raise ValueError("no such name")
    return Named(real_path(path), unique_id)


def intent_of(target_path: str, allowed: tuple[str, ...] = ()) -> Intent | None:
    """The merge into this image that is under way, or None. Raises IoFailed, AccessDenied."""
    return read_intent(sidecar_path(target_path, KIND), allowed)


def read_intent(record_path: str, allowed: tuple[str, ...] = ()) -> Intent | None:
    """What a record says, or None where there is none to be believed: it must lie beside its own target."""
    raw = read_whole(record_path, MAX_RECORD_BYTES)
    if raw is None:
        return None
    intent = decode(raw, os.path.dirname(record_path), allowed)
    return intent if intent is not None and sidecar_path(intent.target.path, KIND) == record_path else None


def merge_findings(image_path: str, in_use: bool) -> tuple[Finding, ...]:
    """What there is to say about a merge into this image: under way, unfinished, or a record not to be believed."""
    record = sidecar_path(image_path, KIND)
    if not exists(record):
        return ()
    intent = read_intent(record, (os.sep,))  # only to be told
    if intent is None:
        message = f"{printable(record)} is no whole record of a merge, or one of another image; it is ignored"
        return (Finding(Severity.WARNING, "merge-record-ignored", message, image_path),)
    leaf = printable(intent.leaf.path)
    if in_use:
        message = f"is taking in {leaf} in another program; until that is over it is whole through {leaf} alone"
        return (Finding(Severity.NOTE, "merge-under-way", message, image_path),)
    rest = f"`vhdkit merge --resume {shlex.quote(image_path)}` finishes it"
    if intent.phase is Phase.COPY:
        message = (
            f"a merge of {leaf} into it stopped while it was copying: {leaf} reads as before, this image alone is a"
            f" mixture; {rest}"
        )
    else:
        left = "children to be repointed" if intent.phase is Phase.RELINK else "merged files to be removed"
        message = f"a merge of {leaf} into it is complete but for {left}; the next writable open, or {rest}"
    return (Finding(Severity.WARNING, "merge-unfinished", message, image_path),)


def intents_about(path: str, folders: tuple[str, ...]) -> list[Intent]:
    """The merges under way in these folders that have the image at `path`, which may be gone, as target or source."""
    place = real_path(path)
    found = []
    for folder in folders:
        for record in regular_files(folder):
            if record.endswith(f".vhdkit-{KIND}"):
                intent = read_intent(record, folders)
                if intent is not None and place in (intent.target.path, *(one.path for one in intent.sources)):
                    found.append(intent)
    return found
