# SPDX-License-Identifier: Apache-2.0
"""`backup copy` and `promote`: a second repository that follows the first, and its life of its own.

Decides how a copy is described, and its exit code.
"""

from __future__ import annotations

from typing import Any

import click

from vhdkit.backup.copying import Copied, CopiedMachine, copy_repository, promote_copy
from vhdkit.cli.backup import repository_options
from vhdkit.cli.common import PATH, Common, epilog, limit_option, progress_option
from vhdkit.cli.output import count, note, print_json, print_text
from vhdkit.cli.progress import stages_shown
from vhdkit.errors import printable
from vhdkit.rate import RateLimit
from vhdkit.units import format_size


@click.command(
    "copy",
    epilog=epilog(
        "vhdkit backup copy /srv/backup /mnt/usb/backup",
        "vhdkit backup copy /srv/backup /mnt/office/backup --machine web --limit 20M",
    ),
)
@repository_options
@click.argument("other", type=PATH)
@click.option("--machine", metavar="NAME", help="Copy this machine alone, by its name or id.")
@limit_option
@progress_option
@click.pass_context
def copy_command(
    context: click.Context,
    repo: str,
    other: str,
    machine: str | None,
    limit: RateLimit | None,
    progress: bool | None,
    common: Common,
) -> None:
    """Make the folder OTHER a copy of REPO, or repeat in an earlier copy what has changed: new nights, and prunes.

    Only what OTHER lacks is read and written, by the sums of both sides; holes stay holes, and what was written is
    compared with its sums. A run that is interrupted is continued by the next one, and every night of the copy is
    whole or does not exist. A night of the copy that may exist nowhere else is never removed: a copy that was written
    from another source, or is newer than REPO, is refused.

    A copy can be restored from and verified, but only this command changes it, until `vhdkit backup promote`.

    \b
    With --json: {"repository", "other", "only_there", "machines": [{"id", "name",
      "added", "changed", "dropped", "mended", "copied_bytes", "problems"}]}
    """
    with stages_shown(common, progress) as stage:
        done = copy_repository(repo, other, machine=machine, limit=limit, stage=stage)
    if common.json:
        print_json(_document(done))
    else:
        for one in done.machines:
            _print_machine(one, common)
        for name in done.only_there:
            note(common, f"the copy has the machine {printable(name)}, which the repository does not have: it stays")
    context.exit(max((problem.exit_code for one in done.machines for problem in one.problems), default=0))


def _document(done: Copied) -> dict[str, Any]:
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


def _print_machine(one: CopiedMachine, common: Common) -> None:
    for problem in one.problems:
        print_text(("not copied: ", "bold red"), printable(str(problem)))
    if common.quiet:
        return
    parts = [f"{count(len(one.added), 'night')} added"] if one.added else []
    parts += [f"{count(len(one.changed), 'night')} changed"] if one.changed else []
    parts += [f"{count(len(one.dropped), 'night')} dropped"] if one.dropped else []
    parts += [f"{count(len(one.mended), 'image')} mended"] if one.mended else []
    if parts:
        parts.append(f"{format_size(one.copied_bytes)} copied")
    nothing = "nothing was copied" if one.problems else "nothing has changed"
    print_text(f"{printable(one.name)}: {', '.join(parts) or nothing}")


@click.command("promote", epilog=epilog("vhdkit backup promote /mnt/office/backup"))
@repository_options
def promote_command(repo: str, common: Common) -> None:
    """Make REPO, a copy of another repository, a repository of its own, for when the other one is lost.

    From then on backups and prunes change it, and `vhdkit backup copy` no longer does. Disks whose references name
    nights that it has are saved incrementally.

    \b
    With --json: {"repository"}
    """
    path = promote_copy(repo)
    if common.json:
        print_json({"repository": path})
    elif not common.quiet:
        print_text(f"{printable(path)} is a repository of its own")
