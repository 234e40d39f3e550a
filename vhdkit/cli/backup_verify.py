# SPDX-License-Identifier: Apache-2.0
"""`backup verify`: is everything in a repository as it was written?

Decides how the result is shown, and its exit code.
"""

from __future__ import annotations

from dataclasses import asdict

import click

from vhdkit.backup.pruning import finish_interrupted
from vhdkit.backup.reports import VerifyReport, report_verification
from vhdkit.backup.reports_of_all import report_verifications
from vhdkit.backup.repository import MachineFolder, open_repository
from vhdkit.backup.verify import verify
from vhdkit.cli.backup import repository_options
from vhdkit.cli.common import Common, epilog, progress_option
from vhdkit.cli.output import count, note, print_json, print_text
from vhdkit.cli.progress import progress_shown
from vhdkit.errors import printable

_EXIT_DAMAGED, _EXIT_BUSY = 3, 5


@click.command(
    "verify",
    epilog=epilog(
        "vhdkit backup verify /srv/backup",
        "vhdkit backup verify /srv/backup web --sample 5",
        codes="Exit code 0 when every night is whole, 3 when one or a record is damaged, 5 when an image was in use.",
    ),
)
@repository_options
@click.argument("machines", metavar="[MACHINE]...", nargs=-1)
@click.option("--sample", "percent", type=click.IntRange(1, 100), metavar="PERCENT",
              help="Read only a random part of each image; everything else is checked whole.")  # fmt: skip
@click.option("--again", is_flag=True, help="Begin anew, even if an earlier run was interrupted.")
@progress_option
@click.pass_context
def verify_command(
    context: click.Context,
    repo: str,
    machines: tuple[str, ...],
    percent: int | None,
    again: bool,
    progress: bool | None,
    common: Common,
) -> None:
    """Compare every image and file of all machines, or of those that are named, with its sums, and follow each chain.

    Damage names the nights that it reaches. A run that is interrupted goes on when it is started again. Images are
    only read, and nights can be added meanwhile; but a prune that was interrupted is finished first, if it can be.

    \b
    With --json: {"repository", "machines": [{"id", "name", "nights": [{"night",
      "taken", "problems"}], "damaged": [{"path", "problem"}], "in_use",
      "read_bytes", "went_on", "unfinished_prune", "problem"}]}
    """

    def look(machine: MachineFolder) -> VerifyReport:
        with progress_shown(common, progress, f"verifying {printable(machine.name)}") as show:
            finish_interrupted(machine)
            result = verify(machine, sample_percent=percent, again=again, progress=show)
            return report_verification(machine, result)

    with open_repository(repo) as repository:
        found, path = report_verifications(repository, machines, look), repository.path
    if common.json:
        print_json({"repository": path, "machines": [asdict(one) for one in found]})
    else:
        for one in found:
            _print_result(one, common)
    if any(one.is_damaged for one in found):
        context.exit(_EXIT_DAMAGED)
    context.exit(_EXIT_BUSY if any(one.in_use for one in found) else 0)


def _print_result(found: VerifyReport, common: Common) -> None:
    if found.went_on:
        note(common, f"{found.name}: went on with a run that was interrupted")
    if found.unfinished_prune:
        note(common, f"{found.name}: a prune was interrupted, and the next one finishes it")
    if found.problem is not None:
        print_text(("damaged: ", "bold red"), printable(found.problem))
    for damage in found.damaged:
        print_text(("damaged: ", "bold red"), f"{printable(damage.path)}: {printable(damage.problem)}")
    for path in found.in_use:
        print_text(("in use: ", "yellow"), f"{printable(path)} could not be verified: run the command again")
    for one in found.bad:
        print_text(f"  night {one.night} cannot be relied on: {printable('; '.join(one.problems))}")
    if common.quiet or found.problem is not None:
        return
    if found.bad:
        print_text(f"{printable(found.name)}: {count(len(found.bad), 'night')} damaged; whole: {found.whole}")
    elif found.in_use:
        print_text(f"{printable(found.name)}: no damage in what could be read")
    else:
        print_text(("whole", "bold green"), f": {count(len(found.nights), 'night')} of {printable(found.name)}")
