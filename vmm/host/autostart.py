# SPDX-License-Identifier: Apache-2.0
"""Machines that start with the host: the systemd unit, its installation and its removal.

Decides the content of the unit. The unit runs the command line, which carries out the automatic start and stop actions
of every machine (`vmm host autostart --start-machines`, `--stop-machines`); this module knows nothing about machines.

The unit is stopped by a command and not by killing its processes, so that machines are saved or shut down first;
systemd then kills whatever is left.

Source: systemd.service(5).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace

from vmm.host import systemd
from vmm.host.systemd import Result, Scope
from vmm.model.errors import Unsupported

UNIT = "vmm-machines.service"
STOP_SECONDS = 900  # enough to save the memory of all machines
_AS_USER = "sudo vmm host autostart; or --user, for your own machines"


def unit_text(scope: Scope, command: Sequence[str], environment: Mapping[str, str]) -> str:
    """The content of the unit: `command` runs vmm, `environment` is set for it. Pure.

    Raises InvalidSpec for a command that a unit cannot express.
    """
    call = systemd.call_words(command)
    variables = systemd.environment_lines(environment)
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


def install(scope: Scope, command: Sequence[str]) -> Result:
    """Put the unit in place and enable it at boot. Idempotent.

    Raises Unsupported (no systemd), AccessDenied (system scope without root), InvalidSpec (systemd rejects the unit).
    """
    if not systemd.is_installed():
        raise Unsupported(
            "systemd is not installed",
            hint="have this system's service manager run the commands that vmm host autostart --print shows",
        )
    content = unit_text(scope, command, systemd.kept_environment())
    _check_rights(scope)
    return replace(systemd.put_in_place(scope, {UNIT: content}, UNIT), notes=tuple(_notes(scope)))


def remove(scope: Scope) -> Result:
    """Disable and remove the unit; running machines continue. Idempotent. Raises AccessDenied."""
    path = systemd.unit_path(scope, UNIT)
    if not os.path.lexists(path):
        return Result(path, False)
    _check_rights(scope)
    systemd.take_away(scope, [UNIT], UNIT)
    notes = ("the machines that the unit started keep running until you run systemctl stop",)
    return Result(path, True, notes if systemd.runs(scope) else ())


def is_installed(scope: Scope) -> bool:
    """True if the unit is in place."""
    return os.path.lexists(systemd.unit_path(scope, UNIT))


def _check_rights(scope: Scope) -> None:
    systemd.check_rights(scope, systemd.unit_path(scope, UNIT), "have machines start with the system", _AS_USER)


def _notes(scope: Scope) -> list[str]:
    notes = []
    if not systemd.runs(scope):
        notes.append("systemd is not running: machines will start once it is")
    if scope == "user" and not systemd.lingers():
        notes.append("machines start when you log in; to start them with the host: loginctl enable-linger")
    return notes
