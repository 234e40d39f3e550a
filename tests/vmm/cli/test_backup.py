# SPDX-License-Identifier: Apache-2.0
"""`vmm backup`: its commands, and what they say about a repository."""

from __future__ import annotations

import json
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.support import require_tool
from tests.vhdkit.backup.repositories import MACHINE, Nights
from tests.vmm.cli.running import document, failure, good, run
from tests.warm_commands import warm
from vhdkit.backup.leases import add_lease
from vmm.api.restoring import boot_trial
from vmm.api.restoring.boot_trial import TrialReport
from vmm.api.restoring.signs import TrialWish
from vmm.model.errors import StoreFailed


@pytest.fixture
def nights(tmp_path: Path) -> Nights:
    """Four nights of a machine called "web", the last one an hour old."""
    made = Nights(tmp_path / "repo")
    now = datetime.now(UTC).replace(microsecond=0)
    for number in range(1, 5):
        changes = {number * 4096: b"night %d" % number} if number != 3 else {}
        taken = now - timedelta(days=4 - number, hours=1)
        made.add({"disk-0": changes}, files={"definition.json": b"{}"}, taken=taken)
    return made


def damage(nights: Nights, number: int) -> None:
    """Flip a byte in the data of a night's image."""
    path = nights.image(number, "disk-0")
    raw = bytearray(path.read_bytes())
    raw[raw.find(b"night %d" % number)] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("words", [("web", "/backups/monday"), ("web", "/backups/monday", "--json"), ("prune-2", "x")])
def test_the_old_form_is_refused_with_the_line_to_type(words: tuple[str, ...]) -> None:
    """`vmm backup NAME DIR` does nothing and says which command saves a machine; a command is never guessed."""
    result = run("backup", *words)
    assert result.exit_code == 2 and f"vmm backup run {' '.join(words)}" in result.stderr


def test_a_wrong_command_is_an_error() -> None:
    """A single word that is not a command is reported as in any group."""
    assert "No such command 'lists'" in failure("backup", "lists", code=2)


def test_list(nights: Nights) -> None:
    """Machines are listed with their newest night, and the nights of one with what each added."""
    output = good("backup", "list", nights.path)
    assert "web" in output and MACHINE in output
    lines = good("backup", "list", nights.path, "web").splitlines()
    assert len(lines) == 5 and lines[1].split()[0] == "1" and "crash" in lines[1]
    found = document("backup", "list", nights.path, "web")["nights"]
    assert [one["night"] for one in found] == [1, 2, 3, 4] and found[2]["data_bytes"] == 0
    assert document("backup", "list", nights.path)["machines"][0]["nights"] == 4
    assert "no machine 'mail'" in failure("backup", "list", nights.path, "mail", code=1)
    failure("backup", "list", nights.path / "machines", code=1)
    assert good("backup", "list", nights.path, "-q") == ""


def test_show(nights: Nights) -> None:
    """A night is shown by number, by time, or as the newest, with the paths of its images."""
    output = good("backup", "show", nights.path, "web@2")
    assert "night 2" in output and "00002.avhd" in output and "definition.json" in output and "2 images" in output
    assert "unchanged" in good("backup", "show", nights.path, "web@3")
    found = document("backup", "show", nights.path, "web")
    assert found["manifest"]["night"] == 4 and found["disks"][0]["chain"] == 3
    assert "no night 9" in failure("backup", "show", nights.path, "web@9", code=1)
    failure("backup", "show", nights.path, "web@yesterday", code=2)


def test_status_and_verify(nights: Nights) -> None:
    """A night that is too old, damage and an unknown machine are exit codes for monitoring."""
    assert "good  web: newest whole night 4, 1 h old, never verified" in good("backup", "status", nights.path)
    late = run("backup", "status", nights.path, "web", "--max-age", "30m")
    assert late.exit_code == 1 and late.stdout.startswith("bad")
    assert "write 90m" in failure("backup", "status", nights.path, "--max-age", "soon", code=2)
    assert "web: 4 nights, all whole" in good("backup", "verify", nights.path)
    damage(nights, 4)
    result = run("backup", "verify", nights.path)
    assert result.exit_code == 3 and "00004.avhd" in result.stdout and "1 night damaged; whole: 1-3" in result.stdout
    bad = run("backup", "status", nights.path)
    assert bad.exit_code == 3 and "night 4 is damaged" in bad.stdout and "newest whole night 3" in bad.stdout
    found = json.loads(run("backup", "status", nights.path, "--json").stdout)["machines"][0]
    assert found["newest_whole"] == 3 and list(found["damaged_nights"]) == ["4"] and found["verified"]


def test_verify_by_booting(nights: Nights, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --boot each night is started and reported; one that does not boot, or cannot be started, is exit code 3."""
    asked = []

    def trial(repository: str, word: str, wish: TrialWish, *, progress: object) -> TrialReport:
        asked.append((word, wish))
        if word == "mail":
            raise StoreFailed("cannot be opened")
        return TrialReport("web", 4, "heartbeat" if word == "web@4" else None, "its agent answers", 31.2)

    monkeypatch.setattr(boot_trial, "try_boot", trial)
    assert good("backup", "verify", nights.path, "web@4", "--boot") == "web@4 boots: its agent answers, 31 s\n"
    assert good("backup", "verify", nights.path, "web@4", "--boot", "-q") == ""
    result = run("backup", "verify", nights.path, "--boot", "--expect", "in:", "--screen", "--seconds", "60")
    assert result.exit_code == 3 and "web@4 does not boot" in result.stdout
    assert asked[-1] == (MACHINE, TrialWish("in:", screen=True, seconds=60.0))
    result = run("backup", "verify", nights.path, "web@4", "mail", "--boot")
    assert result.exit_code == 3 and "mail could not be started: cannot be opened" in result.stdout
    found = json.loads(run("backup", "verify", nights.path, "web@4", "mail", "--boot", "--json").stdout)["nights"]
    assert [one["is_good"] for one in found] == [True, False]
    assert "--sample" in failure("backup", "verify", nights.path, "--boot", "--sample", "5", code=2)
    assert "--boot" in failure("backup", "verify", nights.path, "--expect", "in:", code=2)


def test_prune(nights: Nights) -> None:
    """A dry run shows what stays and why; the prune does that; without rules nothing happens."""
    assert "--keep-daily 7" in failure("backup", "prune", nights.path, "web", code=2)
    planned = good("backup", "prune", nights.path, "web", "--keep-daily", "2", "--dry-run")
    assert "would drop 2 nights" in planned and "newest, daily" in planned
    assert document("backup", "prune", nights.path, "web", "--keep-daily", "2")["dropped"] == [1, 2]
    nights.check(3, 4)
    assert "nothing to drop" in good("backup", "prune", nights.path, "web", "--keep-daily", "2")


def test_delete_and_protect(nights: Nights) -> None:
    """A night that is protected, read by a restore, or the newest is not deleted until that is ended or requested."""
    assert "night 2 of web is protected" in good("backup", "protect", nights.path, "web@2")
    assert "protected" in failure("backup", "delete", nights.path, "web@2", code=2)
    assert document("backup", "protect", nights.path, "web@2", "--off")["protected"] is False
    with nights.machine() as machine:
        lease = add_lease(machine.repository.root, machine.id, 2, "restore of web", lasting=True)
    assert "being read by restore of web" in good("backup", "list", nights.path, "web")
    assert lease.id in good("backup", "status", nights.path)
    failure("backup", "delete", nights.path, "web@2", code=5)
    assert "has no lease" in failure("backup", "delete", nights.path, "web@2", "--release", "ab" * 16, code=1)
    good("backup", "delete", nights.path, "web@2", "--release", lease.id)
    failure("backup", "delete", nights.path, "web", code=2)
    good("backup", "delete", nights.path, "web@4", "--newest", "-q")
    assert [one["night"] for one in document("backup", "list", nights.path, "web")["nights"]] == [1, 3]


@pytest.mark.parametrize("name", ["prune", "run", "status"])
def test_a_machine_may_be_called_like_a_command(nights: Nights, name: str) -> None:
    """The word after `backup` is the command, and the machine's name follows it."""
    with nights.machine() as machine, machine.held("a test"):
        machine.record(name=name)
    assert f"night 2 of {name}" in good("backup", "show", nights.path, f"{name}@2")
    assert document("backup", "prune", nights.path, name, "--keep-last", "1", "--dry-run")["dropped"] == [1, 2, 3]


def test_copy_and_promote(nights: Nights, tmp_path: Path) -> None:
    """A copy has the same nights and is repeated cheaply; only after it was promoted do prunes change it."""
    other = tmp_path / "other"
    assert "web: 4 nights added" in good("backup", "copy", nights.path, other)
    found = document("backup", "copy", nights.path, other, "--machine", "web", "--limit", "1G")
    assert found["machines"][0]["added"] == [] and found["machines"][0]["problems"] == []
    assert "nothing has changed" in good("backup", "copy", nights.path, other)
    failure("backup", "prune", other, "web", "--keep-last", "1", code=2)
    failure("backup", "copy", nights.path, other, "--limit", "1", code=2)
    assert "of its own" in good("backup", "promote", other)
    good("backup", "prune", other, "web", "--keep-last", "1")
    failure("backup", "copy", nights.path, other, code=2)
    failure("backup", "promote", nights.path, code=2)


def test_serve(nights: Nights, tmp_path: Path) -> None:
    """The change between two nights is served by vhdkit's command, which takes the place of ours."""
    nbdinfo, socket = require_tool("nbdinfo"), tmp_path / "sock"
    words = ("backup", "serve", nights.path, "web", "1..4", "--socket", socket, "--exit-last", "--json")
    with subprocess.Popen([*warm("vmm"), *map(str, words)], stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            found = json.loads("".join(iter(server.stdout.readline, "}\n")) + "}")
            assert (found["earlier"], found["later"]) == (1, 4)
            map_words = [nbdinfo, "--map", "--totals", found["uris"][0]]
            done = subprocess.run(map_words, capture_output=True, text=True, check=True, timeout=60)
            assert "data" in done.stdout and "hole" in done.stdout
            assert server.wait(60) == 0
        finally:
            server.kill()
    assert "A..B" in run_command("backup", "serve", nights.path, "web", "4").stderr


def run_command(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the command as a process of its own."""
    return subprocess.run([*warm("vmm"), *map(str, words)], capture_output=True, text=True, check=False, timeout=60)


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
