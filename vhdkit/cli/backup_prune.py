# SPDX-License-Identifier: Apache-2.0
"""`backup prune`, `delete` and `protect`: which nights go, and which never do.

Decides how a plan is shown before and after it is carried out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any, TypeVar

import click

from vhdkit import NotFound
from vhdkit.backup.choosing import Wanted
from vhdkit.backup.keep import KeepRules, zone_named
from vhdkit.backup.leases import release
from vhdkit.backup.protection import protect
from vhdkit.backup.pruning import Pruned, delete, prune
from vhdkit.backup.reports import find_night, nights_out_of_order, report_prune
from vhdkit.backup.repository import MachineFolder, Repository, open_repository
from vhdkit.cli.backup import repository_options
from vhdkit.cli.common import Common, dry_run_option, epilog, progress_option
from vhdkit.cli.output import columns, count, note, print_json, print_text
from vhdkit.cli.progress import progress_shown
from vhdkit.errors import printable

_F = TypeVar("_F", bound=Callable[..., Any])
_RULES = ("last", "hourly", "daily", "weekly", "monthly", "yearly")
_OF_RULE = {
    "last": "the last N nights",
    "hourly": "the newest night of each of the last N hours that have one",
    "daily": "the same for days",
    "weekly": "the same for ISO weeks",
    "monthly": "the same for months",
    "yearly": "the same for years",
}


def _keep_options(verb: _F) -> _F:
    for name in reversed(_RULES):
        verb = click.option(
            f"--keep-{name}", type=click.IntRange(0), default=0, metavar="N", help=f"Keep {_OF_RULE[name]}."
        )(verb)
    return verb


_release_option = click.option(
    "--release", metavar="LEASE", help="First end the lease of a restore that no longer runs."
)


@click.command(
    "prune",
    epilog=epilog(
        "vhdkit backup prune /srv/backup web --keep-daily 7 --keep-weekly 4 --dry-run",
        "vhdkit backup prune /srv/backup web --keep-daily 7 --zone Europe/Berlin",
    ),
)
@repository_options
@click.argument("machine")
@_keep_options
@click.option("--zone", default="UTC", show_default=True, help="The time zone in which days begin.")
@_release_option
@dry_run_option
@progress_option
def prune_command(
    repo: str,
    machine: str,
    zone: str,
    release: str | None,
    dry_run: bool,
    progress: bool | None,
    common: Common,
    **rules: int,
) -> None:
    """Drop the nights of a MACHINE that no rule keeps. Any rule is enough to keep a night.

    Always kept are the newest whole night, protected nights, nights that are being read, and damaged ones, which only
    `vhdkit backup delete` drops. What a dropped night added is merged into the next one that stays, so this takes time
    for what changed, not for the size of the disks. A prune that is interrupted is finished by the next one, and until
    then every night that stays can be read.

    \b
    With --json: {"machine", "name", "dry_run", "dropped", "finished",
      "kept": {night: [reason]}, "removed", "merged", "hidden", "deferred",
      "bases", "copied_bytes", "freed_bytes", "times"}
    """
    chosen_rules = KeepRules(**{name: rules[f"keep_{name}"] for name in _RULES})
    with open_repository(repo) as repository, repository.machine(repository.find_machine(machine)) as found:
        _release(repository, release, dry_run)
        _note_clocks(found, common)
        with progress_shown(common, progress, f"pruning {printable(found.name)}") as show:
            done = prune(found, chosen_rules, zone_named(zone), dry_run=dry_run, progress=show)
        _print_done(found, done, common)


@click.command(
    "delete",
    epilog=epilog("vhdkit backup delete /srv/backup web@18 --dry-run", "vhdkit backup delete /srv/backup web@18"),
)
@repository_options
@click.argument("night", metavar="NAME@NIGHT|NAME@TIME")
@click.option("--newest", is_flag=True, help="Delete it even if it is the newest whole night.")
@_release_option
@dry_run_option
@progress_option
def delete_command(
    repo: str,
    night: str,
    newest: bool,
    release: str | None,
    dry_run: bool,
    progress: bool | None,
    common: Common,
) -> None:
    """Drop one night. Other nights that stand on it stay, and can be read at every moment.

    A protected night is refused, and one that a restore reads.

    \b
    With --json: as for `vhdkit backup prune`.
    """
    wanted = Wanted.of_word(night)
    if wanted.at is None:
        raise click.UsageError("say which night: NAME@NIGHT or NAME@TIME")
    with open_repository(repo) as repository, repository.machine(repository.find_machine(wanted.machine)) as machine:
        _release(repository, release, dry_run)
        number = find_night(machine, wanted.at).night
        with progress_shown(common, progress, f"deleting night {number}") as show:
            done = delete(machine, number, newest=newest, dry_run=dry_run, progress=show)
        _print_done(machine, done, common)


@click.command(
    "protect",
    epilog=epilog("vhdkit backup protect /srv/backup web@18", "vhdkit backup protect /srv/backup web@18 --off"),
)
@repository_options
@click.argument("night", metavar="NAME[@NIGHT|@TIME]")
@click.option("--off", is_flag=True, help="End the protection.")
def protect_command(repo: str, night: str, off: bool, common: Common) -> None:
    """Keep a night, by default the newest, from being pruned or deleted until that is ended with --off.

    \b
    With --json: {"machine", "night", "protected"}
    """
    wanted = Wanted.of_word(night)
    with open_repository(repo) as repository, repository.machine(repository.find_machine(wanted.machine)) as machine:
        number = protect(machine, wanted.at, protected=not off)
        if common.json:
            print_json({"machine": machine.id, "night": number, "protected": not off})
        elif not common.quiet:
            state = "no longer protected" if off else "protected"
            print_text(f"night {number} of {printable(machine.name)} is {state}")


def _release(repository: Repository, lease_id: str | None, dry_run: bool) -> None:
    if lease_id is not None and not dry_run and not release(repository.root, lease_id):
        raise NotFound(
            f"has no lease {printable(lease_id)}", path=repository.path, hint="`vhdkit backup status` lists them"
        )


def _note_clocks(machine: MachineFolder, common: Common) -> None:
    for one in nights_out_of_order(machine):
        words = f"night {one.night} has an earlier time than night {one.previous}"
        note(common, f"{words}: a clock was wrong, so days may be counted twice")


def _print_done(machine: MachineFolder, pruned: Pruned, common: Common) -> None:
    done = report_prune(machine, pruned)
    if common.json:
        print_json(asdict(done))
        return
    if common.quiet:
        return
    if done.finished:
        note(common, f"a prune that was interrupted is finished: night {', '.join(map(str, done.finished))} is gone")
    if done.bases:
        note(common, f"removed what no machine's night needs any more: {count(len(done.bases), 'shared base')}")
    for line in columns(done.rows, "lrll") if done.rows else []:
        print_text(printable(line))
    if done.deferred:
        note(common, f"{count(len(done.deferred), 'image')} must wait: nights on them are being read or damaged")
    print_text(done.words)
