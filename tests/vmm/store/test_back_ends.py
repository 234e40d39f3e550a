# SPDX-License-Identifier: Apache-2.0
"""What is known of the back ends that a machine's adapters were on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vmm.model.paths import MachinePaths
from vmm.store.back_ends import last_back_ends, note_back_ends


def test_kept(tmp_path: Path) -> None:
    """What is noted is found, and what was noted of other adapters stays."""
    machine = MachinePaths(str(tmp_path))
    assert last_back_ends(machine) == {}
    note_back_ends(machine, {"nic-0": "user"})
    note_back_ends(machine, {"nic-1": "bridge"})
    assert last_back_ends(machine) == {"nic-0": "user", "nic-1": "bridge"}


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"nic-0": 1, "nic-1": ["bridge"]}', '{"nic-0": "tap"}', "[" * 9999]
)
def test_nonsense(content: str, tmp_path: Path) -> None:
    """A file that holds something else says nothing."""
    machine = MachinePaths(str(tmp_path))
    Path(machine.back_ends).write_text(content)
    assert last_back_ends(machine) == {}


def test_a_pipe_of_that_name(tmp_path: Path) -> None:
    """A pipe that nobody writes to says nothing, and nobody waits for it."""
    machine = MachinePaths(str(tmp_path))
    os.mkfifo(machine.back_ends)
    assert last_back_ends(machine) == {}
    note_back_ends(machine, {"nic-0": "user"})
    assert last_back_ends(machine) == {"nic-0": "user"}
