# SPDX-License-Identifier: Apache-2.0
"""`backup copy` and `promote`: what is printed, and the exit codes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.vhdkit.backup.repositories import MACHINE, Nights
from tests.vhdkit.cli.running import document, failure, good, run


@pytest.fixture
def nights(tmp_path: Path) -> Nights:
    """Two nights of a machine called "web"."""
    made = Nights(tmp_path / "repo")
    for number in (1, 2):
        made.add({"disk-0": {number * 4096: b"night %d" % number}}, files={"definition.json": b"{}"})
    return made


def test_copy(nights: Nights, tmp_path: Path) -> None:
    """What was copied is said in a line for each machine, and in JSON; a second run says that nothing has changed."""
    other = tmp_path / "other"
    assert good("backup", "copy", nights.path, other, "--limit", "100M").startswith("web: 2 nights added, ")
    assert good("backup", "copy", nights.path, other) == "web: nothing has changed\n"
    assert good("backup", "copy", nights.path, other, "-q") == ""
    nights.add({"disk-0": {0: b"3"}})
    found = document("backup", "copy", nights.path, other, "--machine", "web")
    assert found["other"] == str(other) and found["machines"] == [
        {
            "id": MACHINE, "name": "web", "added": [3], "changed": [], "dropped": [], "mended": [],
            "copied_bytes": found["machines"][0]["copied_bytes"], "problems": [],
        }
    ]  # fmt: skip
    failure("backup", "copy", nights.path, other, "--machine", "mail", code=1)
    failure("backup", "copy", nights.path, other, "--limit", "fast", code=2)
    failure("backup", "copy", nights.path, other, "--limit", "1", code=2)
    Nights(other, content=nights.content).check(1, 2, 3)


def test_a_night_that_cannot_be_copied(nights: Nights, tmp_path: Path) -> None:
    """Damage is named and gives exit code 3, a lease on what must change 5; what can be copied is copied."""
    path = nights.image(2, "disk-0")
    os.truncate(path, path.stat().st_size - 512)
    result = run("backup", "copy", nights.path, tmp_path / "other")
    assert result.exit_code == 3 and "not copied: " in result.output and str(path) in result.output
    assert "web: 1 night added" in result.output


def test_promote(nights: Nights, tmp_path: Path) -> None:
    """A copy that is promoted is said to be a repository of its own, and can be changed."""
    other = tmp_path / "other"
    good("backup", "copy", nights.path, other)
    assert f"vhdkit backup promote {other}" in failure("backup", "delete", other, "web@1", code=2)
    assert "a repository of its own" in good("backup", "promote", other)
    good("backup", "delete", other, "web@1")
    assert "is not a copy" in failure("backup", "promote", other, code=2)
    assert "name a new folder" in failure("backup", "copy", nights.path, other, code=2)
