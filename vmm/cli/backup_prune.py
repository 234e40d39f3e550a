# SPDX-License-Identifier: Apache-2.0
"""`backup prune`, `delete` and `protect`: which nights go, and which never do.

Decides how a plan is shown before and after it is carried out.
"""

from __future__ import annotations

from dataclasses import asdict

import click

from vhdkit import backups
from vmm.cli.common import (
    Verb,
    epilog,
    output_options,
    print_aside,
    print_json,
    print_line,
    print_table,
    progress_line,
)
from vmm.cli.progress import bytes_shown
from vmm.model.errors import NotFound

RULES = ("last", "hourly", "daily", "weekly", "monthly", "yearly")
_OF_RULE = {
    "last": "the last N nights",
    "hourly": "the newest night of each of the last N hours that have one",
    "daily": "the same for days",
    "weekly": "the same for ISO weeks",
    "monthly": "the same for months",
    "yearly": "the same for years",
}
_dry_run_option = click.option("--dry-run", is_flag=True, help="Change nothing; show what would be done.")
_release_option = click.option(
    "--release", metavar="LEASE", help="First end the lease of a restore that no longer runs."
)


def keep_options(verb: Verb) -> Verb:
    """`--keep-last`, `--keep-daily` and the others: the command gets `keep_last` and so on."""
    for name in reversed(RULES):
        verb = click.option(
            f"--keep-{name}", type=click.IntRange(0), default=0, metavar="N", help=f"Keep {_OF_RULE[name]}."
        )(verb)
    return verb


@click.command(
    "prune",
    epilog=epilog(
        "vmm backup prune /srv/backup web --keep-daily 7 --keep-weekly 4 --dry-run",
        "vmm backup prune /srv/backup web --keep-daily 7 --zone Europe/Berlin",
    ),
)
@click.argument("repo")
@click.argument("machine")
@keep_options
@click.option("--zone", default="UTC", show_default=True, help="The time zone in which days begin.")
@_release_option
@_dry_run_option
@output_options
def prune_command(
    repo: str,
    machine: str,
    zone: str,
    release: str | None,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    **rules: int,
) -> None:
    """Drop the nights of MACHINE in REPO that no rule keeps. Any rule is enough to keep a night.

    Always kept are the newest whole night, protected nights, nights that are being read, and damaged ones, which only
    `vmm backup delete` drops. What a dropped night added is merged into the next one that stays, so this takes time
    for what changed, not for the size of the disks. A prune that is interrupted is finished by the next one, and until
    then every night that stays can be read.
    """
    chosen = backups.KeepRules(**{name: rules[f"keep_{name}"] for name in RULES})
    with (
        backups.open_repository(repo) as repository,
        repository.machine(repository.find_machine(machine)) as found,
        progress_line(shown=not quiet and not as_json) as progress,
    ):
        _release(repository, release, dry_run)
        for one in () if quiet else backups.nights_out_of_order(found):
            words = f"night {one.night} has an earlier time than night {one.previous}"
            print_aside(f"{words}: a clock was wrong, so days may be double")
        show = bytes_shown(progress, f"pruning {found.name}")
        done = backups.prune(found, chosen, backups.zone_named(zone), dry_run=dry_run, progress=show)
        report = backups.report_prune(found, done)
    _print_done(report, as_json=as_json, quiet=quiet)


@click.command(
    "delete",
    epilog=epilog("vmm backup delete /srv/backup web@18 --dry-run", "vmm backup delete /srv/backup web@18"),
)
@click.argument("repo")
@click.argument("night", metavar="NAME@NIGHT|NAME@TIME")
@click.option("--newest", is_flag=True, help="Delete it even if it is the newest whole night.")
@_release_option
@_dry_run_option
@output_options
def delete_command(
    repo: str, night: str, newest: bool, release: str | None, dry_run: bool, as_json: bool, quiet: bool
) -> None:
    """Drop one night of REPO. Other nights that stand on it stay, and can be read at every moment.

    A protected night is refused, and one that a restore reads.
    """
    wanted = backups.Wanted.of_word(night)
    if wanted.at is None:
        raise click.UsageError("say which night: NAME@NIGHT or NAME@TIME")
    with (
        backups.open_repository(repo) as repository,
        repository.machine(repository.find_machine(wanted.machine)) as machine,
        progress_line(shown=not quiet and not as_json) as progress,
    ):
        _release(repository, release, dry_run)
        number = backups.find_night(machine, wanted.at).night
        show = bytes_shown(progress, f"deleting night {number}")
        done = backups.delete(machine, number, newest=newest, dry_run=dry_run, progress=show)
        report = backups.report_prune(machine, done)
    _print_done(report, as_json=as_json, quiet=quiet)


@click.command(
    "protect",
    epilog=epilog("vmm backup protect /srv/backup web@18", "vmm backup protect /srv/backup web@18 --off"),
)
@click.argument("repo")
@click.argument("night", metavar="NAME[@NIGHT|@TIME]")
@click.option("--off", is_flag=True, help="End the protection.")
@output_options
def protect_command(repo: str, night: str, off: bool, as_json: bool, quiet: bool) -> None:
    """Keep a night, by default the newest, from being pruned or deleted until that is ended with --off."""
    wanted = backups.Wanted.of_word(night)
    with (
        backups.open_repository(repo) as repository,
        repository.machine(repository.find_machine(wanted.machine)) as machine,
    ):
        number = backups.protect(machine, wanted.at, protected=not off)
        name, machine_id = machine.name, machine.id
    if as_json:
        print_json({"machine": machine_id, "name": name, "night": number, "protected": not off})
    elif not quiet:
        print_line(f"night {number} of {name} is {'no longer protected' if off else 'protected'}")


def _release(repository: backups.Repository, lease_id: str | None, dry_run: bool) -> None:
    if lease_id is not None and not dry_run and not backups.release(repository.root, lease_id):
        raise NotFound(f"has no lease {lease_id}", path=repository.path, hint="`vmm backup status` lists them")


def _print_done(done: backups.PruneReport, *, as_json: bool, quiet: bool) -> None:
    if as_json:
        print_json(asdict(done))
    if as_json or quiet:
        return
    if done.finished:
        print_aside(f"a prune that was interrupted is finished: night {', '.join(map(str, done.finished))} is gone")
    if done.rows:
        print_table(("", "NIGHT", "TAKEN", "BECAUSE"), done.rows)
    if done.deferred:
        print_aside(f"{len(done.deferred)} images must wait: nights on them are being read or damaged")
    print_line(done.words)
