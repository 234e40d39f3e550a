# SPDX-License-Identifier: Apache-2.0
"""`backup copy` and `promote`: a second repository that follows the first, and its life of its own.

Decides how a copy is described, and its exit code.
"""

from __future__ import annotations

from typing import Any

import click

from vhdkit import backups
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
from vmm.cli.progress import stages_shown


@click.command(
    "copy",
    epilog=epilog("vmm backup copy /srv/backup /mnt/usb", "vmm backup copy /srv/backup /mnt/usb --machine web"),
)
@click.argument("repo")
@click.argument("other")
@click.option("--machine", metavar="NAME", help="Copy this machine alone, by its name or id.")
@click.option("--limit", metavar="RATE", type=SIZE, help="Copy at most this much a second, such as 20M.")
@output_options
@click.pass_context
def copy_command(
    context: click.Context,
    repo: str,
    other: str,
    machine: str | None,
    limit: int | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Make the folder OTHER a copy of REPO, or repeat in an earlier copy what has changed: new nights, and prunes.

    Only what OTHER lacks is read and written, by the sums of both sides; holes stay holes, and what was written is
    compared with its sums. A run that is interrupted is continued by the next one, and every night of the copy is
    whole or does not exist. A night of the copy that may exist nowhere else is never removed: a copy that was written
    from another source, or is newer than REPO, is refused.

    A copy can be restored from and verified, but only this command changes it, until `vmm backup promote`.
    """
    rate = None if limit is None else backups.RateLimit(limit)
    with progress_line(shown=not quiet and not as_json) as progress:
        done = backups.copy_repository(repo, other, machine=machine, limit=rate, stage=stages_shown(progress))
    if as_json:
        print_json(_document(done))
    else:
        for one in done.machines:
            _print_machine(one, quiet=quiet)
        for name in () if quiet else done.only_there:
            print_aside(f"the copy has the machine {name}, which the repository does not have: it stays")
    context.exit(max((problem.exit_code for one in done.machines for problem in one.problems), default=0))


def _document(done: backups.Copied) -> dict[str, Any]:
    return {
        "repository": done.source,
        "other": done.other,
        "only_there": list(done.only_there),
        "machines": [
            {
                "id": one.id,
                "name": one.name,
                "added": one.added,
                "changed": one.changed,
                "dropped": one.dropped,
                "mended": one.mended,
                "copied_bytes": one.copied_bytes,
                "problems": [str(problem) for problem in one.problems],
            }
            for one in done.machines
        ],
    }


def _print_machine(one: backups.CopiedMachine, *, quiet: bool) -> None:
    for problem in one.problems:
        print_line(f"not copied: {problem}")
    if quiet:
        return
    counted = (
        (len(one.added), "night", "added"), (len(one.changed), "night", "changed"),
        (len(one.dropped), "night", "dropped"), (len(one.mended), "image", "mended"),
    )  # fmt: skip
    parts = [f"{count} {what}{'s' if count != 1 else ''} {done}" for count, what, done in counted if count]
    if parts:
        parts.append(f"{format_size(one.copied_bytes)} copied")
    nothing = "nothing was copied" if one.problems else "nothing has changed"
    print_line(f"{one.name}: {', '.join(parts) or nothing}")


@click.command("promote", epilog=epilog("vmm backup promote /mnt/usb"))
@click.argument("repo")
@output_options
def promote_command(repo: str, as_json: bool, quiet: bool) -> None:
    """Make REPO, a copy of another repository, a repository of its own, for when the other one is lost.

    From then on backups and prunes change it, and `vmm backup copy` no longer does. Machines whose kept images belong
    to nights that it has are saved incrementally.
    """
    path = backups.promote_copy(repo)
    if as_json:
        print_json({"repository": path})
    elif not quiet:
        print_line(f"{path} is a repository of its own")
