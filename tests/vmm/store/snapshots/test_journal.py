# SPDX-License-Identifier: Apache-2.0
"""The record before an operation on snapshots: read back, believed only in its exact shape, and with one owner."""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any

import pytest

from tests.vmm.snapshots.machines import Machines
from vmm.model.errors import InUse, VmmError
from vmm.snapshots.steps import tidy
from vmm.store import registry
from vmm.store.snapshots.journal import (
    NO_VARIABLES,
    Apply,
    Backup,
    CreateLive,
    CreateOff,
    Delete,
    Journal,
    Memory,
    MergeLive,
    MergeOff,
    Pivot,
    PutInPlace,
    journal_document,
    read_journal,
    words_of,
)
from vmm.store.snapshots.snapshot import Snapshot
from vmm.store.snapshots.store import holding, load_tree, read_merging
from vmm.store.snapshots.tree import read_tree

ID = str(uuid.UUID(int=1 << 100))
FILE = "/m/snapshots.json"
FOLDER = f"/snapshots/machine/{ID}"
PIVOT = Pivot("disk-0", "/disks/web.vhd", "/disks/web_0123abcd.avhd", "vhd")
SNAPSHOT = Snapshot(ID, "a", 1.0, None, FOLDER, {"disk-0": "/disks/web.vhd"}, "running")
JOURNALS: list[Journal] = [
    CreateOff(FOLDER, (PIVOT,)),
    CreateLive(FOLDER, (PIVOT,)),
    CreateLive(FOLDER, (PIVOT,), True, Memory("background", True, {"format": 1}, SNAPSHOT)),
    Apply((PIVOT,)),
    PutInPlace({"name": "web"}, "put", f"{FOLDER}/{ID}.nvram"),
    PutInPlace({"name": "web"}, None),
    Delete((FOLDER,)),
    MergeOff("/disks/a.avhd", ("/disks/c.avhd", "/disks/b.avhd")),
    MergeLive("disk-0", "/disks/a.avhd", ("/disks/b.avhd",)),
    PutInPlace({"name": "web"}, "drop", NO_VARIABLES),
    Backup((PIVOT,)),
    Backup((PIVOT, Pivot("disk-1", "/disks/a.raw", "/disks/a.backup-1764460800.avhd", "raw")), True, True),
    Apply((Pivot("disk-0", "/disks/web.vhdx", "/disks/web_0123abcd.avhdx", "vhdx"),)),
]


@pytest.mark.parametrize("journal", JOURNALS, ids=lambda one: type(one).__name__)
def test_journals_read_back(journal: Journal) -> None:
    """Every kind reads back unchanged, through JSON, and has a description for users."""
    assert read_journal(json.loads(json.dumps(journal_document(journal))), FILE) == journal
    assert words_of(journal)


def test_journals_of_0_1_0() -> None:
    """The documents of vmm 0.1.0 have their old meaning."""
    rows = [["disk-0", "/disks/web.vhd", "/disks/web_0123abcd.avhd", "vhd"]]
    prepare = {"phase": "prepare", "folder": FOLDER, "children": rows}
    assert read_journal({"op": "create", **prepare, "live": False}, FILE) == CreateOff(FOLDER, (PIVOT,))
    assert read_journal({"op": "create", **prepare, "live": True}, FILE) == CreateLive(FOLDER, (PIVOT,))
    assert read_journal({"op": "apply", **prepare, "folder": None, "live": False}, FILE) == Apply((PIVOT,))
    known = {
        "mode": "stop",
        "was_running": True,
        "description": {},
        "snapshot": journal_document(JOURNALS[2])["snapshot"],
    }
    assert read_journal({"op": "create", **prepare, "live": True, **known}, FILE) == CreateLive(
        FOLDER, (PIVOT,), False, Memory("stop", True, {}, SNAPSHOT)
    )
    merge = {"target": "/disks/a.avhd", "layers": ["/disks/b.avhd"]}
    assert read_journal({"op": "live-merge", "disk": "disk-0", **merge}, FILE) == JOURNALS[8]


def _spoilt(journal: Journal, **changes: object) -> dict[str, Any]:
    return {**journal_document(journal), **changes}


def _row(*changed: object) -> list[list[object]]:
    row: list[object] = ["disk-0", "/disks/web.vhd", "/disks/web_0123abcd.avhd", "vhd"]
    return [[*changed, *row[len(changed) :]]]


@pytest.mark.parametrize(
    "document",
    [
        7,
        {},
        {"op": "format"},
        _spoilt(JOURNALS[0], folder="/etc"),
        _spoilt(JOURNALS[0], folder=None),
        _spoilt(JOURNALS[0], folder=f"/x/../{ID}"),
        _spoilt(JOURNALS[0], children=[[]]),
        _spoilt(JOURNALS[0], children=7),
        _spoilt(JOURNALS[0], children=_row(7)),
        _spoilt(JOURNALS[0], children=_row("disk-0", "/disks/web.vhd", "/etc/web_0123abcd.avhd")),
        _spoilt(JOURNALS[0], children=_row("disk-0", "/disks/web.vhd", "/disks/precious.vhd")),
        _spoilt(JOURNALS[0], children=_row("disk-0", "/disks/web.vhd", "web_0123abcd.avhd")),
        _spoilt(JOURNALS[0], children=_row() * 2),
        _spoilt(JOURNALS[0], children=_row("disk-0", "/disks/web.vhd", "/disks/web_0123abcd.avhdx")),
        _spoilt(JOURNALS[0], children=_row("disk-0", "/disks/web.vhd", "/disks/web_0123abcd.avhd", "vhdx")),
        _spoilt(JOURNALS[0], children=_row("disk-0", "/disks/web.vhd", "/disks/web_0123abcd.avhd", "qcow2")),
        _spoilt(JOURNALS[1], folder="/home"),
        _spoilt(JOURNALS[2], description=7),
        _spoilt(JOURNALS[2], snapshot=7),
        _spoilt(JOURNALS[3], children=None),
        _spoilt(JOURNALS[4], definition=None),
        _spoilt(JOURNALS[4], saved="eat"),
        _spoilt(JOURNALS[4], uefi="/etc/shadow"),
        _spoilt(JOURNALS[6], folders=["/home"]),
        _spoilt(JOURNALS[6], folders="/home"),
        _spoilt(JOURNALS[6], folders=[7]),
        _spoilt(JOURNALS[7], target="a.avhd"),
        _spoilt(JOURNALS[7], layers=[]),
        _spoilt(JOURNALS[7], layers=["/disks/a.avhd"]),
        _spoilt(JOURNALS[8], disk=None),
        _spoilt(JOURNALS[8], layers=None),
        _spoilt(JOURNALS[10], children=None),
        _spoilt(JOURNALS[10], children=_row("disk-0", "/disks/web.vhd", "/etc/web_0123abcd.avhd")),
        _spoilt(JOURNALS[10], children=_row("disk-0", "/disks/web.vhd", "/disks/precious.vhd")),
        _spoilt(JOURNALS[0], children=_row("disk-0", "/disks/web.vhd", "/disks/web.backup-1764460800.avhd")),
        {"op": "backup", "children": []},
    ],
)
def test_other_documents_are_damaged(document: object) -> None:
    """A journal of another shape, or one that names foreign files, is damaged; the error has the file's name."""
    with pytest.raises(VmmError, match="damaged"):
        read_journal(document, FILE)
    content = json.dumps(
        {"schema_version": 1, "now": None, "limit": 50, "snapshots": [], "images": {}, "journal": document}
    ).encode()
    with pytest.raises(VmmError, match="damaged") as failure:
        read_tree(content, "/m/snapshots.json")
    assert failure.value.path == "/m/snapshots.json"


def test_a_journal_has_one_owner(machines: Machines) -> None:
    """INV-ONE-JOURNAL: no operation and no clean-up begins while another operation's journal exists."""
    machines.create().create("a")
    paths = registry.load("web").paths
    with holding(paths, "web") as held:
        held.begin(JOURNALS[7])
    with holding(paths, "web") as held:
        for begin in (lambda: held.begin(Delete(())), lambda: tidy(held)):
            with pytest.raises(InUse, match=r"merging images was interrupted.*vmm repair web"):
                begin()
        for step in (held.done, lambda: held.go_on(Delete(()))):
            with pytest.raises(AssertionError):
                step()
        assert load_tree(paths).journal == JOURNALS[7]
        assert held.take_over() == JOURNALS[7]
        held.done()
        held.begin(Delete(()))
    assert load_tree(paths).journal == Delete(())


def test_a_note_of_a_merge_identifies_its_process(machines: Machines) -> None:
    """A note whose process number belongs to another process is not believed, so that process gets no signal."""
    machines.create().create("a")
    paths = registry.load("web").paths
    start = int(Path(f"/proc/{os.getpid()}/stat").read_text().rpartition(")")[2].split()[19])
    note: dict[str, object] = {"process": {"pid": os.getpid(), "start_ticks": start}}
    note |= {"target": None, "done_bytes": 0, "total_bytes": 0}
    (Path(paths.folder) / "merging.json").write_text(json.dumps(note))
    assert read_merging(paths) is None
    with holding(paths, "web"):
        assert read_merging(paths) is not None
