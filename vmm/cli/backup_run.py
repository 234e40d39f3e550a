# SPDX-License-Identifier: Apache-2.0
"""`backup run` and `backup forget`: saves machines as nights of a repository, and ends the keeping of layers for that.

Decides how several machines are saved one after the other, and what is said about each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import click

from vmm.api.backups import BackupWishes, MachineNight, note_abandoned
from vmm.api.known_repositories import NEW
from vmm.api.manager import Manager
from vmm.cli.common import (
    SIZE,
    epilog,
    format_size,
    output_options,
    print_aside,
    print_json,
    print_line,
    progress_line,
)
from vmm.cli.failure import report
from vmm.cli.stuck import exit_code_of_child
from vmm.model.errors import VmmError, printable, to_document

_MEANINGS = {
    "agent": "the guest's file systems were frozen",
    "crash": "as after a power cut",
    "off-clean": "the machine had shut down",
    "off-unclean": "the machine is off because it died: as after a power cut",
}


@click.command(
    "run",
    epilog=epilog(
        "vmm backup run web /srv/backup",
        "vmm backup run web mail /srv/backup --consistent",
        "vmm backup run web /srv/backup --keep-free 50G --full-every 30",
    ),
)
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@click.argument("repo")
@click.option("--consistent", is_flag=True, help="Save nothing unless the guest's file systems are whole.")
@click.option("--with-memory", is_flag=True, help="Save the guest's memory of that moment, too.")
@click.option("--compare", is_flag=True, help="Compare all content with the last night; trust no mark.")
@click.option(
    "--full-every", type=click.IntRange(1), metavar="N", help="Begin a new full image after N images of a disk."
)
@click.option("--keep-free", type=SIZE, default=0, metavar="SIZE", help="Refuse if less than this would stay free.")
@click.option("--limit", type=SIZE, metavar="RATE", help="Write at most this much a second, such as 20M.")
@click.option(NEW, "accepts_new", is_flag=True,
              help="Save in what is at REPO now, although nights of the machine are in another repository of that path"
                   " (by default its disk is taken to be missing).")  # fmt: skip
@click.option("--schedule", hidden=True, help="The schedule for which the machines are saved.")
@output_options
def run_command(
    names: tuple[str, ...],
    repo: str,
    consistent: bool,
    with_memory: bool,
    compare: bool,
    full_every: int | None,
    keep_free: int,
    limit: int | None,
    accepts_new: bool,
    schedule: str | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Save each machine NAME as a new night of the repository REPO, a folder that is made by the first night.
    Once a machine has a night there, it is saved in that repository alone: an empty folder, or another repository, at
    REPO is refused, because the disk with the known one may not be mounted (see --new-repository).

    The machine may be off, running, paused or saved. All of its disks are frozen at one moment, in milliseconds, and
    it goes on in new images while the frozen ones are saved. The first night of a disk is a full image; each later one
    has what was written since the night before, whose frozen image is kept for that purpose, beside the disk
    (`vmm backup forget` ends this). The night also has the definition and the UEFI variables, and facts about
    snapshots; media are not saved. Disks that are passed through cannot be frozen, so a machine with one is
    refused.

    A night is whole or does not exist. Ctrl-C, an error or a full disk leave nothing of it, and the machine goes on.
    With --consistent the guest's agent must freeze its file systems, or the machine must have shut down.

    With --with-memory the night also has the memory of a running, paused or saved machine, so that a restore can
    continue it where it was (`vmm restore --register --allow memory`). It takes as long as a snapshot does, which is
    what is taken meanwhile; a machine that is off has no memory, and the night says so.

    Several machines are saved one after the other; one that fails does not stop the others.
    """
    code = exit_code_of_child(lambda: note_abandoned(names, repo))
    if code is not None:
        click.get_current_context().exit(code)
    wishes = BackupWishes(consistent, compare, full_every, keep_free, limit, accepts_new, schedule, with_memory)
    saved, failed = list[MachineNight](), list[VmmError]()
    for name in names:
        try:
            with progress_line(shown=not quiet and not as_json) as progress:
                saved.append(Manager().save_night(name, repo, wishes, progress=_named(name, progress)))
        except VmmError as error:
            if len(names) == 1:
                raise
            failed.append(error)
            if not as_json:
                report(error, as_json=False, verbose=False)
            continue
        if not as_json and not quiet:
            _print_saved(saved[-1])
    if as_json:
        print_json({"nights": [asdict(one) for one in saved], "failed": [to_document(one) for one in failed]})
    if failed:
        click.get_current_context().exit(failed[0].exit_code)


def _named(name: str, progress: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
    return lambda document: progress({**document, "step": f"{name}: {document.get('step', '')}"})


def _print_saved(saved: MachineNight) -> None:
    size = "nothing has changed" if not saved.added_bytes else format_size(saved.added_bytes)
    pause = f"; the guest waited {saved.pause_seconds * 1000:.0f} ms" if saved.pause_seconds is not None else ""
    meaning = _MEANINGS[saved.consistency]
    print_line(f"{saved.machine}@{saved.night}: {size}, {saved.seconds:.1f} s; {saved.consistency} ({meaning}){pause}")
    for warning in saved.warnings:
        print_aside(f"vmm: {saved.machine}: {printable(warning)}")
    for merge in saved.merges:
        if merge.problem is not None:
            print_aside(f"vmm: {saved.machine}: layers are merged later: {printable(merge.problem)}")


@click.command("forget", epilog=epilog("vmm backup forget web", "vmm backup forget web /srv/backup"))
@click.argument("name")
@click.argument("repo", required=False)
@output_options
def forget_command(name: str, repo: str | None, as_json: bool, quiet: bool) -> None:
    """Keep no frozen images of the machine NAME for its next backups, or none for the repository REPO.

    They are merged: while the machine runs at once, if it is off in the background, if it is saved later. Nights stay
    as they are, and the machine can be backed up again: its next night compares all content with the last one.
    """
    with progress_line(shown=not quiet and not as_json) as progress:
        done = Manager().forget_nights(name, repo, progress=progress)
    if as_json:
        print_json(asdict(done))
        return
    for merge in done.merges:
        if merge.problem is not None:
            print_aside(f"vmm: {name}: layers are merged later: {printable(merge.problem)}")
    if quiet:
        return
    if not done.repositories:
        print_line(f"{name}: no image was kept for backups")
        return
    rest = "merged" if done.is_merged else f"being merged; vmm snapshot merge {name} waits for that"
    print_line(f"{name}: no images are kept for {', '.join(done.repositories)}; they are {rest}")
