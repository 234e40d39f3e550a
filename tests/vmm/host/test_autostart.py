# SPDX-License-Identifier: Apache-2.0
"""The systemd unit that starts machines with the host: it is valid, and installed and removed completely."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.support import require_tool
from vmm.host import autostart, systemd
from vmm.host.systemd import Scope
from vmm.model.errors import AccessDenied, InvalidSpec, Unsupported, VmmError

SYSTEMCTL = """#!/bin/sh
echo "$@" >>"{log}"
case "$*" in *"{fails}"*) echo "Failed to {fails} unit: it is Monday" >&2; exit 1;; esac
"""


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in place of the system's and the user's units, with a systemctl that only writes a log."""
    monkeypatch.setattr(systemd, "SYSTEM_FOLDER", str(tmp_path / "system"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr(systemd, "_SYSTEMD_RUNS", str(tmp_path))
    monkeypatch.setattr(systemd, "_LINGER_FOLDER", str(tmp_path / "linger"))
    monkeypatch.delenv("VMM_HOME", raising=False)
    monkeypatch.delenv("VMM_RUNTIME", raising=False)
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


def log(host: Path) -> list[str]:
    """The calls of systemctl."""
    return (host / "log").read_text().splitlines() if (host / "log").exists() else []


@pytest.mark.parametrize("scope", ["system", "user"])
def test_systemd_accepts_the_unit(scope: Scope, tmp_path: Path) -> None:
    """systemd-analyze finds no fault in the unit, whatever characters a path contains."""
    analyze = require_tool("systemd-analyze")
    folder = tmp_path / "with blank, 100%n and $HOME"
    folder.mkdir()
    command = folder / "vmm"
    command.write_text("#!/bin/sh\n")
    command.chmod(0o755)
    unit = tmp_path / autostart.UNIT
    unit.write_text(autostart.unit_text(scope, [str(command)], {"VMM_HOME": 'a "b" 100%n $c'}))
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path), "HOME": str(tmp_path)}
    done = subprocess.run(
        [analyze, f"--{scope}", "verify", "--man=no", unit],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0 and autostart.UNIT not in done.stderr, done.stderr


def test_systemd_refuses_a_malformed_unit(tmp_path: Path) -> None:
    """Self-test of the check: systemd-analyze reports a command that does not exist."""
    require_tool("systemd-analyze")
    unit = tmp_path / autostart.UNIT
    unit.write_text(autostart.unit_text("system", ["/nowhere/vmm"], {}))
    assert "/nowhere/vmm" in (systemd.verify(str(unit), "system") or "")


def test_paths_are_quoted() -> None:
    """Blanks, quotes, backslashes and percent signs in paths are preserved; line ends are refused."""
    text = autostart.unit_text("system", ['/a b/"c"\\d%n'], {"VMM_HOME": "/x y"})
    assert 'ExecStart=:"/a b/\\"c\\"\\\\d%%n" host autostart --start-machines\n' in text
    assert 'Environment="VMM_HOME=/x y"\n' in text
    for bad in (["/a\nExecStart=/bin/rm"], ["vmm"], []):
        with pytest.raises(InvalidSpec):
            autostart.unit_text("system", bad, {})


def test_one_failed_machine_does_not_stop_the_others() -> None:
    """systemd kills the rest of a failed unit, so a machine that does not start must not make it fail."""
    lines = autostart.unit_text("system", ["/bin/vmm"], {}).splitlines()
    assert {"Type=exec", "RemainAfterExit=yes", "SuccessExitStatus=1"} <= set(lines)


def test_scopes_differ() -> None:
    """The system's unit waits for the network and serves all users, the user's own serves one session."""
    system, user = (autostart.unit_text(scope, ["/bin/vmm"], {}) for scope in ("system", "user"))
    assert "network-online.target" in system and "WantedBy=multi-user.target" in system
    assert "network-online.target" not in user and "WantedBy=default.target" in user


def test_install_and_remove(host: Path) -> None:
    """Installing writes, enables and reloads; repeating it changes nothing; removing removes everything."""
    first = autostart.install("system", ["/bin/true"])
    unit = host / "system" / autostart.UNIT
    assert first.changed and first.path == str(unit) and unit.stat().st_mode & 0o777 == 0o644
    assert autostart.is_installed("system")
    assert not autostart.install("system", ["/bin/true"]).changed
    assert autostart.install("system", ["/bin/false"]).changed and "/bin/false" in unit.read_text()
    assert autostart.remove("system").changed and not unit.exists()
    assert not autostart.remove("system").changed
    verbs = [line.split()[2] for line in log(host)]
    assert verbs == ["enable", "daemon-reload"] * 3 + ["disable", "daemon-reload"]
    assert os.listdir(host / "system") == []


def test_environment_is_kept(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home from the environment is the unit's home, too."""
    monkeypatch.setenv("VMM_HOME", "/srv/machines")
    autostart.install("system", ["/bin/true"])
    assert 'Environment="VMM_HOME=/srv/machines"' in (host / "system" / autostart.UNIT).read_text()


def test_user_unit_and_its_note(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without root the unit is the user's own, and the output mentions lingering until it is on."""
    monkeypatch.setattr(os, "geteuid", os.getuid)
    result = autostart.install("user", ["/bin/true"])
    assert result.path == str(host / "config/systemd/user" / autostart.UNIT)
    assert any("enable-linger" in note for note in result.notes)
    assert all("--user" in line for line in log(host))


def test_a_failed_install_leaves_nothing(host: Path) -> None:
    """If systemd does not enable the unit, the unit is removed again, and systemd's message is shown."""
    systemctl(host, fails="enable")
    with pytest.raises(VmmError, match="it is Monday"):
        autostart.install("system", ["/bin/true"])
    assert os.listdir(host / "system") == []


def test_a_refused_unit_is_not_installed(host: Path) -> None:
    """A unit that systemd-analyze refuses never gets its name."""
    (host / "bin/systemd-analyze").symlink_to(require_tool("systemd-analyze"))
    with pytest.raises(InvalidSpec, match="not executable"):
        autostart.install("system", ["/nowhere/vmm"])
    assert not (host / "system").exists() and log(host) == []


def test_a_host_without_systemd(host: Path) -> None:
    """Without systemctl nothing is installed, and the error says what to do instead."""
    (host / "bin/systemctl").unlink()
    with pytest.raises(Unsupported, match="--print"):
        autostart.install("system", ["/bin/true"])
    assert not (host / "system").exists()


def test_the_system_unit_needs_root(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without root the error says what to do instead."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(AccessDenied, match="--user"):
        autostart.install("system", ["/bin/true"])
    assert systemd.default_scope() == "user"


def test_systemd_is_not_running(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container the unit is enabled for later, and no manager is contacted."""
    monkeypatch.setattr(systemd, "_SYSTEMD_RUNS", str(host / "none"))
    result = autostart.install("system", ["/bin/true"])
    assert any("systemd is not running" in note for note in result.notes)
    assert [line.split()[2] for line in log(host)] == ["enable"]
