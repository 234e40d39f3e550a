# SPDX-License-Identifier: Apache-2.0
"""`vhdkit backup list`, `show`, `status`, `verify`, `prune`, `delete` and `protect`."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.vhdkit.backup.repositories import MACHINE, Nights
from tests.vhdkit.cli.running import document, failure, good, run
from vhdkit.backup.leases import add_lease


@pytest.fixture
def nights(tmp_path: Path) -> Nights:
    """Four nights of a machine called "web", the last one an hour old."""
    made = Nights(tmp_path / "repo")
    now = datetime.now(UTC).replace(microsecond=0)
    for number in range(1, 5):
        made.add(
            {"disk-0": {number * 4096: b"night %d" % number} if number != 3 else {}},
            files={"definition.json": b"{}"},
            taken=now - timedelta(days=4 - number, hours=1),
            zone="UTC",
            utc_offset=timedelta(),
        )
    return made


def damage(nights: Nights, number: int) -> None:
    """Flip a byte in the data of a night's image."""
    path = nights.image(number, "disk-0")
    raw = bytearray(path.read_bytes())
    raw[raw.find(b"night %d" % number)] ^= 1
    path.write_bytes(raw)


def test_list(nights: Nights) -> None:
    """Machines are listed with their newest night, and the nights of one with what each added."""
    output = good("backup", "list", nights.path)
    assert "web" in output and MACHINE in output and " 4 " in output
    lines = good("backup", "list", nights.path, "web").splitlines()
    assert len(lines) == 5 and lines[1].split()[0] == "1" and "crash" in lines[1]
    found = document("backup", "list", nights.path, "web")["nights"]
    assert [one["night"] for one in found] == [1, 2, 3, 4] and found[2]["data_bytes"] == 0
    assert document("backup", "list", nights.path)["machines"][0]["nights"] == 4
    assert "vhdkit backup list" in failure("backup", "list", nights.path, "mail", code=1)
    failure("backup", "list", nights.path / "machines", code=1)


def test_an_empty_repository(tmp_path: Path) -> None:
    """A repository without machines is no error for `list` and `verify`, and no success for `status`."""
    path = Nights(tmp_path / "repo").path
    assert "no machine" in good("backup", "list", path)
    good("backup", "verify", path)
    assert "no machine" in failure("backup", "status", path, code=1)


def test_show(nights: Nights) -> None:
    """A night is shown by number, by time, or as the newest; its images can be opened by the path that is shown."""
    output = good("backup", "show", nights.path, "web@2")
    assert "night 2" in output and "00002.avhd" in output and "definition.json" in output and "2 images" in output
    assert "unchanged" in good("backup", "show", nights.path, "web@3")
    found = document("backup", "show", nights.path, "web")
    assert found["night"] == 4 and found["disks"][0]["chain"] == 3
    good("info", found["disks"][0]["path"])
    tomorrow = (datetime.now(UTC) + timedelta(days=1)).strftime("%Y-%m-%d")
    assert document("backup", "show", nights.path, f"web@{tomorrow}")["night"] == 4
    assert "no night 9" in failure("backup", "show", nights.path, "web@9", code=1)
    failure("backup", "show", nights.path, "web@yesterday", code=2)


def test_status(nights: Nights) -> None:
    """Status is good with a recent whole night; a night that is too old, damage and an unknown machine are exit
    codes for monitoring."""
    assert "newest whole night 4, 1 h old, never verified" in good("backup", "status", nights.path)
    failed = run("backup", "status", nights.path, "web", "--max-age", "30m")
    assert failed.exit_code == 1 and failed.stdout.startswith("bad")
    failure("backup", "status", nights.path, "--max-age", "soon", code=2)
    damage(nights, 4)
    assert run("backup", "verify", nights.path).exit_code == 3
    bad = run("backup", "status", nights.path)
    assert bad.exit_code == 3 and "night 4 is damaged" in bad.stdout and "newest whole night 3" in bad.stdout
    found = document("backup", "status", nights.path, code=3)["machines"][0]
    assert found["newest_whole"] == 3 and list(found["damaged_nights"]) == ["4"] and found["verified"]


def test_verify(nights: Nights) -> None:
    """A good repository is whole; damage names the file, the nights that it reaches, and those that are whole."""
    assert "whole: 4 nights of web" in good("backup", "verify", nights.path)
    assert "whole" in good("backup", "verify", nights.path, "web", "--sample", "50")
    damage(nights, 2)
    result = run("backup", "verify", nights.path)
    assert result.exit_code == 3 and "00002.avhd" in result.stdout
    assert "web: 3 nights damaged; whole: 1" in result.stdout
    assert [one["night"] for one in document("backup", "verify", nights.path, code=3)["machines"][0]["nights"]
            if one["problems"]] == [2, 3, 4]  # fmt: skip


def test_prune(nights: Nights) -> None:
    """A dry run shows what stays and why; the prune does that; without rules nothing happens."""
    assert "--keep-daily 7" in failure("backup", "prune", nights.path, "web", code=2)
    planned = good("backup", "prune", nights.path, "web", "--keep-daily", "2", "--dry-run")
    assert (
        "would drop 2 nights" in planned
        and re.search(r"keep  4  [-\d]+ [:\d]+ [+-]\d+  newest, daily", planned)
        and "drop  1  20" in planned
    )
    assert len(document("backup", "list", nights.path, "web")["nights"]) == 4
    assert "dropped 2 nights" in good("backup", "prune", nights.path, "web", "--keep-daily", "2")
    assert [one["night"] for one in document("backup", "list", nights.path, "web")["nights"]] == [3, 4]
    nights.check(3, 4)
    good("backup", "verify", nights.path)
    assert "nothing to drop" in good("backup", "prune", nights.path, "web", "--keep-daily", "2")
    failure("backup", "prune", nights.path, "web", "--keep-daily", "2", "--zone", "Mars/Olympus", code=2)


def test_delete_and_protect(nights: Nights) -> None:
    """A night that is protected, read by a restore, or the newest is not deleted until that is ended or requested."""
    good("backup", "protect", nights.path, "web@2")
    assert "protected" in good("backup", "list", nights.path, "web")
    assert "protected" in failure("backup", "delete", nights.path, "web@2", code=2)
    good("backup", "protect", nights.path, "web@2", "--off")
    with nights.machine() as machine:
        lease = add_lease(machine.repository.root, machine.id, 2, "restore of web", lasting=True)
    assert "being read by restore of web" in good("backup", "list", nights.path, "web")
    assert lease.id in good("backup", "status", nights.path)
    assert lease.id in failure("backup", "delete", nights.path, "web@2", code=5)
    assert "would drop 1 night" in run("backup", "delete", nights.path, "web@1", "--dry-run").stdout
    good("backup", "delete", nights.path, "web@2", "--release", lease.id)
    assert "--newest" in failure("backup", "delete", nights.path, "web@4", code=2)
    good("backup", "delete", nights.path, "web@4", "--newest", "-q")
    assert [one["night"] for one in document("backup", "list", nights.path, "web")["nights"]] == [1, 3]
    nights.check(1, 3)
    good("backup", "verify", nights.path)
    failure("backup", "delete", nights.path, "web@1", "--release", "00" * 16, code=1)
    assert run("backup", "delete", nights.path, "web").exit_code == 2


def test_a_machine_with_the_name_of_a_command(tmp_path: Path) -> None:
    """A machine called `prune` is pruned, listed and shown like any other."""
    nights = Nights(tmp_path / "repo")
    for number in range(3):
        nights.add({"disk-0": {number: b"x"}}, machine_name="prune")
    assert len(document("backup", "list", nights.path, "prune")["nights"]) == 3
    assert "dropped 2 nights" in good("backup", "prune", nights.path, "prune", "--keep-last", "1")
    assert "night 3 of prune" in good("backup", "show", nights.path, "prune@3")


def test_words_that_are_no_commands(nights: Nights) -> None:
    """A word that is not a command is an error, never guessed; without a word the help is shown."""
    assert run("backup", "prun", nights.path).exit_code == 2
    assert "verify" in good("backup")


def test_a_night_of_the_future_is_not_recent(nights: Nights) -> None:
    """A night that was taken while a clock was wrong does not keep `status` content until that time."""
    taken = datetime.now(UTC) + timedelta(days=300)
    nights.add({"disk-0": {0: b"later"}}, taken=taken, zone="UTC", utc_offset=timedelta())
    result = run("backup", "status", nights.path)
    assert result.exit_code == 1 and "in the future" in result.stdout


def test_a_damaged_machine_hides_no_other(nights: Nights) -> None:
    """Where the record of one machine is damaged, the others are verified and judged all the same."""
    other = nights.path / "machines" / "0123"
    (other / "nights").mkdir(parents=True)
    (other / "machine.json").write_bytes(b"{}")
    result = run("backup", "verify", nights.path)
    assert result.exit_code == 3 and "damaged: " in result.stdout and "4 nights" in result.stdout
    status = run("backup", "status", nights.path)
    assert (
        status.exit_code == 3
        and "bad   0123: " in status.stdout
        and "good  web: newest whole night 4" in status.stdout
    )
    found = json.loads(run("backup", "verify", nights.path, "--json").stdout)["machines"]
    assert "machine.json" in found[0]["problem"] and found[1]["problem"] is None and len(found[1]["nights"]) == 4
