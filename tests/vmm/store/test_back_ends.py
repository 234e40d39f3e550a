# SPDX-License-Identifier: Apache-2.0
"""The record of the back ends that a machine's adapters were on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vmm.model.paths import MachinePaths
from vmm.store.back_ends import last_back_ends, note_back_ends


def test_records_are_kept(tmp_path: Path) -> None:
    """A record can be read back, and those of other adapters stay."""
    machine = MachinePaths(str(tmp_path))
    assert last_back_ends(machine) == {}
    note_back_ends(machine, {"nic-0": "user"})
    note_back_ends(machine, {"nic-1": "bridge"})
    assert last_back_ends(machine) == {"nic-0": "user", "nic-1": "bridge"}


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"nic-0": 1, "nic-1": ["bridge"]}', '{"nic-0": "tap"}', "[" * 9999]
)
def test_a_malformed_record(content: str, tmp_path: Path) -> None:
    """A file with any other content counts as empty."""
    machine = MachinePaths(str(tmp_path))
    Path(machine.back_ends).write_text(content)
    assert last_back_ends(machine) == {}


def test_a_pipe_in_place_of_the_record(tmp_path: Path) -> None:
    """A pipe without a writer counts as empty, and is not waited for."""
    machine = MachinePaths(str(tmp_path))
    os.mkfifo(machine.back_ends)
    assert last_back_ends(machine) == {}
    note_back_ends(machine, {"nic-0": "user"})
    assert last_back_ends(machine) == {"nic-0": "user"}
