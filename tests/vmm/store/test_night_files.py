# SPDX-License-Identifier: Apache-2.0
"""The files of a night that describe its machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vmm.model.errors import InvalidSpec, NotFound
from vmm.model.paths import MachinePaths
from vmm.model.spec import make_spec
from vmm.store import night_files
from vmm.store.night_files import (
    DEFINITION,
    MAX_SNAPSHOTS,
    UEFI_VARIABLES,
    read_night_definition,
    snapshot_facts,
)
from vmm.store.snapshots.snapshot import Snapshot
from vmm.store.snapshots.tree import Tree

DISKS = [
    {"id": "disk-0", "path": "/disks/web.vhd"},
    {"id": "disk-1", "path": "/disks/shared.vhd", "unit": 1, "read_only": True, "controller": "scsi"},
    {"id": "cd", "kind": "iso", "path": None, "controller_index": 1},
]


def test_a_definition_is_read_back(tmp_path: Path) -> None:
    """The definition survives, with the disks that the night has; a machine without UEFI has no other file."""
    spec = make_spec(name="web", disks=DISKS, notes="ä")
    files = night_files.night_files(MachinePaths(str(tmp_path)), spec, ["disk-0"])
    assert list(files) == [DEFINITION]
    found = read_night_definition(files[DEFINITION], DEFINITION, ["disk-0", "disk-9"])
    assert found.spec == spec and dict(found.images) == {"disk-0": "disk-0"}


def test_uefi_variables_are_files_once_they_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first start a machine has none; afterwards they are a file, unless they cannot be variables."""
    machine, spec = MachinePaths(str(tmp_path)), make_spec(name="web", firmware="uefi")
    assert UEFI_VARIABLES not in night_files.night_files(machine, spec, [])
    Path(machine.uefi_variables).write_bytes(b"variables")
    assert night_files.night_files(machine, spec, [])[UEFI_VARIABLES] == b"variables"
    monkeypatch.setattr(night_files, "MAX_VARIABLES_BYTES", 8)
    with pytest.raises(InvalidSpec, match="more than 8 bytes"):
        night_files.night_files(machine, spec, [])


def test_a_night_must_have_the_disks_that_its_definition_names(tmp_path: Path) -> None:
    """A definition of another night, and one with an image of a disk that is none, are refused."""
    spec = make_spec(name="web", disks=DISKS)
    content = night_files.night_files(MachinePaths(str(tmp_path)), spec, ["disk-0", "disk-1"])[DEFINITION]
    with pytest.raises(NotFound, match="disk-1"):
        read_night_definition(content, DEFINITION, ["disk-0"])
    with pytest.raises(InvalidSpec, match="does not have"):
        read_night_definition(
            content.replace(b'"disk-1": "disk-1"', b'"cd": "disk-1"'), DEFINITION, ["disk-0", "disk-1"]
        )


def test_facts_about_snapshots_are_bounded() -> None:
    """The newest snapshots are listed first, with the present one marked, and not without end."""
    ids = [f"00000000-0000-4000-8000-{number:012x}" for number in range(MAX_SNAPSHOTS + 1)]
    snapshots = {one: Snapshot(one, f"s{number}", float(number), None, os.path.join("/snapshots", one), {}, "off")
                 for number, one in enumerate(ids)}  # fmt: skip
    facts = snapshot_facts(Tree(snapshots, now=ids[-1]))
    assert len(facts) == MAX_SNAPSHOTS and facts[0]["name"] == f"s{MAX_SNAPSHOTS}"
    assert [one["is_now"] for one in facts[:2]] == [True, False]
