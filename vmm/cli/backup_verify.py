# SPDX-License-Identifier: Apache-2.0
"""`backup verify`: is everything in a repository as it was written?

Decides how the result is shown, and its exit code.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from vhdkit import backups
from vmm.cli.common import SECONDS, epilog, output_options, print_aside, print_json, print_line, progress_line
from vmm.cli.progress import bytes_shown
from vmm.model.errors import VmmError, to_document

_EXIT_DAMAGED, _EXIT_BUSY = 3, 5


@click.command(
    "verify",
    epilog=epilog(
        "vmm backup verify /srv/backup",
        "vmm backup verify /srv/backup web --sample 5",
        "vmm backup verify /srv/backup web mail@18 --boot",
        "vmm backup verify /srv/backup web --boot --expect 'login:'",
    ),
)
@click.argument("repo")
@click.argument("machines", metavar="[MACHINE]...", nargs=-1)
@click.option("--sample", "percent", type=click.IntRange(1, 100), metavar="PERCENT",
              help="Read only a random part of each image; everything else is checked whole.")  # fmt: skip
@click.option("--again", is_flag=True, help="Begin anew, even if an earlier run was interrupted.")
@click.option("--boot", is_flag=True,
              help="Instead, start the newest night of each MACHINE, or NAME@NIGHT: does it boot?")  # fmt: skip
@click.option("--expect", metavar="TEXT", help="With --boot: what the serial console must show.")
@click.option("--screen", is_flag=True, help="With --boot: a screen that shows more than the firmware does is enough.")
@click.option(
    "--seconds", type=SECONDS, metavar="SECONDS", help="With --boot: how long that may take; by default 300."
)
@output_options
@click.pass_context
def verify_command(
    context: click.Context,
    repo: str,
    machines: tuple[str, ...],
    percent: int | None,
    again: bool,
    boot: bool,
    expect: str | None,
    screen: bool,
    seconds: float | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Compare every image and file of all machines in REPO, or of those that are named, with its sums, and follow each
    chain.

    Damage names the nights that it reaches. A run that is interrupted goes on when it is started again. Images are
    only read, and nights can be added meanwhile; but a prune that was interrupted is finished first, if it can be.

    With --boot each night is started from REPO, on images of its own and a switch that nothing else is on, and thrown
    away when it has shown a sign of life: the heartbeat of its agent, or what --expect or --screen ask for. Nothing of
    it stays, and the night is not changed. Sums are not compared.

    Exits with 0 when every night is whole, or boots; 3 when one is damaged, or does not boot; 5 when an image was in
    use.
    """
    if boot:
        if percent is not None or again:
            raise click.UsageError("--boot compares no sums: leave out --sample and --again")
        wish = {"expect": expect, "screen": screen, **({} if seconds is None else {"seconds": seconds})}
        context.exit(_try_to_boot(repo, machines, wish, as_json=as_json, quiet=quiet))
    if expect is not None or screen or seconds is not None:
        raise click.UsageError("--expect, --screen and --seconds belong to --boot")
    with backups.open_repository(repo) as repository, progress_line(shown=not quiet and not as_json) as progress:

        def look(machine: backups.MachineFolder) -> backups.VerifyReport:
            show = bytes_shown(progress, f"verifying {machine.name}")
            backups.finish_interrupted(machine)
            result = backups.verify(machine, sample_percent=percent, again=again, progress=show)
            return backups.report_verification(machine, result)

        found, path = backups.report_verifications(repository, machines, look), repository.path
    if as_json:
        print_json({"repository": path, "machines": [asdict(one) for one in found]})
    else:
        for one in found:
            _print_result(one, quiet=quiet)
    if any(one.is_damaged for one in found):
        context.exit(_EXIT_DAMAGED)
    context.exit(_EXIT_BUSY if any(one.in_use for one in found) else 0)


def _print_result(found: backups.VerifyReport, *, quiet: bool) -> None:
    if found.went_on and not quiet:
        print_aside(f"{found.name}: went on with a run that was interrupted")
    if found.unfinished_prune and not quiet:
        print_aside(f"{found.name}: a prune was interrupted, and the next one finishes it")
    if found.problem is not None:
        print_line(f"damaged: {found.problem}")
    for damage in found.damaged:
        print_line(f"damaged: {damage.path}: {damage.problem}")
    for path in found.in_use:
        print_line(f"in use: {path} could not be verified: run the command again")
    for night in found.bad:
        print_line(f"  night {night.night} cannot be relied on: {'; '.join(night.problems)}")
    if quiet or found.problem is not None:
        return
    if found.bad:
        nights = f"{len(found.bad)} night{'s' if len(found.bad) != 1 else ''}"
        print_line(f"{found.name}: {nights} damaged; whole: {found.whole}")
    elif found.in_use:
        print_line(f"{found.name}: no damage in what could be read")
    else:
        print_line(f"{found.name}: {len(found.nights)} night{'s' if len(found.nights) != 1 else ''}, all whole")


def _try_to_boot(repo: str, nights: tuple[str, ...], wish: dict[str, Any], *, as_json: bool, quiet: bool) -> int:
    """Start each night, one after the other; returns the exit code."""
    from vmm.api.restoring.boot_trial import try_boot
    from vmm.api.restoring.signs import TrialWish

    if not nights:
        with backups.open_repository(repo) as repository:
            nights = tuple(repository.machine_ids())
    found, code = list[dict[str, Any]](), 0
    for word in nights:
        try:
            with progress_line(shown=not quiet and not as_json) as progress:
                done = try_boot(repo, word, TrialWish(**wish), progress=progress)
        except VmmError as error:
            code = _EXIT_DAMAGED
            found.append({"night": word, "is_good": False, "error": to_document(error)})
            if not as_json:
                print_line(f"{word} could not be started: {error}")
            continue
        found.append({**asdict(done), "is_good": done.is_good})
        if not done.is_good:
            code = _EXIT_DAMAGED
        if not as_json and not (quiet and done.is_good):
            verb = "boots" if done.is_good else "does not boot"
            print_line(f"{done.machine}@{done.night} {verb}: {done.words}, {done.seconds:.0f} s")
    if as_json:
        print_json({"repository": repo, "nights": found})
    return code
