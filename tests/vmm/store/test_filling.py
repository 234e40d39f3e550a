# SPDX-License-Identifier: Apache-2.0
"""The record of what is still to be filled."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vmm.model.errors import VmmError, WrongState
from vmm.model.paths import MachinePaths
from vmm.store.filling import (
    Filling,
    filling_path,
    images_being_filled,
    read_filling,
    refuse_while_filled,
    remove_filling,
    write_filling,
)

FILLING = Filling(
    "/srv/backup", "ab" * 16, "machine-id", "web", 18, "cd" * 16,
    {"disk-0": "/disks/web.vhd", "disk-1": "/disks/b.vhd"}, lease="ef" * 16, marks=True, max_rate_bytes=1000,
)  # fmt: skip


def test_a_record_is_read_back_until_all_disks_are_whole(tmp_path: Path) -> None:
    """All fields survive; a disk leaves it, and without it nothing is to be filled."""
    machine = MachinePaths(str(tmp_path))
    assert read_filling(machine) is None and images_being_filled(machine) == frozenset()
    write_filling(machine, FILLING)
    assert read_filling(machine) == FILLING and FILLING.source == "web@18 in /srv/backup"
    assert images_being_filled(machine) == {"/disks/web.vhd", "/disks/b.vhd"}
    write_filling(machine, FILLING.without("disk-0"))
    assert images_being_filled(machine) == {"/disks/b.vhd"}
    refuse_while_filled(machine, "web", "removing the disk", "disk-0")
    with pytest.raises(WrongState, match="removing the disk is not possible yet: disk-1 is still being filled"):
        refuse_while_filled(machine, "web", "removing the disk", "disk-1")
    with pytest.raises(WrongState, match="disk-1"):
        refuse_while_filled(machine, "web", "an id of its own")
    remove_filling(machine)
    remove_filling(machine)
    refuse_while_filled(machine, "web", "an id of its own")
    assert read_filling(machine) is None


@pytest.mark.parametrize(
    "change",
    [{"format": "other"}, {"night": "18"}, {"lease": 7}, {"disks": {"disk-0": "web.vhd"}}, {"disks": []},
     {"marks": None}, {"repository": None}],
    ids=str,
)  # fmt: skip
def test_a_damaged_record_is_an_error(tmp_path: Path, change: dict[str, object]) -> None:
    """A record that cannot be believed is no licence to merge: it is an error that names the file."""
    machine = MachinePaths(str(tmp_path))
    document = {**json.loads(FILLING.encoded()), **change}
    Path(filling_path(machine)).write_text(json.dumps(document))
    for look in (read_filling, images_being_filled):
        with pytest.raises(VmmError, match="is damaged") as caught:
            look(machine)
        assert caught.value.path == filling_path(machine)
