# SPDX-License-Identifier: Apache-2.0
"""`backup list`, `show` and `status`: what is in a repository, and whether there is a recent whole night.

Decides how nights are listed and when `status` is not content. Reads files' sizes, not their content.
"""

from __future__ import annotations

import re
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Any

import click

from vhdkit import InvalidArgument, NotFound
from vhdkit.backup.choosing import Wanted
from vhdkit.backup.manifest import How
from vhdkit.backup.reports import (
    DiskReport,
    NightDetails,
    NightReport,
    SavedStatus,
    report_machines,
    report_night,
    report_nights,
)
from vhdkit.backup.reports_of_all import report_statuses
from vhdkit.backup.repository import MachineFolder, Repository, open_repository
from vhdkit.cli.backup import repository_options
from vhdkit.cli.common import Common, epilog
from vhdkit.cli.failure import EXIT_FAILED
from vhdkit.cli.output import columns, count, exact_size, print_json, print_pairs, print_text
from vhdkit.errors import printable
from vhdkit.units import format_size

_AGE = re.compile(r"(\d{1,6})(m|h|d|w)")
_UNIT_SECONDS = {"m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}
_EXIT_DAMAGED = 3


@click.command("list", epilog=epilog("vhdkit backup list /srv/backup", "vhdkit backup list /srv/backup web"))
@repository_options
@click.argument("machine", required=False)
def list_command(repo: str, machine: str | None, common: Common) -> None:
    """List the machines of a repository, or the nights of one MACHINE, oldest first.

    A night's size is what its images added; an unchanged disk adds none. Times are those that the clocks showed when
    the night was taken.

    \b
    With --json: {"repository", "machines": [{"id", "name", "nights", "newest",
      "data_bytes"}]}, or with MACHINE {"repository", "machine", "name", "nights":
      [{"night", "taken", "utc_offset", "consistency", "data_bytes", "disks",
      "protected", "leased", "problems"}]}.
    """
    with open_repository(repo) as repository:
        if machine is None:
            _list_machines(repository, common)
            return
        with repository.machine(repository.find_machine(machine)) as found:
            nights = report_nights(found)
            if common.json:
                rows = [asdict(one) for one in nights]
                print_json({"repository": repository.path, "machine": found.id, "name": found.name, "nights": rows})
            elif not nights:
                print_text(f"{printable(found.name)} has no nights")
            else:
                for line in columns(
                    [("NIGHT", "TAKEN", "CONSISTENCY", "SIZE", ""), *map(_night_row, nights)], "rllrl"
                ):
                    print_text(printable(line))


def _list_machines(repository: Repository, common: Common) -> None:
    machines = report_machines(repository)
    if common.json:
        print_json({"repository": repository.path, "machines": [asdict(one) for one in machines]})
        return
    if not machines:
        print_text("no machine has been backed up here yet")
        return
    lines = [("MACHINE", "NIGHTS", "NEWEST", "SIZE", "ID")]
    for one in machines:
        name, newest = one.name or f"({one.problem})", one.newest or "none"
        lines.append((name, str(one.nights), newest, format_size(one.data_bytes), one.id))
    for line in columns(lines, "lrlrl"):
        print_text(printable(line))


def _night_row(one: NightReport) -> tuple[str, str, str, str, str]:
    size = "" if one.data_bytes is None else format_size(one.data_bytes)
    return str(one.night), one.local_time or "unknown", one.consistency or "", size, one.notes


@click.command("show", epilog=epilog("vhdkit backup show /srv/backup web", "vhdkit backup show /srv/backup web@18"))
@repository_options
@click.argument("night", metavar="NAME[@NIGHT|@TIME]")
def show_command(repo: str, night: str, common: Common) -> None:
    """Show a night, by default the newest: its disks, where their images are, and everything else that it has.

    \b
    With --json: {"repository", "machine", "night", "manifest", "problems",
      "disks": [{"id", "path", "chain"}]}
    """
    wanted = Wanted.of_word(night)
    with open_repository(repo) as repository, repository.machine(repository.find_machine(wanted.machine)) as machine:
        found = report_night(machine, wanted.at)
        if common.json:
            print_json(_shown_document(repository, machine, found))
            return
        print_text((f"night {found.night.night}", "bold"), f" of {printable(machine.name)}")
        print_pairs(_pairs(found))
        for disk in found.disks:
            print_text(("disk ", "bold"), printable(disk.id))
            print_pairs(_disk_pairs(disk))


def _shown_document(repository: Repository, machine: MachineFolder, found: NightDetails) -> dict[str, Any]:
    import json

    return {
        "repository": repository.path,
        "machine": machine.id,
        "night": found.night.night,
        "manifest": json.loads(found.manifest),
        "problems": list(found.night.problems),
        "disks": [{"id": one.id, "path": one.path, "chain": one.chain} for one in found.disks],
    }


def _pairs(found: NightDetails) -> list[tuple[str, str]]:
    return [
        ("taken", f"{found.night.local_time} ({found.zone})"),
        ("finished", found.finished),
        ("consistency", found.night.consistency or ""),
        ("id", found.id),
        ("by", found.tool),
        ("protected", "yes" if found.night.protected else ""),
        ("files", ", ".join(f"{name} ({format_size(size)})" for name, size in found.files.items())),
        ("warnings", "; ".join(found.warnings)),
        ("damage", "; ".join(found.night.problems)),
    ]


def _disk_pairs(disk: DiskReport) -> list[tuple[str, str]]:
    return [
        ("image", disk.path),
        ("size", exact_size(disk.virtual_size_bytes)),
        ("added", "nothing, it is unchanged" if disk.how == How.SAME else format_size(disk.added_bytes)),
        ("how", disk.how),
        ("chain", "cannot be followed" if disk.chain is None else count(disk.chain, "image")),
        ("slot", disk.slot),
        ("serial", disk.serial),
    ]


@click.command(
    "status",
    epilog=epilog(
        "vhdkit backup status /srv/backup",
        "vhdkit backup status /srv/backup web --max-age 26h",
        codes="Exit code 0 when every machine has a recent whole night, 1 when one has not, 3 when one has damage.",
    ),
)
@repository_options
@click.argument("machines", metavar="[MACHINE]...", nargs=-1)
@click.option("--max-age", default="26h", show_default=True, metavar="AGE",
              help="How old the newest whole night may be: 90m, 26h, 8d, 5w.")  # fmt: skip
@click.pass_context
def status_command(context: click.Context, repo: str, machines: tuple[str, ...], max_age: str, common: Common) -> None:
    """Say for each machine whether its newest whole night is recent, for people and for monitoring.

    A night is whole if all of its images are there and nothing in them was found damaged by `vhdkit backup verify`.

    \b
    With --json: {"repository", "machines": [{"id", "name", "is_good",
      "newest_whole", "taken", "age_seconds", "damaged_nights", "verified",
      "leases", "unfinished_prune", "problem"}]}
    """
    limit, now = _age_of(max_age), datetime.now(UTC)
    with open_repository(repo) as repository:
        found = report_statuses(repository, machines, since=now - limit, now=now)
        if not found:
            raise NotFound("no machine has been backed up here yet", path=repository.path)
    if common.json:
        print_json({"repository": repository.path, "machines": [asdict(one) for one in found]})
    elif not common.quiet:
        for one in found:
            _print_status(one)
    damaged = any(one.is_damaged for one in found)
    context.exit(_EXIT_DAMAGED if damaged else 0 if all(one.is_good for one in found) else EXIT_FAILED)


def _age_of(text: str) -> timedelta:
    found = _AGE.fullmatch(text)
    if found is None:
        raise InvalidArgument(f"--max-age {printable(text)!r} is not an age", hint="write 90m, 26h, 8d or 5w")
    return timedelta(seconds=int(found[1]) * _UNIT_SECONDS[found[2]])


def _print_status(one: SavedStatus) -> None:
    word = ("good", "bold green") if one.is_good and not one.is_damaged else ("bad ", "bold red")
    print_text(word, f"  {printable(one.name)}: {one.words}")
    for note in one.notes:
        print_text(f"      {printable(note)}")
