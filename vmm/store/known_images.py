# SPDX-License-Identifier: Apache-2.0
"""Every image that vmm knows: those of all machines, of their snapshots, and of backups in progress.

vhdkit looks for children of an image by its own rules. They may miss a clone in a folder of its own, so code that
opens an image for writing, enlarges it, merges into it or removes it also passes the images known here
(`INV-PARENT-READ-ONLY`).

Decides what counts as an image of a machine. Reads the machines' files as plain JSON, because the supervisor uses this
module and must stay small; reports which machines could not be read. Must not know which image stands on which.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from vmm.model.errors import InUse
from vmm.model.paths import MachinePaths, check_name, registry_folder

_MAX_BYTES = 16 << 20  # limit of a snapshot tree, the largest of these files
_MAX_PATH_BYTES = 4095


@dataclass(frozen=True, slots=True)
class Known:
    """Machine name -> the real paths of its images, and the names of machines whose images could not all be read."""

    by_machine: Mapping[str, frozenset[str]]
    unread: tuple[str, ...]

    @property
    def images(self) -> tuple[str, ...]:
        """All of them, sorted."""
        return tuple(sorted(frozenset().union(*self.by_machine.values())))


def known_images() -> tuple[str, ...]:
    """The real paths of all known images; those of machines that cannot be read are missing."""
    return look().images


def look() -> Known:
    """The images of all machines of this host, and the machines that could not be read."""
    found: dict[str, frozenset[str]] = {}
    unread = []
    for name in _names():
        try:
            found[name] = frozenset(_images_of(MachinePaths(_folder_of(name))))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            unread.append(name)
    return Known(found, tuple(unread))


def being_merged(own_id: str) -> dict[str, str]:
    """Images that merges change or remove now: real path -> machine, for machines with an id other than `own_id`."""
    found: dict[str, str] = {}
    for name in _names():
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            machine = MachinePaths(_folder_of(name))
            journal = (_read(os.path.join(machine.folder, "snapshots.json")) or {}).get("journal") or {}
            match journal.get("op"):
                case "merge" | "live-merge":
                    images = [journal["target"], *journal["layers"]]
                case "backup":
                    images = [word for row in journal["children"] for word in row[1:3]]
                case _:
                    continue
            if (_read(machine.definition) or {}).get("id") != own_id:
                found.update(dict.fromkeys(_real(*images), name))
    return found


def refuse_used_elsewhere(own: str, paths: Iterable[str]) -> None:
    """Raise InUse if a machine other than `own` uses one of these images, which a merge is about to change."""
    wanted = frozenset(map(os.path.realpath, paths))
    for name, images in look().by_machine.items():
        if name != own and (used := sorted(wanted & images)):
            raise InUse(f"cannot be merged: the machine {name} uses it", machine=own, path=used[0])


def _images_of(machine: MachinePaths) -> Iterator[str]:
    """Raises OSError, and ValueError, KeyError or TypeError for damaged files."""
    definition = _read(machine.definition)
    if definition is None:
        raise ValueError("no definition")
    yield from _of_definition(definition)
    tree = _read(os.path.join(machine.folder, "snapshots.json"))
    if tree is not None:
        for path, image in tree["images"].items():
            yield from _real(path, image["parent"])
        for snapshot in tree["snapshots"]:
            yield from _real(*snapshot["disks"].values())
            folder = str(snapshot["folder"])
            then = _read(os.path.join(folder, f"{os.path.basename(folder)}.json"))
            if then is not None:  # no other file names its read-only disks
                yield from _of_definition(then)
        journal = tree["journal"] or {}
        yield from _real(*(word for row in journal.get("children", ()) for word in row[1:3]))
    backup = _read(os.path.join(machine.folder, "backup.json"))
    for one in (backup or {}).values():
        yield from _real(one["frozen"], one["child"])


def _of_definition(definition: dict[str, Any]) -> Iterator[str]:
    for disk in definition["disks"]:
        if disk.get("kind", "vhd") == "vhd":
            yield from _real(disk["path"])


def _real(*paths: object) -> Iterator[str]:
    for path in paths:
        if isinstance(path, str) and os.path.isabs(path) and "\0" not in path and len(path) <= _MAX_PATH_BYTES:
            yield os.path.realpath(path)


def _read(path: str) -> dict[str, Any] | None:
    """The JSON object in a file; None if the file does not exist."""
    try:
        with open(path, "rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        return None
    if len(content) > _MAX_BYTES:
        raise ValueError("too long")
    document = json.loads(content)
    if not isinstance(document, dict):
        raise TypeError("no object")
    return document


def _names() -> list[str]:
    try:
        return sorted(name for name in os.listdir(registry_folder()) if _is_name(name))
    except OSError:
        return []


def _folder_of(name: str) -> str:
    return os.path.realpath(os.path.join(registry_folder(), name))


def _is_name(name: str) -> bool:
    try:
        check_name(name)
    except ValueError:
        return False
    return True
