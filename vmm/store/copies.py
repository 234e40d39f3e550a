# SPDX-License-Identifier: Apache-2.0
"""Two machines with the same id, because a machine's folder was copied: which one is the copy.

An id leads to a machine's processes, images and snapshots, so a copy with the id of another machine would stop that
machine's guest and remove its snapshots. Decides which machine is a copy and how that is reported; `new_id` turns a
copy into a machine of its own. Light: every command uses this.

The original is the one whose processes run, otherwise the one whose definition has the name under which it is found.
If that applies to several of them or to none, each counts as a copy, and all operations on them are refused.

`INV-COPY-APART`: a machine that is a copy reaches no process, image or memory of its original.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass

from vmm.host.proc import command_words
from vmm.model.errors import InvalidSpec, Refused
from vmm.model.paths import MachinePaths, check_name, is_id, registry_folder, runtime_of
from vmm.store.state import processes_of

_MAX_DEFINITION_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class _Entry:
    """The relevant parts of a definition. `name` is the one under which the machine is found."""

    name: str
    folder: str
    id: str
    written_name: object


class AllIds:
    """The ids of all machines, read once, so that callers that check every machine do not read all files for each."""

    def __init__(self) -> None:
        self._by_id: dict[str, list[_Entry]] = {}
        registry = registry_folder()
        for name in _names(registry):
            if (entry := _entry(registry, name)) is not None:
                self._by_id.setdefault(entry.id, []).append(entry)

    def others(self, own: _Entry) -> list[_Entry]:
        """The other machines with the same id."""
        return [one for one in self._by_id.get(own.id, ()) if one.name != own.name]


def original_of(name: str, ids: AllIds | None = None) -> str | None:
    """The machine of which this one is a copy; None if its id is unique or it is the original itself.

    `ids`: ids that were read before.
    """
    registry = registry_folder()
    own = _entry(registry, name)
    if own is None:
        return None
    twins = _others(registry, own) if ids is None else ids.others(own)
    if not twins:
        return None
    original = _running_among([own, *twins]) or _named_among([own, *twins])
    if original is None:
        return twins[0].name
    return None if original is own else original.name


def refuse_copy(name: str, ids: AllIds | None = None) -> None:
    """Raise Refused if the machine is a copy of another."""
    original = original_of(name, ids)
    if original is not None:
        raise Refused(
            f"has the same id as the machine {original}: one is a copy of the other", machine=name,
            hint=f"vmm set {name} --new-id makes the copy a machine of its own",
        )  # fmt: skip


def _others(registry: str, own: _Entry) -> list[_Entry]:
    found = (_entry(registry, name, own.id) for name in _names(registry) if name != own.name)
    return [one for one in found if one is not None]


def _names(registry: str) -> list[str]:
    found = []
    with contextlib.suppress(FileNotFoundError):
        for name in sorted(os.listdir(registry)):
            with contextlib.suppress(ValueError):
                check_name(name)
                found.append(name)
    return found


def _entry(registry: str, name: str, wanted_id: str | None = None) -> _Entry | None:
    """The machine if it has an id (`wanted_id`, if given); otherwise None."""
    folder = os.path.join(registry, name)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        with open(MachinePaths(folder).definition, "rb", buffering=0) as file:
            content = file.read(_MAX_DEFINITION_BYTES)
        if wanted_id is not None and wanted_id.encode() not in content:
            return None  # this applies to most machines, so most files need no parsing
        document = json.loads(content)
        machine_id = document["id"]
        if is_id(machine_id) and wanted_id in (None, machine_id):
            return _Entry(name, os.path.realpath(folder), machine_id, document.get("name"))
    return None


def _running_among(entries: list[_Entry]) -> _Entry | None:
    """The machine in whose folder the processes with this id run; a link to the same folder is the same machine."""
    try:
        processes = processes_of(runtime_of(entries[0].id))
    except InvalidSpec:
        return None
    folders = {
        word for part in ("worker", "keeper") if (ref := processes.get(part)) for word in command_words(ref.pid)
    }
    found = [one for one in entries if one.folder in folders]
    return found[0] if len(found) == 1 else None


def _named_among(entries: list[_Entry]) -> _Entry | None:
    found = [one for one in entries if one.written_name == one.name]
    return found[0] if len(found) == 1 else None
