# SPDX-License-Identifier: Apache-2.0
"""Units of systemd: how their text is quoted, how they are checked, put in place, enabled, and taken away.

Decides where units are installed: for the whole system when root installs them, otherwise for the user's own service
manager. Units are checked by systemd-analyze before they are put in place. Must not know what they do (`autostart`,
`vmm.schedule.timer`).

Sources: systemd.unit(5), systemd.exec(5), "COMMAND LINES" for the quoting, loginctl(1).
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from vmm.host.kernel import program_path
from vmm.model import unfinished
from vmm.model.errors import AccessDenied, InvalidSpec, VmmError, of_os_error
from vmm.model.folders import in_use

Scope = Literal["system", "user"]
SYSTEM_FOLDER = "/etc/systemd/system"
KEPT_VARIABLES = ("VMM_HOME", "VMM_RUNTIME")
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


def unit_path(scope: Scope, unit: str) -> str:
    """The path of a unit."""
    if scope == "system":
        return os.path.join(SYSTEM_FOLDER, unit)
    base = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return os.path.join(base, "systemd", "user", unit)


def call_words(command: Sequence[str]) -> str:
    """A command line for a unit. Raises InvalidSpec for one that a unit cannot express."""
    if not command or not os.path.isabs(command[0]):
        raise InvalidSpec("a unit needs the absolute path of the command", path=command[0] if command else "")
    return " ".join(map(quoted, command))


def environment_lines(environment: Mapping[str, str]) -> str:
    """The lines of a unit that set environment variables."""
    return "".join(f"Environment={quoted(f'{name}={value}')}\n" for name, value in sorted(environment.items()))


def quoted(word: str) -> str:
    """A word quoted for systemd, with `%` escaped. A colon before the command in a unit keeps systemd from expanding
    variables. Raises InvalidSpec.
    """
    if any(not one.isprintable() for one in word):
        raise InvalidSpec("contains a character that a unit cannot express", path=word)
    for plain, escaped in (("\\", "\\\\"), ('"', '\\"'), ("%", "%%")):
        word = word.replace(plain, escaped)
    return f'"{word}"'


def kept_environment() -> dict[str, str]:
    """The environment variables that decide where machines are; a unit must set them too."""
    kept = {name: os.environ[name] for name in KEPT_VARIABLES if os.environ.get(name)}
    return kept | in_use().environment()


def shell_words(command: Sequence[str]) -> str:
    """A command for other schedulers, such as cron, quoted for a shell: with the same variables as a unit."""
    kept = [f"{name}={value}" for name, value in sorted(kept_environment().items())]
    return shlex.join(["env", *kept, *command] if kept else command)


def is_installed() -> bool:
    """True if this system has systemd."""
    return shutil.which("systemctl", path=program_path()) is not None


def check_rights(scope: Scope, path: str, what: str, hint: str) -> None:
    """Raise AccessDenied if this user may not install units there; `what` completes "only root can"."""
    if scope == "system" and os.geteuid() != 0:
        raise AccessDenied(f"only root can {what}", path=path, hint=hint)


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


def put_in_place(scope: Scope, units: Mapping[str, str], enabled: str) -> Result:
    """Write units, by name, enable the one called `enabled`, and have a running service manager read them. Idempotent.

    If systemd does not enable it, they are as before. Raises InvalidSpec for a unit
    that systemd refuses, AccessDenied, NoSpace, VmmError.
    """
    places = {name: unit_path(scope, name) for name in units}
    before = {name: _content(path) for name, path in places.items()}
    changed = {name: text for name, text in units.items() if before[name] != text}
    _check(scope, changed, units)
    for name, text in changed.items():
        _write(places[name], text)
    try:
        systemctl(scope, "enable", enabled)
    except VmmError:
        for name, path in places.items():
            old = before[name]
            with contextlib.suppress(OSError, VmmError):
                if old is None:
                    os.unlink(path)
                elif name in changed:
                    _write(path, old)
        raise
    reload(scope)
    return Result(places[enabled], bool(changed))


def take_away(scope: Scope, units: Sequence[str], enabled: str) -> bool:
    """Disable and remove units; False if none was there. Raises AccessDenied, VmmError."""
    there = [path for path in (unit_path(scope, one) for one in units) if os.path.lexists(path)]
    if not there:
        return False
    if is_installed():
        systemctl(scope, "disable", enabled)
    for path in there:
        try:
            os.unlink(path)
        except OSError as error:
            raise of_os_error(error, "remove the unit", path=path) from error
    reload(scope)
    return True


def _check(scope: Scope, changed: Mapping[str, str], units: Mapping[str, str]) -> None:
    """Have systemd-analyze read the units that changed, beside those that they name. Raises InvalidSpec."""
    if not changed:
        return
    with tempfile.TemporaryDirectory(prefix="vmm-unit-") as scratch:
        for name, text in units.items():
            with open(os.path.join(scratch, name), "w", encoding="utf-8") as file:
                file.write(text)
        for name in changed:
            problem = verify(os.path.join(scratch, name), scope)
            if problem is not None:
                raise InvalidSpec(f"systemd refuses the unit: {problem}", path=unit_path(scope, name))


def _write(path: str, content: str) -> None:
    folder = os.path.dirname(path)
    try:
        os.makedirs(folder, exist_ok=True)
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


def _content(path: str) -> str | None:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return None


def runs(scope: Scope) -> bool:
    """True if a service manager of that scope is running."""
    if not os.path.isdir(_SYSTEMD_RUNS):
        return False
    return scope == "system" or os.path.exists(f"{os.environ.get('XDG_RUNTIME_DIR', '/none')}/systemd/private")


def systemctl(scope: Scope, *words: str) -> None:
    """Run systemctl. Raises VmmError with its reason."""
    program = shutil.which("systemctl", path=program_path())
    assert program is not None
    try:
        done = _run([program, f"--{scope}", "--no-ask-password", *words])
    except subprocess.TimeoutExpired as error:
        raise VmmError(f"systemctl {words[0]} did not end within {_SECONDS:.0f} s", path=words[-1]) from error
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        reason = lines[-1].strip() if lines else f"exit code {done.returncode}"
        raise VmmError(f"systemctl {words[0]} failed: {reason}", path=words[-1])


def reload(scope: Scope) -> None:
    """Make a running service manager reload its units."""
    if runs(scope):
        systemctl(scope, "daemon-reload")


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


def lingers() -> bool:
    """True if this user's service manager runs as long as the host, not only while the user is logged in."""
    try:
        name = pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        name = str(os.geteuid())
    return os.path.exists(os.path.join(_LINGER_FOLDER, name))
