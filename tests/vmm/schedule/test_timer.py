# SPDX-License-Identifier: Apache-2.0
"""The units of a schedule: systemd accepts them, and they are installed and removed as a whole."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.support import require_tool
from tests.vmm.schedule.schedules import made
from vmm.host import systemd
from vmm.host.systemd import Scope
from vmm.model.errors import AccessDenied, AlreadyExists, InvalidSpec, VmmError
from vmm.schedule import timer

SYSTEMCTL = """#!/bin/sh
echo "$@" >>"{log}"
case "$*" in *"{fails}"*) echo "Failed to {fails} unit: it is Monday" >&2; exit 1;; esac
"""
TIMER, SERVICE = "vmm-schedule-nightly.timer", "vmm-schedule-nightly.service"


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in place of the system's and the user's units, with a systemctl that only writes a log."""
    monkeypatch.setattr(systemd, "SYSTEM_FOLDER", str(tmp_path / "system"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr(systemd, "_SYSTEMD_RUNS", str(tmp_path))
    monkeypatch.setattr(systemd, "_LINGER_FOLDER", str(tmp_path / "linger"))
    monkeypatch.setattr(systemd, "program_path", lambda: str(tmp_path / "bin"))
    (tmp_path / "bin").mkdir()
    systemctl(tmp_path)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    return tmp_path


def systemctl(host: Path, *, fails: str = "nothing") -> None:
    """Install a systemctl whose verb `fails` fails."""
    program = host / "bin/systemctl"
    program.write_text(SYSTEMCTL.format(log=host / "log", fails=fails))
    program.chmod(0o755)


def verbs(host: Path) -> list[str]:
    """The verbs with which systemctl was called since the last time."""
    log = host / "log"
    lines = log.read_text().splitlines() if log.exists() else []
    log.unlink(missing_ok=True)
    return [line.split()[2] for line in lines]


@pytest.mark.parametrize("scope", ["system", "user"])
def test_systemd_accepts_the_units(scope: Scope, tmp_path: Path) -> None:
    """systemd-analyze finds no fault in timer and service, whatever characters a path contains."""
    analyze = require_tool("systemd-analyze")
    folder = tmp_path / "with blank, 100%n and $HOME"
    folder.mkdir()
    command = folder / "vmm"
    command.write_text("#!/bin/sh\n")
    command.chmod(0o755)
    schedule = made(when="Mon..Fri 0/6:30", zone="America/New_York")
    (tmp_path / TIMER).write_text(timer.timer_text(schedule))
    words = [str(command), "backup", "schedule", "run", "nightly"]
    (tmp_path / SERVICE).write_text(timer.service_text(scope, schedule, words, {"VMM_HOME": 'a "b" 100%n $c'}))
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path), "HOME": str(tmp_path)}
    for unit in (TIMER, SERVICE):
        done = subprocess.run(
            [analyze, f"--{scope}", "verify", "--man=no", tmp_path / unit],
            capture_output=True, text=True, env=environment, check=False,
        )  # fmt: skip
        assert done.returncode == 0 and "nightly" not in done.stderr, done.stderr


def test_the_text_of_the_units() -> None:
    """The timer has the times in the schedule's zone and makes up for missed ones; the service runs the schedule."""
    text = timer.timer_text(made(when="Mon 5:00", zone="Europe/Berlin"))
    assert "OnCalendar=Mon *-*-* 05:00:00 Europe/Berlin\nPersistent=true\n" in text
    text = timer.service_text("system", made(), ["/a b/vmm", "run"], {"VMM_HOME": "/x"})
    assert 'ExecStart=:"/a b/vmm" "run"\n' in text and 'Environment="VMM_HOME=/x"\n' in text
    assert "Type=oneshot" in text and "After=network-online.target remote-fs.target" in text
    with pytest.raises(InvalidSpec):
        timer.service_text("system", made(), ["vmm"], {})


def test_installing_and_removing(host: Path) -> None:
    """The timer is enabled and started; the same again changes nothing; a change restarts it; removing removes all."""
    schedule = made()
    first = timer.install("system", schedule, ["/bin/true"])
    assert first.changed and first.path == str(host / "system" / TIMER) and first.notes == ()
    assert verbs(host) == ["enable", "daemon-reload", "restart"] and timer.installed("nightly") == first.path
    assert sorted(os.listdir(host / "system")) == [SERVICE, TIMER]
    assert not timer.install("system", schedule, ["/bin/true"]).changed
    assert verbs(host) == ["enable", "daemon-reload", "start"]
    assert timer.install("system", made(when="23:00"), ["/bin/true"]).changed
    verbs(host)
    assert timer.remove("system", "nightly") and os.listdir(host / "system") == []
    assert verbs(host) == ["stop", "disable", "daemon-reload"]
    assert not timer.remove("system", "nightly") and timer.installed("nightly") is None


def test_a_failed_install_leaves_nothing(host: Path) -> None:
    """If systemd does not enable the timer, both units are removed again."""
    systemctl(host, fails="enable")
    with pytest.raises(VmmError, match="it is Monday"):
        timer.install("system", made(), ["/bin/true"])
    assert os.listdir(host / "system") == []


def test_a_refused_unit_is_not_installed(host: Path) -> None:
    """A unit that systemd-analyze refuses never gets its name."""
    (host / "bin/systemd-analyze").symlink_to(require_tool("systemd-analyze"))
    with pytest.raises(InvalidSpec, match="systemd refuses the unit"):
        timer.install("system", made(), ["/nowhere/vmm"])
    assert not (host / "system").exists() and verbs(host) == []


def test_a_host_without_systemd(host: Path) -> None:
    """Nothing is written, and the note has the line for another scheduler."""
    (host / "bin/systemctl").unlink()
    done = timer.install("system", made(), ["/opt/v mm", "backup", "schedule", "run", "nightly"])
    assert not done.changed and "'/opt/v mm' backup schedule run nightly" in done.notes[0]
    assert not (host / "system").exists() and timer.installed("nightly") is None


def test_scopes(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's timers need root; the user's own run while the user is logged in, which a note says."""
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(AccessDenied, match="--user"):
        timer.install("system", made(), ["/bin/true"])
    notes = timer.install("user", made(), ["/bin/true"]).notes
    assert any("systemd is not running" in one for one in notes) and any("enable-linger" in one for one in notes)
    assert timer.installed("nightly") == str(host / "config/systemd/user" / TIMER)


def test_schedules_of_two_homes(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A schedule of another state home under the same name keeps its timer: it is neither replaced nor removed."""
    first = timer.install("system", made(), ["/bin/true"])
    before = Path(first.path).read_text()
    monkeypatch.setenv("VMM_HOME", str(host / "other"))
    with pytest.raises(AlreadyExists, match="choose another name"):
        timer.install("system", made(when="23:00"), ["/bin/true"])
    assert not timer.remove("system", "nightly") and timer.installed("nightly") is None
    assert Path(first.path).read_text() == before and sorted(os.listdir(host / "system")) == [SERVICE, TIMER]


def test_a_user_leaves_the_systems_timers_alone(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without root only the user's own timers are looked at."""
    assert timer.scopes() == ("system", "user")
    timer.install("system", made(), ["/bin/true"])
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert timer.scopes() == ("user",) and timer.installed("nightly") is None
