# SPDX-License-Identifier: Apache-2.0
"""`backup list`, `show` and `status`: what is in a repository, and whether there is a recent whole night.

Decides how this is shown; what is reported is decided in `vhdkit.backups`.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import UTC, datetime, timedelta

import click

from vhdkit import backups
from vmm.cli.common import AGE, epilog, format_size, output_options, print_json, print_line, print_pairs, print_table
from vmm.model.errors import NotFound

_EXIT_LATE, _EXIT_DAMAGED = 1, 3


@click.command("list", epilog=epilog("vmm backup list /srv/backup", "vmm backup list /srv/backup web"))
@click.argument("repo")
@click.argument("machine", required=False)
@output_options
def list_command(repo: str, machine: str | None, as_json: bool, quiet: bool) -> None:
    """List the machines of the repository REPO, or the nights of one MACHINE, oldest first.

    A night's size is what its images added; an unchanged disk adds none. Times are those that the clocks showed when
    the night was taken.
    """
    with backups.open_repository(repo) as repository:
        if machine is None:
            machines = backups.report_machines(repository)
            if as_json:
                print_json({"repository": repository.path, "machines": [asdict(one) for one in machines]})
            elif not machines and not quiet:
                print_line("no machine has been backed up here yet")
            elif not quiet:
                print_table(("MACHINE", "NIGHTS", "NEWEST", "SIZE", "ID"), list(map(_machine_row, machines)))
            return
        with repository.machine(repository.find_machine(machine)) as found:
            nights = backups.report_nights(found)
            if as_json:
                rows = [asdict(one) for one in nights]
                print_json({"repository": repository.path, "machine": found.id, "name": found.name, "nights": rows})
            elif not nights and not quiet:
                print_line(f"{found.name} has no nights")
            elif not quiet:
                print_table(("NIGHT", "TAKEN", "CONSISTENCY", "SIZE", ""), list(map(_night_row, nights)))


def _machine_row(one: backups.MachineReport) -> tuple[str, ...]:
    name = one.name or f"({one.problem})"
    return name, str(one.nights), one.newest or "none", format_size(one.data_bytes), one.id


def _night_row(one: backups.NightReport) -> tuple[str, ...]:
    size = "" if one.data_bytes is None else format_size(one.data_bytes)
    return str(one.night), one.local_time or "unknown", one.consistency or "", size, one.notes


@click.command("show", epilog=epilog("vmm backup show /srv/backup web", "vmm backup show /srv/backup web@18"))
@click.argument("repo")
@click.argument("night", metavar="NAME[@NIGHT|@TIME]")
@output_options
def show_command(repo: str, night: str, as_json: bool, quiet: bool) -> None:
    """Show a night, by default the newest: its disks, where their images are, and everything else that it has."""
    wanted = backups.Wanted.of_word(night)
    with (
        backups.open_repository(repo) as repository,
        repository.machine(repository.find_machine(wanted.machine)) as machine,
    ):
        found = backups.report_night(machine, wanted.at)
        path, name, machine_id = repository.path, machine.name, machine.id
    if as_json:
        document = {**asdict(found), "manifest": json.loads(found.manifest)}
        print_json({"repository": path, "machine": machine_id, "name": name, **document})
    elif not quiet:
        print_line(f"night {found.night.night} of {name}")
        print_pairs(_pairs(found))
        for disk in found.disks:
            print_line(f"disk {disk.id}")
            print_pairs(_disk_pairs(disk))


def _pairs(found: backups.NightDetails) -> list[tuple[str, str]]:
    return [
        ("  taken", f"{found.night.local_time} ({found.zone})"),
        ("  finished", found.finished),
        ("  consistency", found.night.consistency or ""),
        ("  id", found.id),
        ("  by", found.tool),
        ("  protected", "yes" if found.night.protected else ""),
        ("  files", ", ".join(f"{name} ({format_size(size)})" for name, size in found.files.items())),
        ("  warnings", "; ".join(found.warnings)),
        ("  damage", "; ".join(found.night.problems)),
    ]


def _disk_pairs(disk: backups.DiskReport) -> list[tuple[str, str]]:
    images = "1 image" if disk.chain == 1 else f"{disk.chain} images"
    return [
        ("  image", disk.path),
        ("  size", format_size(disk.virtual_size_bytes)),
        ("  added", "nothing, it is unchanged" if disk.how == "same" else format_size(disk.added_bytes)),
        ("  how", disk.how),
        ("  chain", "cannot be followed" if disk.chain is None else images),
        ("  slot", disk.slot),
        ("  serial", disk.serial),
    ]


@click.command(
    "status",
    epilog=epilog(
        "vmm backup status", "vmm backup status /srv/backup", "vmm backup status /srv/backup web --max-age 26h"
    ),
)
@click.argument("repo", required=False)
@click.argument("machines", metavar="[MACHINE]...", nargs=-1)
@click.option("--schedule", "schedules", multiple=True, help="Only this schedule. Repeatable.")
@click.option("--max-age", type=AGE, metavar="AGE",
              help="With REPO: how old the newest whole night may be: 90m, 26h, 8d, 5w. By default 26h.")  # fmt: skip
@output_options
@click.pass_context
def status_command(
    context: click.Context,
    repo: str | None,
    machines: tuple[str, ...],
    schedules: tuple[str, ...],
    max_age: timedelta | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Say whether the backups of last night worked: for each machine of every schedule whether it has the whole night
    that it should have; or, with REPO, for each machine of REPO whether its newest whole night is recent.

    A night is whole if all of its images are there and nothing in them was found damaged by `vmm backup verify`. A
    timer that never ran and a host that was off are seen, too: only the nights count.

    Exits with 0 if everything is as it should be, 1 if a night is missing or too old, or this cannot be judged, and 3
    if a night is damaged.
    """
    now = datetime.now(UTC)
    if repo is None:
        if max_age is not None:
            raise click.UsageError("--max-age needs REPO; a schedule has --late-after")
        context.exit(_status_of_schedules(now, schedules, as_json=as_json, quiet=quiet))
    if schedules:
        raise click.UsageError("give REPO, or --schedule")
    since = now - (timedelta(hours=26) if max_age is None else max_age)
    with backups.open_repository(repo) as repository:
        found = backups.report_statuses(repository, machines, since=since, now=now)
        if not found:
            raise NotFound("no machine has been backed up here yet", path=repository.path)
        path = repository.path
    if as_json:
        print_json({"repository": path, "machines": [asdict(one) for one in found]})
    elif not quiet:
        for one in found:
            print_line(f"{'good' if one.is_good and not one.is_damaged else 'bad '}  {one.name}: {one.words}")
            for note in one.notes:
                print_line(f"      {note}")
    if any(one.is_damaged for one in found):
        context.exit(_EXIT_DAMAGED)
    context.exit(0 if all(one.is_good for one in found) else _EXIT_LATE)


def _status_of_schedules(now: datetime, names: tuple[str, ...], *, as_json: bool, quiet: bool) -> int:
    """Show the schedules; returns the exit code."""
    from vmm.api import scheduled_backups
    from vmm.cli.backup_schedule import print_status, status_document

    found = scheduled_backups.status(now, names)
    if not found:
        raise NotFound("there are no schedules", hint="name a repository, or add one: vmm backup schedule add --help")
    if as_json:
        print_json({"schedules": [status_document(one) for one in found]})
    elif not quiet:
        for one in found:
            print_status(one)
    if any(one.is_damaged for one in found):
        return _EXIT_DAMAGED
    return 0 if all(one.is_good for one in found) else _EXIT_LATE
