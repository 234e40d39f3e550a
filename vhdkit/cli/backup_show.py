# SPDX-License-Identifier: Apache-2.0
"""`backup list`, `show` and `status`: what is in a repository, and whether there is a recent whole night.

Decides how nights are listed and when `status` is not content. Reads files' sizes, not their content.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Any

import click

from vhdkit import InvalidArgument, NotFound, VhdkitError
from vhdkit.backup.choosing import Wanted, chosen
from vhdkit.backup.documents import time_word
from vhdkit.backup.graph import Images
from vhdkit.backup.leases import NightLease, leased_nights, leases
from vhdkit.backup.manifest import DiskRecord, How, Manifest
from vhdkit.backup.repository import PRUNE_FILE, MachineFolder, Night, Repository, open_repository
from vhdkit.backup.verified import read_verified
from vhdkit.backup.verify import NightResult, known_results
from vhdkit.cli.backup import repository_options
from vhdkit.cli.common import Common, epilog
from vhdkit.cli.failure import EXIT_FAILED
from vhdkit.cli.output import columns, count, exact_size, print_json, print_pairs, print_text
from vhdkit.errors import printable
from vhdkit.units import format_size

_AGE = re.compile(r"(\d{1,6})(m|h|d|w)")
_UNIT_SECONDS = {"m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}
_EXIT_DAMAGED = 3
_CLOCKS_DIFFER = timedelta(minutes=5)  # of two hosts; a night that is more in the future says nothing about its age


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
            nights = found.nights()
            results = {one.number: one for one in known_results(found, nights)}
            leased = leased_nights(leases(repository.root), found.id)
            rows = [
                _night_document(one, results[one.number], leased.get(one.number)) for one in nights if _is_shown(one)
            ]
            if common.json:
                print_json({"repository": repository.path, "machine": found.id, "name": found.name, "nights": rows})
            elif not rows:
                print_text(f"{printable(found.name)} has no nights")
            else:
                for line in columns([("NIGHT", "TAKEN", "CONSISTENCY", "SIZE", ""), *map(_night_row, rows)], "rllrl"):
                    print_text(printable(line))


def _is_shown(night: Night) -> bool:
    return night.manifest is None or not night.manifest.dropped


def _list_machines(repository: Repository, common: Common) -> None:
    rows = []
    for machine_id in repository.machine_ids():
        try:
            with repository.machine(machine_id) as machine:
                rows.append(_machine_document(machine))
        except VhdkitError as error:
            rows.append(
                {"id": machine_id, "name": None, "nights": 0, "newest": None, "data_bytes": 0, "problem": str(error)}
            )
    if common.json:
        print_json({"repository": repository.path, "machines": rows})
        return
    if not rows:
        print_text("no machine has been backed up here yet")
        return
    lines = [("MACHINE", "NIGHTS", "NEWEST", "SIZE", "ID")]
    for one in rows:
        name, newest = one["name"] or f"({one['problem']})", one["newest"] or "none"
        lines.append((name, str(one["nights"]), newest, format_size(one["data_bytes"]), one["id"]))
    for line in columns(lines, "lrlrl"):
        print_text(printable(line))


def _machine_document(machine: MachineFolder) -> dict[str, Any]:
    manifests = [one.manifest for one in machine.nights() if one.manifest is not None]
    live = [one for one in manifests if not one.dropped]
    sizes = {disk.image: disk.data_bytes for one in manifests for disk in one.disks}
    return {
        "id": machine.id,
        "name": machine.name,
        "nights": len(live),
        "newest": _shown_time(live[-1]) if live else None,
        "data_bytes": sum(sizes.values()),
    }


def _shown_time(manifest: Manifest) -> str:
    return f"{manifest.local_time:%Y-%m-%d %H:%M %z}"


def _night_document(night: Night, result: NightResult, lease: NightLease | None) -> dict[str, Any]:
    manifest = night.manifest
    if manifest is None:
        return {"night": night.number, "taken": None, "problems": list(result.problems), "leased": None}
    return {
        "night": night.number,
        "taken": time_word(manifest.taken),
        "local_time": _shown_time(manifest),
        "consistency": manifest.consistency.value,
        "data_bytes": _added(manifest),
        "disks": len(manifest.disks),
        "protected": manifest.protected,
        "leased": None if lease is None else {"id": lease.id, "purpose": lease.purpose},
        "problems": list(result.problems),
    }


def _added(manifest: Manifest) -> int:
    return sum(disk.data_bytes for disk in manifest.disks if disk.how is not How.SAME)


def _night_row(one: dict[str, Any]) -> tuple[str, str, str, str, str]:
    notes = ["protected"] if one.get("protected") else []
    notes += [f"being read by {one['leased']['purpose']}"] if one.get("leased") else []
    notes += [f"damaged: {one['problems'][0]}"] if one["problems"] else []
    taken = one.get("local_time", "unknown")
    size = format_size(one["data_bytes"]) if "data_bytes" in one else ""
    return str(one["night"]), taken, one.get("consistency", ""), size, ", ".join(notes)


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
        nights = machine.nights()
        live = [one.manifest for one in nights if one.manifest is not None and not one.manifest.dropped]
        manifest = chosen(live, wanted.at, machine.name)
        images = Images(one.manifest for one in nights if one.manifest is not None)
        result = next(one for one in known_results(machine, nights) if one.number == manifest.night)
        if common.json:
            print_json(_shown_document(repository, machine, manifest, images, result))
            return
        print_text((f"night {manifest.night}", "bold"), f" of {printable(machine.name)}")
        print_pairs(_pairs(manifest, result))
        for disk in manifest.disks:
            print_text(("disk ", "bold"), printable(disk.disk_id))
            print_pairs(_disk_pairs(machine, disk, images))


def _shown_document(
    repository: Repository, machine: MachineFolder, manifest: Manifest, images: Images, result: NightResult
) -> dict[str, Any]:
    import json

    return {
        "repository": repository.path,
        "machine": machine.id,
        "night": manifest.night,
        "manifest": json.loads(manifest.encoded()),
        "problems": list(result.problems),
        "disks": [
            {"id": disk.disk_id, "path": f"{machine.path}/{disk.image.text}", "chain": _depth(disk, images)}
            for disk in manifest.disks
        ],
    }


def _depth(disk: DiskRecord, images: Images) -> int | None:
    try:
        return len(images.chain(disk.image))
    except VhdkitError:
        return None


def _pairs(manifest: Manifest, result: NightResult) -> list[tuple[str, str]]:
    return [
        ("taken", f"{_shown_time(manifest)} ({manifest.zone})"),
        ("finished", f"{manifest.finished:%Y-%m-%d %H:%M:%S} UTC"),
        ("consistency", manifest.consistency.value),
        ("id", manifest.id),
        ("by", manifest.tool),
        ("protected", "yes" if manifest.protected else ""),
        ("files", ", ".join(f"{one.name} ({format_size(one.size_bytes)})" for one in manifest.files)),
        ("warnings", "; ".join(manifest.warnings)),
        ("damage", "; ".join(result.problems)),
    ]


def _disk_pairs(machine: MachineFolder, disk: DiskRecord, images: Images) -> list[tuple[str, str]]:
    depth = _depth(disk, images)
    return [
        ("image", f"{machine.path}/{disk.image.text}"),
        ("size", exact_size(disk.virtual_size_bytes)),
        ("added", "nothing, it is unchanged" if disk.how is How.SAME else format_size(disk.data_bytes)),
        ("how", disk.how.value),
        ("chain", "cannot be followed" if depth is None else count(depth, "image")),
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
      "leases", "unfinished_prune"}]}
    """
    limit = _age_of(max_age)
    with open_repository(repo) as repository:
        ids = [repository.find_machine(one) for one in machines] or repository.machine_ids()
        if not ids:
            raise NotFound("no machine has been backed up here yet", path=repository.path)
        found = []
        for machine_id in ids:
            with repository.machine(machine_id) as machine:
                found.append(_status_document(machine, limit))
    if common.json:
        print_json({"repository": repository.path, "machines": found})
    elif not common.quiet:
        for one in found:
            _print_status(one)
    damaged = any(one["damaged_nights"] for one in found)
    context.exit(_EXIT_DAMAGED if damaged else 0 if all(one["is_good"] for one in found) else EXIT_FAILED)


def _age_of(text: str) -> timedelta:
    found = _AGE.fullmatch(text)
    if found is None:
        raise InvalidArgument(f"--max-age {printable(text)!r} is not an age", hint="write 90m, 26h, 8d or 5w")
    return timedelta(seconds=int(found[1]) * _UNIT_SECONDS[found[2]])


def _status_document(machine: MachineFolder, limit: timedelta) -> dict[str, Any]:
    nights = machine.nights()
    results = known_results(machine, nights)
    whole = [one for one in results if one.is_whole and one.taken is not None]
    newest = whole[-1] if whole else None
    age = None if newest is None or newest.taken is None else datetime.now(UTC) - newest.taken
    state = read_verified(machine.folder)
    return {
        "id": machine.id,
        "name": machine.name,
        "is_good": age is not None and -_CLOCKS_DIFFER <= age <= limit,
        "newest_whole": None if newest is None else newest.number,
        "taken": None if newest is None or newest.taken is None else time_word(newest.taken),
        "age_seconds": None if age is None else int(age.total_seconds()),
        "damaged_nights": {str(one.number): list(one.problems) for one in results if one.problems},
        "verified": None if state is None or state.finished is None else time_word(state.finished),
        "leases": [
            {"id": one.id, "night": one.night, "purpose": one.purpose, "since": time_word(one.since)}
            for one in leases(machine.repository.root)
            if one.machine_id == machine.id and not one.is_dead
        ],
        "unfinished_prune": machine.folder.exists(PRUNE_FILE),
    }


def _print_status(one: dict[str, Any]) -> None:
    word = ("good", "bold green") if one["is_good"] and not one["damaged_nights"] else ("bad ", "bold red")
    if one["newest_whole"] is None:
        text = "no whole night"
    else:
        hours, text = one["age_seconds"] / 3600, f"newest whole night {one['newest_whole']}"
        if one["age_seconds"] < -_CLOCKS_DIFFER.total_seconds():
            text += f", taken at {one['taken']}, which is in the future: a clock was wrong"
        else:
            text += f", {hours:.0f} h old" if hours >= 1 else f", {max(one['age_seconds'], 0) // 60} min old"
    print_text(word, f"  {printable(one['name'])}: {text}", "" if one["verified"] else ", never verified")
    for night, problems in one["damaged_nights"].items():
        print_text(f"      night {night} is damaged: {printable('; '.join(problems))}")
    for lease in one["leases"]:
        print_text(f"      night {lease['night']} is read by {printable(lease['purpose'])} (lease {lease['id']})")
    if one["unfinished_prune"]:
        print_text("      a prune is under way, or was interrupted: the next one finishes it")
