# SPDX-License-Identifier: Apache-2.0
"""`backup verify`: is everything in a repository as it was written?

Decides how the result is shown, and its exit code.
"""

from __future__ import annotations

from dataclasses import asdict

import click

from vhdkit import backups
from vmm.cli.common import epilog, output_options, print_aside, print_json, print_line, progress_line
from vmm.cli.progress import bytes_shown

_EXIT_DAMAGED, _EXIT_BUSY = 3, 5


@click.command(
    "verify", epilog=epilog("vmm backup verify /srv/backup", "vmm backup verify /srv/backup web --sample 5")
)
@click.argument("repo")
@click.argument("machines", metavar="[MACHINE]...", nargs=-1)
@click.option("--sample", "percent", type=click.IntRange(1, 100), metavar="PERCENT",
              help="Read only so much of each image, by chance; everything else is checked whole.")  # fmt: skip
@click.option("--again", is_flag=True, help="Begin anew, even if an earlier run was interrupted.")
@output_options
@click.pass_context
def verify_command(
    context: click.Context,
    repo: str,
    machines: tuple[str, ...],
    percent: int | None,
    again: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Compare every image and file of all machines in REPO, or of those that are named, with its sums, and follow each
    chain.

    Damage names the nights that it reaches. A run that is interrupted goes on when it is started again. Images are
    only read, and nights can be added meanwhile; but a prune that was interrupted is finished first, if it can be.

    Exits with 0 when every night is whole, 3 when one is damaged, 5 when an image was in use.
    """
    found = []
    with backups.open_repository(repo) as repository, progress_line(shown=not quiet and not as_json) as progress:
        for machine_id in [repository.find_machine(one) for one in machines] or repository.machine_ids():
            with repository.machine(machine_id) as machine:
                show = bytes_shown(progress, f"verifying {machine.name}")
                backups.finish_interrupted(machine)
                result = backups.verify(machine, sample_percent=percent, again=again, progress=show)
                found.append(backups.report_verification(machine, result))
        path = repository.path
    if as_json:
        print_json({"repository": path, "machines": [asdict(one) for one in found]})
    else:
        for one in found:
            _print_result(one, quiet=quiet)
    if any(one.bad for one in found):
        context.exit(_EXIT_DAMAGED)
    context.exit(_EXIT_BUSY if any(one.in_use for one in found) else 0)


def _print_result(found: backups.VerifyReport, *, quiet: bool) -> None:
    if found.went_on and not quiet:
        print_aside(f"{found.name}: went on with a run that was interrupted")
    if found.unfinished_prune and not quiet:
        print_aside(f"{found.name}: a prune was interrupted, and the next one finishes it")
    for damage in found.damaged:
        print_line(f"damaged: {damage.path}: {damage.problem}")
    for path in found.in_use:
        print_line(f"in use: {path} could not be verified: run the command again")
    for night in found.bad:
        print_line(f"  night {night.night} cannot be relied on: {'; '.join(night.problems)}")
    if quiet:
        return
    if found.bad:
        nights = f"{len(found.bad)} night{'s' if len(found.bad) != 1 else ''}"
        print_line(f"{found.name}: {nights} damaged; whole: {found.whole}")
    elif found.in_use:
        print_line(f"{found.name}: no damage in what could be read")
    else:
        print_line(f"{found.name}: {len(found.nights)} night{'s' if len(found.nights) != 1 else ''}, all whole")
