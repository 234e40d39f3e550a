# SPDX-License-Identifier: Apache-2.0
"""The timer of a schedule: a systemd timer and the service that it starts, their installation and removal.

    vmm-schedule-NAME.timer      OnCalendar= the schedule's times in its zone; Persistent=true: a time that was missed,
                                 because the host was off, is made up for when it is on again
    vmm-schedule-NAME.service    runs the schedule once; systemd starts no second one meanwhile

Decides the text of the units. The command that runs a schedule is given, so cron or a person can call it as well. A
schedule's work is judged by what is there (`vmm backup status`), never by whether its timer exists.

Sources: systemd.timer(5), systemd.service(5).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace

from vmm.host import systemd
from vmm.host.systemd import Result, Scope
from vmm.model import paths
from vmm.model.errors import AlreadyExists
from vmm.schedule.definition import Schedule

_MAX_LINE = 8192
_STOP_SECONDS = 600  # for commands that are interrupted to take back what they began


def units_of(name: str) -> tuple[str, str]:
    """The names of a schedule's timer and of its service."""
    return f"vmm-schedule-{name}.timer", f"vmm-schedule-{name}.service"


def scopes() -> tuple[Scope, ...]:
    """The service managers that may have timers of this user's schedules."""
    return ("system", "user") if os.geteuid() == 0 else ("user",)


def _owner(name: str) -> str:
    """The first line of a schedule's units, which names the state home: several may have a schedule of that name."""
    return f"# Written by: vmm, for the schedule {name} of {systemd.quoted(paths.home())}"


def _is_ours(scope: Scope, name: str) -> bool | None:
    """Whether the units of that name belong to the schedule of this state home; None if there are none."""
    for unit in units_of(name):
        try:
            with open(systemd.unit_path(scope, unit), encoding="utf-8", errors="replace") as file:
                return file.readline(_MAX_LINE).rstrip("\n") == _owner(name)
        except FileNotFoundError:
            continue
        except OSError:
            return False
    return None


def timer_text(schedule: Schedule) -> str:
    """The timer. Pure."""
    return (
        f"{_owner(schedule.name)}\n"
        "[Unit]\n"
        f"Description=When the schedule {schedule.name} of vmm is due\n"
        "\n[Timer]\n"
        f"OnCalendar={schedule.calendar.systemd_words}\n"
        "Persistent=true\n"
        f"Unit={units_of(schedule.name)[1]}\n"
        "\n[Install]\n"
        "WantedBy=timers.target\n"
    )


def service_text(scope: Scope, schedule: Schedule, command: Sequence[str], environment: Mapping[str, str]) -> str:
    """The service: `command` runs the schedule, `environment` is set for it. Pure. Raises InvalidSpec."""
    network = "" if scope == "user" else "Wants=network-online.target\nAfter=network-online.target remote-fs.target\n"
    return (
        f"{_owner(schedule.name)}\n"
        "[Unit]\n"
        f"Description=The schedule {schedule.name} of vmm\n"
        f"{network}"
        "\n[Service]\n"
        "Type=oneshot\n"
        f"{systemd.environment_lines(environment)}"
        f"ExecStart=:{systemd.call_words(command)}\n"
        "KillMode=mixed\n"  # the run interrupts its commands itself
        f"TimeoutStopSec={_STOP_SECONDS}\n"
    )


def install(scope: Scope, schedule: Schedule, command: Sequence[str]) -> Result:
    """Put the units in place and have the timer start with the host, and now if systemd runs. Idempotent.

    Where there is no systemd nothing is written, and a note says which line makes cron run the schedule. Raises
    AccessDenied (system scope without root), AlreadyExists, InvalidSpec.
    """
    timer, service = units_of(schedule.name)
    path = systemd.unit_path(scope, timer)
    if not systemd.is_installed():
        line = systemd.shell_words(command)
        return Result(path, False, (f"systemd is not installed: have cron, or another scheduler, run: {line}",))
    _check_rights(scope, path)
    if _is_ours(scope, schedule.name) is False:
        raise AlreadyExists(
            "is the timer of another schedule of that name, of another VMM_HOME", path=path, hint="choose another name"
        )
    texts = {
        timer: timer_text(schedule),
        service: service_text(scope, schedule, command, systemd.kept_environment()),
    }
    done = systemd.put_in_place(scope, texts, timer)
    notes = []
    if systemd.runs(scope):
        systemd.systemctl(scope, "restart" if done.changed else "start", timer)
    else:
        notes.append("systemd is not running: the timer starts once it is")
    if scope == "user" and not systemd.lingers():
        notes.append("the timer runs while you are logged in; to have it run always: loginctl enable-linger")
    return replace(done, notes=tuple(notes))


def remove(scope: Scope, name: str) -> bool:
    """Stop the timer and remove the units; False if there were none. Raises AccessDenied."""
    timer, service = units_of(name)
    if not _is_ours(scope, name):
        return False
    _check_rights(scope, systemd.unit_path(scope, timer))
    if systemd.is_installed() and systemd.runs(scope):
        systemd.systemctl(scope, "stop", timer)
    return systemd.take_away(scope, [timer, service], timer)


def installed(name: str) -> str | None:
    """The path of the schedule's timer, of the system or of this user; None if there is none."""
    places = [systemd.unit_path(scope, units_of(name)[0]) for scope in scopes() if _is_ours(scope, name)]
    return next((one for one in places if os.path.lexists(one)), None)


def _check_rights(scope: Scope, path: str) -> None:
    systemd.check_rights(
        scope, path, "have a schedule run by the system", "use sudo; or --user, for your own service manager"
    )
