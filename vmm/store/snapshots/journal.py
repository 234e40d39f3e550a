# SPDX-License-Identifier: Apache-2.0
"""The record that an operation on a machine's snapshots writes before it acts, so that it can be settled afterwards.

    CreateOff, Apply    new leaves are being made, which no guest has seen
    CreateLive          the same while the guest runs: it may have written to the new leaves
    PutInPlace          it takes effect: this definition, saved state and UEFI variables are put in place
    Delete              these snapshots have left the tree, their folders are being removed
    MergeOff, MergeLive these layers, newest first, are being merged into the target
    Backup              all disks are being frozen for a backup, and get new leaves

Decides the fields of each, their form as JSON, and how they are validated. A journal is untrusted: anyone who can
write to the machine's folder can put anything there, and settling it removes files. So a new leaf must lie beside the
image on which it stands and have a name of vmm's form, and a folder must have a snapshot's id as its name; anything
else is damaged. vmm 0.1.0 wrote the same documents, except those of backups (`backup_note`). What is done about a
journal is decided in `snapshots.recovery`, and whether a file really is what its record says in `proof`. Pure.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, assert_never, get_args

from vmm.model.errors import VmmError
from vmm.model.formats import ImageFormat, child_suffix, is_image_format
from vmm.store.backup_note import is_child_name
from vmm.store.snapshots.snapshot import Snapshot, absolute_path, folder_path, snapshot_document, snapshot_of

if TYPE_CHECKING:
    from vmm.model.spec import MachineSpec

SavedStep = Literal["adapt", "put", "drop"]
OWN_NAME = re.compile(r"(.+)_[0-9a-f]{8}\.avhdx?")  # names of images that vmm makes for snapshots


@dataclass(frozen=True, slots=True)
class Pivot:
    """A disk's image that is frozen, and the child that takes the writes from then on."""

    disk: str
    frozen: str
    child: str
    format: ImageFormat  # of the frozen image


@dataclass(frozen=True, slots=True)
class CreateOff:
    """A snapshot of a machine that is off or saved is being taken."""

    folder: str
    pivots: tuple[Pivot, ...]


@dataclass(frozen=True, slots=True)
class Memory:
    """The memory of a snapshot of a running machine, and the snapshot itself, both to be completed.

    `mode`: how memory is captured (`kvm.background.Mode`). `description`: written beside the file once that is
    complete (`store.saved` reads it).
    """

    mode: str | None
    was_running: bool
    description: Mapping[str, Any]
    snapshot: Snapshot


@dataclass(frozen=True, slots=True)
class CreateLive:
    """A snapshot of a running machine is being taken.

    `pivoted`: True if the new leaves certainly take the guest's writes. `memory`: None until it is about to be
    written.
    """

    folder: str
    pivots: tuple[Pivot, ...]
    pivoted: bool = False
    memory: Memory | None = None


@dataclass(frozen=True, slots=True)
class Apply:
    """A snapshot is being applied."""

    pivots: tuple[Pivot, ...]


NO_VARIABLES = ""


@dataclass(frozen=True, slots=True)
class PutInPlace:
    """What is to be put in place. `saved`: what happens to the saved state. `uefi`: the file with the variables, or
    `NO_VARIABLES` for a machine that had not been started yet; None: they are left unchanged.
    """

    definition: Mapping[str, Any]
    saved: SavedStep | None
    uefi: str | None = None

    @classmethod
    def of(cls, spec: MachineSpec, *, saved: SavedStep | None, uefi: str | None = None) -> PutInPlace:
        """A commit of this definition."""
        return cls(json.loads(spec.to_json()), saved, uefi)

    def spec(self, path: str) -> MachineSpec:
        """The definition to put in place. Raises InvalidSpec, which names `path`, the file that holds the journal."""
        from vmm.model.spec import read_spec  # a start checks for a journal, and must not need pydantic for that

        return read_spec(json.dumps(self.definition).encode(), path)


@dataclass(frozen=True, slots=True)
class Delete:
    """The folders of snapshots that have left the tree."""

    folders: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class MergeOff:
    """A merge of images that no guest uses."""

    target: str
    layers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class MergeLive:
    """A merge in the chain of a disk that a guest uses."""

    disk: str
    target: str
    layers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Backup:
    """The disks of a machine are being frozen for a backup: as for a snapshot without memory, which is in no tree.

    `live`: the guest runs, so it may have written to the new leaves. `pivoted`: True if it certainly does. `merging`:
    only in journals of earlier versions, which merged the new leaves in this operation, so any of them may be gone.
    """

    pivots: tuple[Pivot, ...]
    pivoted: bool = False
    merging: bool = False
    live: bool = True


Journal: TypeAlias = CreateOff | CreateLive | Apply | PutInPlace | Delete | MergeOff | MergeLive | Backup


def words_of(journal: Journal) -> str:
    """The operation, for messages: `taking a snapshot`."""
    match journal:
        case CreateOff() | CreateLive():
            return "taking a snapshot"
        case Apply():
            return "applying a snapshot"
        case PutInPlace():
            return "putting a snapshot in place"
        case Delete():
            return "deleting a snapshot"
        case MergeOff() | MergeLive():
            return "merging images"
        case Backup():
            return "a backup"
        case _:
            assert_never(journal)


# -- as JSON ---------------------------------------------------------------------------------------------------------


def journal_document(journal: Journal) -> dict[str, Any]:
    """A journal as JSON."""
    match journal:
        case CreateOff(folder, pivots):
            return _prepare("create", folder, pivots, live=False)
        case Apply(pivots):
            return _prepare("apply", None, pivots, live=False)
        case CreateLive():
            document = _prepare("create", journal.folder, journal.pivots, live=True)
            return document | {"pivoted": journal.pivoted, **_memory_document(journal.memory)}
        case PutInPlace(definition, saved, uefi):
            return {"op": "commit", "definition": dict(definition), "saved": saved, "uefi": uefi}
        case Delete(folders):
            return {"op": "delete", "folders": list(folders)}
        case MergeOff(target, layers):
            return {"op": "merge", "target": target, "layers": list(layers)}
        case MergeLive(disk, target, layers):
            return {"op": "live-merge", "disk": disk, "target": target, "layers": list(layers)}
        case Backup(pivots, is_pivoted, merging, live):
            document = {"op": "backup", "children": _rows(pivots), "pivoted": is_pivoted, "merging": merging}
            return document if live else {**document, "live": False}
        case _:
            assert_never(journal)


def _prepare(op: str, folder: str | None, pivots: Sequence[Pivot], *, live: bool) -> dict[str, Any]:
    return {"op": op, "phase": "prepare", "folder": folder, "children": _rows(pivots), "live": live}


def _rows(pivots: Sequence[Pivot]) -> list[list[str]]:
    return [[one.disk, one.frozen, one.child, one.format] for one in pivots]


def _memory_document(memory: Memory | None) -> dict[str, Any]:
    if memory is None:
        return {"mode": None, "was_running": False}
    return {
        "mode": memory.mode,
        "was_running": memory.was_running,
        "description": dict(memory.description),
        "snapshot": snapshot_document(memory.snapshot),
    }


def read_journal(document: object, path: str) -> Journal:
    """Parse what `journal_document`, or vmm 0.1.0, wrote. Raises VmmError for anything else, naming `path`."""
    try:
        return _decoded(document)
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise VmmError(
            f"is damaged: its journal, the record of an interrupted operation, cannot be parsed ({error})",
            path=path, hint="restore the file from a copy; settling a wrong journal could remove and rename images",
        ) from error  # fmt: skip


def _decoded(document: object) -> Journal:
    if not isinstance(document, dict):
        raise TypeError("journal")
    match document["op"]:
        case "create" if document.get("live") is True:
            return _create_live(document)
        case "create":
            return CreateOff(folder_path(document["folder"]), _pivots(document["children"]))
        case "apply":
            return Apply(_pivots(document["children"]))
        case "commit":
            return _commit(document)
        case "delete":
            return Delete(tuple(folder_path(one) for one in _list(document["folders"])))
        case "merge":
            return MergeOff(*_merge(document))
        case "live-merge":
            return MergeLive(_text(document["disk"]), *_merge(document))
        case "backup":
            pivots, merging = _pivots(document["children"], of_backup=True), document["merging"] is True
            return Backup(pivots, document["pivoted"] is True, merging, document.get("live") is not False)
    raise ValueError("op")


def _create_live(document: dict[str, Any]) -> CreateLive:
    folder, pivots = folder_path(document["folder"]), _pivots(document["children"])
    return CreateLive(folder, pivots, document.get("pivoted") is True, _memory(document, folder))


def _memory(document: dict[str, Any], folder: str) -> Memory | None:
    mode, description = document.get("mode"), document.get("description")
    if mode is not None:
        _text(mode)
    if description is None:
        return None
    if not isinstance(description, dict):
        raise TypeError("description")
    snapshot = snapshot_of(document["snapshot"])
    if snapshot.folder != folder:
        raise ValueError("snapshot")
    return Memory(mode, document.get("was_running") is True, description, snapshot)


def _commit(document: dict[str, Any]) -> PutInPlace:
    definition, saved, uefi = document["definition"], document["saved"], document["uefi"]
    if not isinstance(definition, dict):
        raise TypeError("definition")
    if saved is not None and saved not in get_args(SavedStep):
        raise ValueError("saved")
    if uefi is not None and uefi != NO_VARIABLES:  # must be a file in a snapshot's folder
        folder = folder_path(os.path.dirname(absolute_path(uefi)))
        if os.path.basename(uefi) != f"{os.path.basename(folder)}.nvram":
            raise ValueError("uefi")
    return PutInPlace(definition, saved, uefi)


def _pivots(rows: object, *, of_backup: bool = False) -> tuple[Pivot, ...]:
    found = []
    for row in _list(rows):
        disk, frozen, child, kind = _list(row)
        frozen, child = absolute_path(frozen), absolute_path(child)
        if not is_image_format(kind) or os.path.dirname(child) != os.path.dirname(frozen) or child == frozen:
            raise ValueError("children")
        if not (OWN_NAME.fullmatch(os.path.basename(child)) or (of_backup and is_child_name(child))):
            raise ValueError("children")
        if os.path.splitext(child)[1] != child_suffix(kind):
            raise ValueError("children")
        found.append(Pivot(_text(disk), frozen, child, kind))
    if len({one.child for one in found}) < len(found) or len({one.disk for one in found}) < len(found):
        raise ValueError("children")
    return tuple(found)


def _merge(document: dict[str, Any]) -> tuple[str, tuple[str, ...]]:
    target = absolute_path(document["target"])
    layers = tuple(absolute_path(one) for one in _list(document["layers"]))
    if not layers or len({target, *layers}) < len(layers) + 1:
        raise ValueError("layers")
    return target, layers


def _list(value: object) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError("list")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("text")
    return value
