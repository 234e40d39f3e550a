# SPDX-License-Identifier: Apache-2.0
"""A snapshot and an image of a machine's tree, as values and as JSON.

Decides what is recorded about each, and how a record is validated: paths must be absolute, ids must be ids, and a
snapshot's folder must have its id as its name. Pure: no files are examined here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from vmm.model.formats import ImageFormat, is_image_format

_SNAPSHOT_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")

TakenIn = Literal["running", "paused", "saved", "off"]


@dataclass(frozen=True, slots=True)
class Image:
    """An image of the tree. `parent`: the path of its parent; None for an image whose parent is not ours to change.

    `id`: the id of the file (`vhdkit.image_id`), which is checked before the image is removed; None if vmm 0.1.0 wrote
    the record, or if the format has no id that stays (VHDX).
    """

    parent: str | None
    ours: bool
    format: ImageFormat = "vhd"
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One snapshot. `disks`: disk id -> the image that it froze; `folder` holds configuration and memory.

    `memory_bytes` is None without memory; `pause_seconds` is how long the guest was paused for it.
    """

    id: str
    name: str
    created: float
    parent: str | None
    folder: str
    disks: Mapping[str, str]
    taken_in: TakenIn
    memory_bytes: int | None = None
    notes: str = ""
    mode: str | None = None
    pause_seconds: float | None = None
    consistent: bool = False


# -- as JSON ---------------------------------------------------------------------------------------------------


def snapshot_document(snapshot: Snapshot) -> dict[str, Any]:
    """A snapshot as JSON."""
    names = Snapshot.__dataclass_fields__
    return {name: getattr(snapshot, name) for name in names} | {"disks": dict(snapshot.disks)}


def image_document(image: Image) -> dict[str, Any]:
    """An image as JSON."""
    return {"parent": image.parent, "ours": image.ours, "format": image.format, "id": image.id}


def is_snapshot_id(value: object) -> bool:
    """True if this can be the id of a snapshot, which is also the name of its folder."""
    return isinstance(value, str) and _SNAPSHOT_ID.fullmatch(value) is not None


def snapshot_of(document: dict[str, Any]) -> Snapshot:
    """Parse what `snapshot_document` wrote. Raises ValueError, KeyError, TypeError."""
    snapshot = Snapshot(**document)
    if not is_snapshot_id(snapshot.id):
        raise ValueError("id")
    if snapshot.taken_in not in get_args(TakenIn):
        raise ValueError("taken_in")
    kinds = ((snapshot.name, str), (snapshot.created, int | float), (snapshot.notes, str),
             (snapshot.memory_bytes, int | None), (snapshot.parent, str | None), (snapshot.mode, str | None),
             (snapshot.pause_seconds, int | float | None), (snapshot.consistent, bool))  # fmt: skip
    if not all(isinstance(value, kind) for value, kind in kinds):
        raise TypeError("a field of a snapshot")
    disks = {str(disk): absolute_path(path) for disk, path in dict(snapshot.disks).items()}
    folder = folder_path(snapshot.folder)
    if os.path.basename(folder) != snapshot.id:
        raise ValueError("folder")
    return replace(snapshot, disks=disks, folder=folder)


def image_of(document: dict[str, Any]) -> Image:
    """Parse what `image_document` wrote. Raises ValueError, KeyError, TypeError."""
    parent, image_id = document["parent"], document.get("id")
    if not is_image_format(document["format"]) or not isinstance(document["ours"], bool):
        raise ValueError("image")
    if image_id is not None and not isinstance(image_id, str):
        raise TypeError("id")
    return Image(None if parent is None else absolute_path(parent), document["ours"], document["format"], image_id)


def absolute_path(value: object) -> str:
    """A path in a record. Raises ValueError if it is not absolute."""
    if not isinstance(value, str) or not os.path.isabs(value) or "\0" in value:
        raise ValueError("path")
    return value


def folder_path(value: object) -> str:
    """The path of a snapshot's folder: normalized, and named by a snapshot's id. Raises ValueError."""
    path = absolute_path(value)
    if os.path.normpath(path) != path or not is_snapshot_id(os.path.basename(path)):
        raise ValueError("folder")
    return path
