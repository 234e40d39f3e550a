# SPDX-License-Identifier: Apache-2.0
"""`backup schedule add`, `list`, `show`, `run` and `remove`: backups at set times.

Decides how schedules are given and described. When they are due is decided in `vmm.schedule`, what is done then in
`vmm.api.scheduled_backups`.
"""

from __future__ import annotations

import contextlib
import shlex
import signal
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Any

import click

from vmm.api import scheduled_backups
from vmm.api.known_repositories import NEW
from vmm.api.scheduled_backups import ScheduleStatus
from vmm.cli.backup_prune import RULES, keep_options
from vmm.cli.common import (
    AGE,
    SIZE,
    AnyType,
    VerbGroup,
    confirm,
    epilog,
    output_options,
    print_aside,
    print_json,
    print_line,
    print_pairs,
    print_table,
)
from vmm.cli.host import own_command
from vmm.cli.log import event_document, event_words
from vmm.host import systemd
from vmm.model.errors import VmmError, printable
from vmm.model.events import read_events
from vmm.schedule import running, store, timer
from vmm.schedule.calendar import zone_of
from vmm.schedule.definition import Schedule, Words
from vmm.schedule.places import schedule_paths
from vmm.schedule.record import LastRun

_EVENTS_SHOWN = 10


class CommandType(AnyType):
    """A program and its arguments, quoted as for a shell; no shell runs it."""

    name = "command"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Words:
        """The argument vector."""
        try:
            words = tuple(shlex.split(str(value)))
        except ValueError as error:
            self.fail(f"{value!r} is not a command: {error}", param, ctx)
        if not words:
            self.fail("a hook is a program and its arguments", param, ctx)
        return words


_HOOK = CommandType()
_scope_option = click.option(
    "--user/--system", "for_user", default=None, help="For your user, or for the host (root only)."
)


@click.group("schedule", cls=VerbGroup)
def schedule_command() -> None:
    """Save machines at set times, and say whether that worked.

    A schedule is a file of this host, and a systemd timer that runs `vmm backup schedule run`. `vmm backup status`
    says for every machine of every schedule whether it has the night that it should have.
    """


@schedule_command.command(
    "add",
    epilog=epilog(
        "vmm backup schedule add nightly web /srv/backup --when 22:30 --keep-daily 7",
        "vmm backup schedule add all --all /srv/backup --when 'Sat 05:00' --jobs 4",
        "vmm backup schedule add n web /mnt/n --when 22:30 --before 'mount /mnt/n'",
    ),
)
@click.argument("schedule")
@click.argument("machines", metavar="MACHINE...", nargs=-1)
@click.argument("repo")
@click.option("--when", required=True, metavar="TIME",
              help="22:30, 'Mon..Fri 22:30', '*-*-01 05:00' (the 1st of each month), '*:00' or hourly: as systemd"
                   " understands it, without years and seconds.")  # fmt: skip
@click.option("--zone", default="UTC", show_default=True, help="The time zone of --when, and in which days begin.")
@click.option("--all", "all_machines", is_flag=True, help="Save all machines that there are at the time.")
@click.option("--jobs", type=click.IntRange(1, 64), default=1, show_default=True, metavar="N",
              help="How many machines are saved at once.")  # fmt: skip
@keep_options
@click.option("--sample", "percent", type=click.IntRange(1, 100), metavar="PERCENT",
              help="Then verify a random part of each image.")  # fmt: skip
@click.option("--consistent", is_flag=True, help="As of `vmm backup run`.")
@click.option("--with-memory", is_flag=True, help="As of `vmm backup run`.")
@click.option("--compare", is_flag=True, help="As of `vmm backup run`.")
@click.option("--full-every", type=click.IntRange(1), metavar="N", help="As of `vmm backup run`.")
@click.option("--keep-free", type=SIZE, default=0, metavar="SIZE", help="As of `vmm backup run`.")
@click.option("--limit", type=SIZE, metavar="RATE", help="As of `vmm backup run`, for each machine.")
@click.option("--before", type=_HOOK, multiple=True, metavar="COMMAND",
              help="Run this first; if it fails, nothing is saved. Repeatable. No shell runs it.")  # fmt: skip
@click.option("--after", type=_HOOK, multiple=True, metavar="COMMAND",
              help="Run this last, whatever happened. Repeatable.")  # fmt: skip
@click.option("--on-failure", type=_HOOK, multiple=True, metavar="COMMAND",
              help="Run this if anything failed; the reason is in $VMM_REASON. Repeatable.")  # fmt: skip
@click.option("--late-after", type=AGE, metavar="AGE",
              help="How long after TIME a night may be missing before it is late; by default 6h, or half of the time"
                   " between two runs.")  # fmt: skip
@click.option("--replace", is_flag=True, help="Replace the schedule of that name; what its runs left is kept.")
@click.option("--no-timer", is_flag=True, help="Install no timer: another scheduler runs it.")
@_scope_option
@output_options
def add_command(
    schedule: str,
    machines: tuple[str, ...],
    repo: str,
    all_machines: bool,
    when: str,
    zone: str,
    jobs: int,
    percent: int | None,
    before: tuple[Words, ...],
    after: tuple[Words, ...],
    on_failure: tuple[Words, ...],
    late_after: timedelta | None,
    replace: bool,
    no_timer: bool,
    for_user: bool | None,
    as_json: bool,
    quiet: bool,
    **more: Any,
) -> None:
    """Add the schedule SCHEDULE: save each MACHINE into the repository REPO whenever TIME comes.

    After each machine that was saved, its nights are pruned, if there is a --keep rule, and verified, if there is
    --sample. A machine that fails does not stop the others. A time that was missed because the host was off is made up
    for when it is on again; one at which the last run is still going is skipped, and reported.
    """
    if bool(machines) == all_machines:
        raise click.UsageError("name the machines, or give --all")
    now = datetime.now(UTC)
    keep = {rule: more[f"keep_{rule}"] for rule in RULES if more[f"keep_{rule}"]}
    work = {
        "machines": machines,
        "repository": repo,
        "consistent": more["consistent"],
        "with_memory": more["with_memory"],
        "compare": more["compare"],
        "full_every": more["full_every"],
        "keep_free_bytes": more["keep_free"],
        "max_rate_bytes": more["limit"],
        "keep": keep,
        "sample_percent": percent,
    }
    before_it = store.load(schedule) if replace and schedule in store.names() else None
    made = scheduled_backups.make_backup_schedule(
        work,
        before_it,
        name=schedule,
        when=when,
        zone=zone,
        created=now if before_it is None else before_it.created,
        jobs=jobs,
        before=before,
        after=after,
        on_failure=on_failure,
        late_after_seconds=None if late_after is None else int(late_after.total_seconds()),
    )
    path, notes = _add(made, before_it, None if no_timer else _scope(for_user))
    if (warning := made.calendar.warning(now)) is not None:
        notes.append(warning)
    if as_json:
        print_json({"schedule": made.model_dump(mode="json"), "timer": path, "notes": notes})
        return
    if not quiet:
        print_line(f"{schedule}: next {_shown(made.calendar.next_due(now), zone)}")
    for note in notes:
        print_aside(f"vmm: note: {note}")


def _scope(for_user: bool | None) -> systemd.Scope:
    return systemd.default_scope() if for_user is None else "user" if for_user else "system"


def _add(made: Schedule, before: Schedule | None, scope: systemd.Scope | None) -> tuple[str | None, list[str]]:
    """Add the schedule in place of the one `before`, with its timer; returns the timer's path and notes.

    If the timer fails, everything is as before.
    """
    store.add(made, replace=before is not None)
    try:
        if scope is None:
            for one in timer.scopes():
                timer.remove(one, made.name)
            return None, [f"no timer runs it; the command that does: {systemd.shell_words(_call(made.name))}"]
        done = timer.install(scope, made, _call(made.name))
    except BaseException:
        if before is None:
            store.remove(made.name)
        else:
            store.add(before, replace=True)
        raise
    return timer.installed(made.name), list(done.notes)


def _call(name: str) -> list[str]:
    return [*own_command(), "backup", "schedule", "run", name]


@schedule_command.command("list", epilog=epilog("vmm backup schedule list"))
@output_options
def list_command(as_json: bool, quiet: bool) -> None:
    """List the schedules: when each is due next, and whether its last run succeeded."""
    found = scheduled_backups.status(datetime.now(UTC))
    if as_json:
        print_json([status_document(one) for one in found])
    elif not found and not quiet:
        print_line("there are no schedules: `vmm backup schedule add --help` shows how to add one")
    elif not quiet:
        rows = [(one.name, _shown(one.next_due, one.zone), _last_words(one, brief=True), one.repository or "")
                for one in found]  # fmt: skip
        print_table(("SCHEDULE", "NEXT", "LAST RUN", "REPOSITORY"), rows)
        for one in found:
            if one.problem is not None:
                print_aside(f"vmm: {one.problem}")


@schedule_command.command("show", epilog=epilog("vmm backup schedule show nightly"))
@click.argument("schedule")
@output_options
def show_command(schedule: str, as_json: bool, quiet: bool) -> None:
    """Show a schedule, its machines, and what happened lately."""
    made = store.load(schedule)
    [found] = scheduled_backups.status(datetime.now(UTC), [schedule])
    events = read_events(schedule_paths(schedule).events)
    if as_json:
        document = {"schedule": made.model_dump(mode="json"), "status": status_document(found)}
        print_json({**document, "events": [event_document(one) for one in events]})
        return
    if quiet:
        return
    print_pairs(_pairs(made, found))
    print_machines(found)
    for event in events[-_EVENTS_SHOWN:]:
        print_line(event_words(event))


def _pairs(made: Schedule, found: ScheduleStatus) -> list[tuple[str, str]]:
    work = scheduled_backups.work_of(made)
    return [
        ("when", f"{made.when} ({made.zone})"),
        ("next", _shown(found.next_due, made.zone)),
        ("timer", found.timer or "none"),
        ("machines", ", ".join(work.machines) or "all"),
        ("repository", work.repository),
        ("at once", str(made.jobs) if made.jobs > 1 else ""),
        ("keep", ", ".join(f"{rule} {count}" for rule, count in work.keep.items()) or "every night"),
        ("verify", "" if work.sample_percent is None else f"{work.sample_percent} % of each image"),
        *(("before", shlex.join(one)) for one in made.before),
        *(("after", shlex.join(one)) for one in made.after),
        *(("on failure", shlex.join(one)) for one in made.on_failure),
        ("last run", _last_words(found)),
    ]


@schedule_command.command("run", epilog=epilog("vmm backup schedule run nightly"))
@click.argument("schedule")
@click.option(NEW, "accepts_new", is_flag=True,
              help="Accept what is at the path of the repository now, from now on: another repository, or a folder in"
                   " which a new one is made.")  # fmt: skip
@output_options
def run_command(schedule: str, accepts_new: bool, as_json: bool, quiet: bool) -> None:
    """Do now what the schedule is for, as its timer does. Any scheduler, such as cron, may call this.

    The machines are saved in the repository that was found when the schedule was added, or made by its first run. If
    that one is not there, because its disk is not mounted, nothing is saved, and no other repository is made.

    Exits with 0 if everything succeeded, 1 if anything failed, and 5 if the last run is still going: then nothing is
    done, and that is recorded.
    """
    made = store.load(schedule)

    def report(machine: str, problem: str | None) -> None:
        if problem is not None and not as_json:
            print_aside(f"vmm: {machine}: {problem}")
        elif not as_json and not quiet:
            with contextlib.suppress(OSError):  # backups go on without a reader
                click.echo(f"{printable(machine)}: done")

    jobs = scheduled_backups.jobs_of(made, own_command(), accepts_new=accepts_new)
    with _terminable():
        found = running.run(made, jobs, report=report)
    if as_json:
        print_json(_run_document(found))
    elif found.problem is not None:
        print_aside(f"vmm: {schedule}: {found.problem}")
    if not found.is_good:
        click.get_current_context().exit(1)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Within this block SIGTERM, which systemd sends, is a Ctrl-C: commands take back what they began.

    Where Ctrl-C is ignored, as in the background of a script, this process alone ignores it, not its commands.
    """
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    is_ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    if is_ignored:
        signal.signal(signal.SIGINT, lambda number, frame: None)  # a handler is not inherited, unlike SIG_IGN
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        if is_ignored:
            signal.signal(signal.SIGINT, signal.SIG_IGN)


def _run_document(found: LastRun) -> dict[str, Any]:
    document = asdict(found)
    return {**document, **{name: _time(document[name]) for name in ("began", "ended")}}


@schedule_command.command("remove", epilog=epilog("vmm backup schedule remove nightly"))
@click.argument("schedule")
@click.option("--yes", is_flag=True, help="Do not ask.")
@output_options
def remove_command(schedule: str, yes: bool, as_json: bool, quiet: bool) -> None:
    """Remove a schedule, its timer, and the record of its runs. Nights stay."""
    schedule_paths(schedule)
    confirm(f"Remove the schedule {schedule}?", yes=yes)
    removed = [timer.remove(scope, schedule) for scope in timer.scopes()]
    store.remove(schedule)
    if as_json:
        print_json({"schedule": schedule, "had_timer": any(removed)})
    elif not quiet:
        print_line(f"{schedule} is removed")


# -- how a schedule is shown ----------------------------------------------------------------------------------------


def status_document(found: ScheduleStatus) -> dict[str, Any]:
    """A schedule and its machines as JSON."""
    document = asdict(found)
    times = ("next_due", "needed_since", "last_began", "last_ended")
    return {**document, **{name: _time(document[name]) for name in times}, "is_good": found.is_good}


def print_machines(found: ScheduleStatus) -> None:
    """Print a line for each machine of a schedule."""
    for one in found.machines:
        print_line(f"  {one.state:<7}  {one.machine}: {one.words}")


def print_status(found: ScheduleStatus) -> None:
    """Print a schedule with its machines."""
    if found.problem is not None:
        print_line(f"{found.name}: {found.problem}")
        return
    print_line(f"{found.name}: {found.when} ({found.zone}) to {found.repository}; {_last_words(found)}")
    if found.timer is None:
        print_line("  no timer runs it")
    print_machines(found)


def _last_words(found: ScheduleStatus, *, brief: bool = False) -> str:
    if found.last_began is None:
        return "running" if found.is_running else "never run"
    began = _shown(found.last_began, found.zone or "UTC")
    if found.is_running:
        return f"running since {began}"
    reason = "" if brief else f": {found.last_problem}"
    return f"{began}: {'done' if found.last_problem is None else f'failed{reason}'}"


def _shown(moment: datetime | None, zone: str) -> str:
    if moment is None:
        return "-"
    try:
        return f"{moment.astimezone(zone_of(zone)):%a %Y-%m-%d %H:%M} {zone}"
    except VmmError:
        return f"{moment:%a %Y-%m-%d %H:%M} UTC"


def _time(moment: datetime | None) -> str | None:
    return None if moment is None else moment.strftime("%Y-%m-%dT%H:%M:%SZ")
