# SPDX-License-Identifier: Apache-2.0
"""`vmm backup schedule` and `vmm backup status` without a repository."""

from __future__ import annotations

import json
import os
import shlex
import signal
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import click
import pytest

import vhdkit
from tests.vhdkit.backup.repositories import Nights
from tests.vmm.cli.running import document, failure, good, run
from tests.warm_commands import warm
from vhdkit import backups
from vmm.api import scheduled_backups
from vmm.cli import backup_schedule
from vmm.cli.backup import backup_command
from vmm.host import systemd
from vmm.host.proc import Lock
from vmm.model.spec import make_spec
from vmm.schedule import running, store
from vmm.schedule.places import schedule_paths
from vmm.schedule.record import read_last
from vmm.store import registry

# In place of vmm: `backup run` fails for the machine "mail", everything is noted.
FAKE = """#!/bin/sh
echo "$@" >>{log}
case "$*" in *" --json -- mail"*) echo '{{"error": {{"message": "mail: the disk is full"}}}}' >&2; exit 7;; esac
"""
ADD = ("backup", "schedule", "add", "nightly", "web", "mail")


@pytest.fixture(autouse=True)
def home(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A home with two machines, no systemd, and a vmm that only notes how it is called."""
    monkeypatch.setenv("VMM_HOME", str(short_path / "home"))
    monkeypatch.setenv("VMM_RUNTIME", str(short_path / "run"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(short_path / "config"))
    monkeypatch.setattr(systemd, "SYSTEM_FOLDER", str(short_path / "system"))
    monkeypatch.setattr(systemd, "program_path", lambda: str(short_path / "bin"))
    monkeypatch.setattr(systemd, "_SYSTEMD_RUNS", str(short_path / "none"))
    monkeypatch.setattr(running, "PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(backup_schedule, "own_command", lambda: [str(short_path / "vmm")])
    program = short_path / "vmm"
    program.write_text(FAKE.format(log=short_path / "log"))
    program.chmod(0o755)
    for name in ("mail", "web"):
        registry.add(make_spec(name=name))
    yield short_path


def calls(home: Path) -> list[str]:
    """How the fake was called."""
    return (home / "log").read_text().splitlines()


def older(days: int) -> None:
    """Make the schedule so many days older."""
    made = store.load("nightly")
    store.add(made.model_copy(update={"created": made.created - timedelta(days=days)}), replace=True)


def test_adding_and_showing(home: Path) -> None:
    """A schedule is added with its timer, listed, shown and removed."""
    (home / "bin").mkdir()
    systemctl = home / "bin" / "systemctl"
    systemctl.write_text("#!/bin/sh\n")
    systemctl.chmod(0o755)
    result = run(*ADD, home / "repo", "--when", "22:30", "--keep-daily", "7", "--sample", "5", "--jobs", "2", "--user")
    assert result.exit_code == 0 and result.stdout.startswith("nightly: next ") and "22:30 UTC" in result.stdout
    assert "systemd is not running" in result.stderr
    service = (home / "config/systemd/user/vmm-schedule-nightly.service").read_text()
    assert f'ExecStart=:"{home}/vmm" "backup" "schedule" "run" "nightly"' in service
    assert f'VMM_HOME={home}/home"' in service
    assert "already exists" in failure(*ADD, home / "repo", "--when", "22:30", "--user", code=1)
    assert "never run" in good("backup", "schedule", "list")
    shown = good("backup", "schedule", "show", "nightly")
    assert "web, mail" in shown and "daily 7" in shown and "5 % of each image" in shown and "not due yet" in shown
    assert f"nightly: 22:30 (UTC) to {home}/repo; never run" in good("backup", "status")
    created = store.load("nightly").created
    result = run(*ADD, home / "repo", "--when", "23:30", "--user", "--replace")
    assert result.exit_code == 0 and "23:30 UTC" in result.stdout
    assert store.load("nightly").created == created and store.load("nightly").jobs == 1
    assert "23:30:00 UTC" in (home / "config/systemd/user/vmm-schedule-nightly.timer").read_text()
    systemctl.write_text("#!/bin/sh\nexit 1\n")
    assert run(*ADD, home / "repo", "--when", "21:30", "--user", "--replace").exit_code == 1
    assert store.load("nightly").when == "23:30"
    assert "23:30:00 UTC" in (home / "config/systemd/user/vmm-schedule-nightly.timer").read_text()
    systemctl.write_text("#!/bin/sh\n")
    assert "--yes" in failure("backup", "schedule", "remove", "nightly", code=2)
    good("backup", "schedule", "remove", "nightly", "--yes")
    assert list((home / "config/systemd/user").iterdir()) == [] and store.names() == []
    assert "vmm backup schedule add" in good("backup", "schedule", "list")
    failure("backup", "schedule", "show", "nightly", code=1)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--when", "soon"), "write one such as"),
        (("--when", "22:30", "--zone", "Mars"), "time zone"),
        (("--when", "22:30", "--all"), "--all"),
        (("--when", "22:30", "--before", "'open"), "is not a command"),
        (("--when", "22:30", "--after", ""), "a hook is a program"),
        (("--when", "22:30", "--late-after", "soon"), "write 90m"),
        (("--when", "22:30", "--sample", "0"), "from 1 to 100"),
        ((), "--when"),
    ],
)
def test_impossible_schedules(home: Path, words: tuple[str, ...], reason: str) -> None:
    """What cannot be is refused in words, and nothing is added."""
    assert reason in failure(*ADD, "repo", *words, code=2)
    assert store.names() == []


def test_a_machine_that_does_not_exist(home: Path) -> None:
    """A misspelt machine is found when the schedule is added, and not in the night."""
    assert "'wbe' does not exist" in failure(
        "backup", "schedule", "add", "nightly", "wbe", "repo", "--when", "22:30", code=1
    )


def test_a_timer_that_cannot_be_installed_leaves_no_schedule(home: Path) -> None:
    """A schedule without the timer that was wanted would never run."""
    (home / "bin").mkdir()
    systemctl = home / "bin" / "systemctl"
    systemctl.write_text("#!/bin/sh\necho it is Monday >&2\nexit 1\n")
    systemctl.chmod(0o755)
    assert "it is Monday" in failure(*ADD, home / "repo", "--when", "22:30", "--user", code=1)
    assert store.names() == []


def test_notes(home: Path) -> None:
    """Without systemd, and with --no-timer, the note has the command for another scheduler; a time in the hours in
    which clocks change has a warning."""
    result = run(*ADD, "repo", "--when", "02:30", "--zone", "Europe/Berlin")
    line = shlex.join([f"{home}/vmm", "backup", "schedule", "run", "nightly"])
    assert "systemd is not installed: have cron, or another scheduler, run: env " in result.stderr
    assert f" VMM_HOME={os.environ['VMM_HOME']} " in result.stderr and f" {line}\n" in result.stderr
    assert "02:30 Europe/Berlin" in result.stdout and "--zone UTC" in result.stderr
    found = document("backup", "schedule", "add", "all", "--all", "repo", "--when", "22:30", "--no-timer")
    assert found["timer"] is None and "no timer runs it" in found["notes"][0]
    assert found["schedule"]["work"] == {"repository": str(Path("repo").absolute())}


def test_running(home: Path) -> None:
    """A run saves, prunes and verifies each machine; one that fails is reported, and does not stop the others."""
    run(*ADD, home / "repo", "--when", "22:30", "--keep-daily", "7", "--sample", "5", "--on-failure",
        f"sh -c 'echo \"$VMM_REASON\" >{home}/reason'")  # fmt: skip
    result = run("backup", "schedule", "run", "nightly")
    assert result.exit_code == 1 and result.stdout == "web: done\n"
    assert result.stderr == "vmm: mail: backup: mail: the disk is full\n"
    assert [line.split()[1] for line in calls(home)] == ["run", "prune", "verify", "run"]
    assert (home / "reason").read_text() == "mail: backup: mail: the disk is full\n"
    shown = good("backup", "schedule", "show", "nightly")
    assert "failed: mail: backup: mail: the disk is full" in shown and "begun" in shown
    again = run("backup", "schedule", "run", "nightly", "--json")
    assert again.exit_code == 1 and json.loads(again.stdout)["problems"] == {"mail": "backup: mail: the disk is full"}
    assert document("backup", "schedule", "show", "nightly")["events"][-1]["event"] == "failed"
    listed = good("backup", "schedule", "list")
    assert "failed" in listed and "the disk is full" not in listed


def test_a_run_that_finds_another_one(home: Path) -> None:
    """It is skipped with an exit code of its own, and that is shown."""
    run(*ADD, home / "repo", "--when", "22:30")
    lock = Lock(schedule_paths("nightly").lock)
    assert lock.try_take()
    assert "still going" in failure("backup", "schedule", "run", "nightly", code=5)
    assert "running" in good("backup", "schedule", "list")
    lock.release()
    assert "skipped" in good("backup", "schedule", "show", "nightly")
    assert read_last(schedule_paths("nightly")) is None


def test_status(home: Path) -> None:
    """Late machines are exit code 1, damage is 3; a machine called like a command is one like others."""
    failure("backup", "status", code=1)
    registry.add(make_spec(name="status"))
    run("backup", "schedule", "add", "nightly", "web", "status", home / "repo", "--when", "*:00", "--late-after", "2h")
    assert run("backup", "status").exit_code == 0
    older(2)
    nights = Nights(home / "repo")
    nights.add({"disk-0": {0: b"x"}}, taken=datetime.now(UTC).replace(microsecond=0))
    late = run("backup", "status")
    assert late.exit_code == 1 and "good     web: newest whole night 1" in late.stdout
    assert "late     status: no night; the schedule has never run" in late.stdout
    assert "no timer runs it" in late.stdout
    found = json.loads(run("backup", "status", "--schedule", "nightly", "--json").stdout)["schedules"][0]
    assert [one["state"] for one in found["machines"]] == ["good", "late"] and found["is_good"] is False
    nights.image(1, "disk-0").unlink()
    assert run("backup", "status", "-q").exit_code == 3
    failure("backup", "status", "--schedule", "weekly", code=1)
    failure("backup", "status", "--max-age", "2h", code=2)
    failure("backup", "status", home / "repo", "--schedule", "nightly", code=2)


def test_the_commands_have_the_options(home: Path) -> None:
    """What a schedule with every setting runs are commands with options that they have."""
    settings = ("--keep-last", "1", "--keep-yearly", "2", "--sample", "5", "--consistent", "--with-memory",
                "--compare", "--full-every",
                "9", "--keep-free", "1G", "--limit", "20M", "--zone", "Europe/Berlin")  # fmt: skip
    run(*ADD, home / "repo", "--when", "22:30", *settings)
    steps = scheduled_backups.jobs_of(store.load("nightly"), ["vmm"])[0].steps
    assert [one.words[2] for one in steps] == ["run", "prune", "verify"]
    for step in steps:
        command = backup_command.get_command(click.Context(backup_command), step.words[2])
        assert command is not None
        command.make_context(step.words[2], list(step.words[3:]))


def test_the_real_commands(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two schedules share a repository: each saves, prunes and verifies; while another host's backup holds a machine,
    its run fails with the reason, the other machine is saved, and the night that is there stays. A repository that is
    not mounted is missing, and no other one is made until the user says so."""
    monkeypatch.setattr(backup_schedule, "own_command", lambda: list(warm("vmm")))
    for name in ("db", "web-2"):
        vhdkit.create_image(home / f"{name}.vhd", 4 << 20)
        good("create", name, "--memory", "64M", "--disk", home / f"{name}.vhd")
    for schedule in ("nightly", "weekly"):
        run("backup", "schedule", "add", schedule, "db", "web-2", home / "repo", "--when", "22:30", "--no-timer",
            "--keep-last", "1", "--sample", "50", "--jobs", "2")  # fmt: skip
        result = run("backup", "schedule", "run", schedule)
        assert result.exit_code == 0, result.stderr
    older(2)
    assert run("backup", "status").exit_code == 0
    nights = document("backup", "list", home / "repo")["machines"]
    assert sorted((one["name"], one["nights"]) for one in nights) == [("db", 1), ("web-2", 1)]
    with (
        backups.open_repository(home / "repo") as repository,
        repository.machine(registry.load("db").spec.id) as machine,
        machine.held("backup on another host"),
    ):
        result = run("backup", "schedule", "run", "nightly")
    assert result.exit_code == 1 and result.stdout == "web-2: done\n"
    assert "vmm: db: backup:" in result.stderr and "backup on another host" in result.stderr
    assert run("backup", "status").exit_code == 0
    (home / "repo").rename(home / "away")
    (home / "repo").mkdir()
    result = run("backup", "schedule", "run", "weekly")
    assert result.exit_code == 1 and result.stderr.count("the folder is empty: is its disk mounted?") == 2
    assert result.stderr.count("vmm backup schedule run weekly --new-repository") == 2
    assert list((home / "repo").iterdir()) == [] and run("backup", "status").exit_code == 1
    assert run("backup", "status").stdout.count("  missing  ") == 4
    assert run("backup", "schedule", "run", "weekly", "--new-repository").exit_code == 0
    assert run("backup", "status", "--schedule", "weekly").exit_code == 0
    assert run("backup", "schedule", "run", "weekly").exit_code == 0


def test_commands_can_be_interrupted_in_the_background(home: Path) -> None:
    """Ctrl-C is ignored in the background of a script; a run that is ended there interrupts its commands all the
    same."""
    handlers = []
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with backup_schedule._terminable():
            handlers = [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)]
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert callable(handlers[0]) and handlers[1] is signal.default_int_handler
