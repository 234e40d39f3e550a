# SPDX-License-Identifier: Apache-2.0
"""Machines that start with the host: the systemd unit, its installation and its removal.

Decides the content of the unit and where it is installed: for the whole system when root installs it, otherwise for
the user's own service manager. The unit runs the command line, which carries out the automatic start and stop actions
of every machine (`vmm host autostart --start-machines`, `--stop-machines`); this module knows nothing about machines.

A unit is checked by systemd-analyze before it is put in place. It is stopped by a command and not by killing its
processes, so that machines are saved or shut down first; systemd then kills whatever is left.

Sources: systemd.service(5), systemd.unit(5), systemd.exec(5), "COMMAND LINES" for the quoting, loginctl(1).
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from vmm.host.kernel import program_path
from vmm.model import unfinished
from vmm.model.errors import AccessDenied, InvalidSpec, Unsupported, VmmError, of_os_error
from vmm.model.folders import in_use

Scope = Literal["system", "user"]
UNIT = "vmm-machines.service"
SYSTEM_FOLDER = "/etc/systemd/system"
KEPT_VARIABLES = ("VMM_HOME", "VMM_RUNTIME")
STOP_SECONDS = 900  # enough to save the memory of all machines
_SYSTEMD_RUNS = "/run/systemd/system"
_LINGER_FOLDER = "/var/lib/systemd/linger"
_SECONDS = 60.0
_UNIT_MODE = 0o644


@dataclass(frozen=True, slots=True)
class Result:
    """What was done: the path of the unit, whether anything changed, and notes for the user."""

    path: str
    changed: bool
    notes: tuple[str, ...] = ()


def default_scope() -> Scope:
    """The system scope for root, otherwise the user scope."""
    return "system" if os.geteuid() == 0 else "user"


def unit_path(scope: Scope) -> str:
    """The path of the unit."""
    if scope == "system":
        return os.path.join(SYSTEM_FOLDER, UNIT)
    base = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return os.path.join(base, "systemd", "user", UNIT)


def unit_text(scope: Scope, command: Sequence[str], environment: Mapping[str, str]) -> str:
    """The content of the unit: `command` runs vmm, `environment` is set for it. Pure.

    Raises InvalidSpec for a command that a unit cannot express.
    """
    if not command or not os.path.isabs(command[0]):
        raise InvalidSpec("a unit needs the absolute path of the command", path=command[0] if command else "")
    call = " ".join(map(_quoted, command))
    variables = "".join(f"Environment={_quoted(f'{name}={value}')}\n" for name, value in sorted(environment.items()))
    network = "" if scope == "user" else "Wants=network-online.target\nAfter=network-online.target remote-fs.target\n"
    target = "multi-user.target" if scope == "system" else "default.target"
    return (
        "# Written by: vmm host autostart. Taken away by: vmm host autostart --remove\n"
        "[Unit]\n"
        "Description=Virtual machines of vmm\n"
        f"{network}"
        "\n[Service]\n"
        "Type=exec\n"  # the boot does not wait for machines that start with a delay
        "RemainAfterExit=yes\n"
        "SuccessExitStatus=1\n"  # systemd would kill all processes of a failed unit, including machines that started
        f"{variables}"
        f"ExecStart=:{call} host autostart --start-machines\n"
        f"ExecStop=:{call} host autostart --stop-machines\n"
        f"TimeoutStopSec={STOP_SECONDS}\n"
        "\n[Install]\n"
        f"WantedBy={target}\n"
    )


def _quoted(word: str) -> str:
    """A word quoted for systemd, with `%` escaped; the colons in the unit keep systemd from expanding variables."""
    if any(not one.isprintable() for one in word):
        raise InvalidSpec("contains a character that a unit cannot express", path=word)
    for plain, escaped in (("\\", "\\\\"), ('"', '\\"'), ("%", "%%")):
        word = word.replace(plain, escaped)
    return f'"{word}"'


def kept_environment() -> dict[str, str]:
    """The environment variables that decide where machines are; the unit must set them too."""
    kept = {name: os.environ[name] for name in KEPT_VARIABLES if os.environ.get(name)}
    return kept | in_use().environment()


def install(scope: Scope, command: Sequence[str]) -> Result:
    """Put the unit in place and enable it at boot. Idempotent.

    Raises Unsupported (no systemd), AccessDenied (system scope without root), InvalidSpec (systemd rejects the unit).
    """
    if shutil.which("systemctl", path=program_path()) is None:
        raise Unsupported(
            "systemd is not installed",
            hint="have this system's service manager run the commands that vmm host autostart --print shows",
        )
    path = unit_path(scope)
    content = unit_text(scope, command, kept_environment())
    _check_rights(scope, path)
    before = _content(path)
    if before != content:
        _write_checked(scope, path, content)
    try:
        _systemctl(scope, "enable", UNIT)
    except VmmError:
        if before is None:
            with contextlib.suppress(OSError):
                os.unlink(path)
        raise
    _reload(scope)
    return Result(path, before != content, tuple(_notes(scope)))


def remove(scope: Scope) -> Result:
    """Disable and remove the unit; running machines continue. Idempotent. Raises AccessDenied."""
    path = unit_path(scope)
    if not os.path.lexists(path):
        return Result(path, False)
    _check_rights(scope, path)
    if shutil.which("systemctl", path=program_path()) is not None:
        _systemctl(scope, "disable", UNIT)
    try:
        os.unlink(path)
    except OSError as error:
        raise of_os_error(error, "remove the unit", path=path) from error
    _reload(scope)
    notes = ("the machines that the unit started keep running until you run systemctl stop",)
    return Result(path, True, notes if _runs(scope) else ())


def is_installed(scope: Scope) -> bool:
    """True if the unit is in place."""
    return os.path.lexists(unit_path(scope))


# -- systemd ------------------------------------------------------------------------------------------------------


def verify(path: str, scope: Scope) -> str | None:
    """What systemd-analyze complains about in a unit; None if nothing, or if systemd-analyze is not installed."""
    program = shutil.which("systemd-analyze", path=program_path())
    if program is None:
        return None
    try:
        done = _run([program, f"--{scope}", "verify", "--man=no", path])
    except subprocess.TimeoutExpired:
        return None
    # It also reads the units that ours depends on, and reports warnings about them.
    said = [line for line in (done.stdout + done.stderr).splitlines() if os.path.basename(path) in line]
    if done.returncode == 0:
        return None
    return "; ".join(said) or None


def _write_checked(scope: Scope, path: str, content: str) -> None:
    folder = os.path.dirname(path)
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="vmm-unit-") as scratch:
            draft = os.path.join(scratch, UNIT)
            with open(draft, "w", encoding="utf-8") as file:
                file.write(content)
            problem = verify(draft, scope)
            if problem is not None:
                raise InvalidSpec(f"systemd refuses the unit: {problem}", path=path)
        part = unfinished.part_of(path)
        unfinished.sweep(folder)
        try:
            with open(part, "w", encoding="utf-8") as file:
                file.write(content)
                os.fchmod(file.fileno(), _UNIT_MODE)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(part)
            raise
    except OSError as error:
        raise of_os_error(error, "write the unit", path=path) from error


def _check_rights(scope: Scope, path: str) -> None:
    if scope == "system" and os.geteuid() != 0:
        raise AccessDenied(
            "only root can have machines start with the system",
            path=path,
            hint="sudo vmm host autostart; or --user, for your own machines",
        )


def _content(path: str) -> str | None:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return None


def _runs(scope: Scope) -> bool:
    """True if a service manager of that scope is running."""
    if not os.path.isdir(_SYSTEMD_RUNS):
        return False
    return scope == "system" or os.path.exists(f"{os.environ.get('XDG_RUNTIME_DIR', '/none')}/systemd/private")


def _systemctl(scope: Scope, *words: str) -> None:
    program = shutil.which("systemctl", path=program_path())
    assert program is not None
    try:
        done = _run([program, f"--{scope}", "--no-ask-password", *words])
    except subprocess.TimeoutExpired as error:
        raise VmmError(f"systemctl {words[0]} did not end within {_SECONDS:.0f} s", path=UNIT) from error
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        reason = lines[-1].strip() if lines else f"exit code {done.returncode}"
        raise VmmError(f"systemctl {words[0]} failed: {reason}", path=UNIT)


def _reload(scope: Scope) -> None:
    """Make a running service manager reload its units."""
    if _runs(scope):
        _systemctl(scope, "daemon-reload")


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=_SECONDS,
        check=False,
    )


def _notes(scope: Scope) -> list[str]:
    notes = []
    if not _runs(scope):
        notes.append("systemd is not running: machines will start once it is")
    if scope == "user":
        try:
            name = pwd.getpwuid(os.geteuid()).pw_name
        except KeyError:
            name = str(os.geteuid())
        if not os.path.exists(os.path.join(_LINGER_FOLDER, name)):
            notes.append("machines start when you log in; to start them with the host: loginctl enable-linger")
    return notes
