# SPDX-License-Identifier: Apache-2.0
"""`backup verify`: is everything in a repository as it was written?

Decides how the result is shown, and its exit code.
"""

from __future__ import annotations

from typing import Any

import click

from vhdkit.backup.documents import time_word
from vhdkit.backup.pruning import finish_interrupted
from vhdkit.backup.repository import open_repository
from vhdkit.backup.verify import Verification, verify
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
        codes="Exit code 0 when every night is whole, 3 when one is damaged, 5 when an image was in use.",
    ),
)
@repository_options
@click.argument("machines", metavar="[MACHINE]...", nargs=-1)
@click.option("--sample", "percent", type=click.IntRange(1, 100), metavar="PERCENT",
              help="Read only so much of each image, by chance; everything else is checked whole.")  # fmt: skip
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
      "read_bytes", "went_on", "unfinished_prune"}]}
    """
    found: list[tuple[str, str, Verification]] = []
    with open_repository(repo) as repository:
        ids = [repository.find_machine(one) for one in machines] or repository.machine_ids()
        for machine_id in ids:
            with (
                repository.machine(machine_id) as machine,
                progress_shown(common, progress, f"verifying {printable(machine.name)}") as show,
            ):
                finish_interrupted(machine)
                result = verify(machine, sample_percent=percent, again=again, progress=show)
                found.append((machine_id, machine.name, result))
        path = repository.path
    if common.json:
        print_json({"repository": path, "machines": [_document(*one) for one in found]})
    else:
        for _, name, result in found:
            _print_result(name, result, common)
    if any(not night.is_whole for _, _, result in found for night in result.nights):
        context.exit(_EXIT_DAMAGED)
    context.exit(_EXIT_BUSY if any(result.busy for _, _, result in found) else 0)


def _document(machine_id: str, name: str, result: Verification) -> dict[str, Any]:
    return {
        "id": machine_id,
        "name": name,
        "nights": [
            {
                "night": one.number,
                "taken": None if one.taken is None else time_word(one.taken),
                "problems": list(one.problems),
            }
            for one in result.nights
        ],
        "damaged": [{"path": path, "problem": problem} for path, problem in result.damaged],
        "in_use": list(result.busy),
        "read_bytes": result.read_bytes,
        "went_on": result.went_on,
        "unfinished_prune": list(result.unfinished_prune),
    }


def _print_result(name: str, result: Verification, common: Common) -> None:
    bad = [one for one in result.nights if not one.is_whole]
    if result.went_on:
        note(common, f"{name}: went on with a run that was interrupted")
    if result.unfinished_prune:
        note(common, f"{name}: a prune was interrupted, and the next one finishes it")
    for path, problem in result.damaged:
        print_text(("damaged: ", "bold red"), f"{printable(path)}: {printable(problem)}")
    for path in result.busy:
        print_text(("in use: ", "yellow"), f"{printable(path)} could not be verified: run the command again")
    for one in bad:
        print_text(f"  night {one.number} cannot be relied on: {printable('; '.join(one.problems))}")
    if common.quiet:
        return
    whole = [one.number for one in result.nights if one.is_whole]
    if bad:
        print_text(f"{printable(name)}: {count(len(bad), 'night')} damaged; whole: {_ranges(whole)}")
    elif result.busy:
        print_text(f"{printable(name)}: no damage in what could be read")
    else:
        print_text(("whole", "bold green"), f": {count(len(whole), 'night')} of {printable(name)}")


def _ranges(numbers: list[int]) -> str:
    """ "1-4, 6" """
    runs: list[list[int]] = []
    for one in numbers:
        if runs and runs[-1][-1] == one - 1:
            runs[-1].append(one)
        else:
            runs.append([one])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs) or "none"
