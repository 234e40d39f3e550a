# SPDX-License-Identifier: Apache-2.0
"""`restore`: a machine from a night of a backup repository.

Decides how the options become a request, and how what would be made is described.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from vmm.cli.common import SIZE, epilog, output_options, print_json, print_line, print_pairs, progress_line
from vmm.cli.transfer import pair

if TYPE_CHECKING:
    from vmm.api.restoring.restoring import RestoredMachine


@click.command(
    "restore",
    epilog=epilog(
        "vmm restore /srv/backup web --as web-yesterday",
        "vmm restore /srv/backup web@18 --as drill --to /srv/drill --dry-run",
        "vmm restore /srv/backup web --now --limit 100M",
        "vmm restore /srv/backup web@2026-11-30T02:30 --register --allow all",
    ),
)
@click.argument("repository", metavar="REPO", type=click.Path())
@click.argument("night", metavar="NAME[@NIGHT|@TIME]")
@click.option("--as", "new_name", metavar="NEW", help="Name of the machine; by default its old name.")
@click.option("--register", is_flag=True,
              help="It is the old machine again: with its id, MAC addresses and disk serials.")  # fmt: skip
@click.option("--to", "folder", metavar="FOLDER", type=click.Path(),
              help="Where the folder of its disks is made; by default the host's folder for disks.")  # fmt: skip
@click.option("--allow", metavar="THING", multiple=True,
              help="Let the machine have this from outside the night: a path, switch:NAME, a setting, or all."
                   " Repeatable.")  # fmt: skip
@click.option("--map", "paths", metavar="OLD=NEW", multiple=True,
              help="Replace OLD, a file, device or folder, with NEW; an empty NEW leaves it out."
                   " Repeatable.")  # fmt: skip
@click.option("--switch", "switches", metavar="OLD=NEW", multiple=True,
              help="Connect adapters of the switch OLD to NEW, '-' for none. Repeatable.")  # fmt: skip
@click.option("--no-check", is_flag=True, help="Do not compare what is read with its sums first.")
@click.option("--now", is_flag=True,
              help="Start it at once from the night, and fill its disks while it runs.")  # fmt: skip
@click.option("--limit", metavar="RATE", type=SIZE,
              help="With --now: fill at most this much of the disks in a second, such as 50M.")  # fmt: skip
@click.option("--discard-memory", is_flag=True,
              help="Leave out the memory that the night may have: the machine is off.")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Show what would be made, and what has to be allowed.")
@output_options
def restore_command(
    repository: str,
    night: str,
    new_name: str | None,
    register: bool,
    folder: str | None,
    allow: tuple[str, ...],
    paths: tuple[str, ...],
    switches: tuple[str, ...],
    no_check: bool,
    now: bool,
    limit: int | None,
    discard_memory: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Make a machine from a night of the backup repository REPO: the newest of the machine NAME, or NIGHT, or the
    newest one by TIME.

    It has new images, an id, MAC addresses and disk serials of its own, and can stand beside the original. Everything
    that is read is compared with its sums first. The machine appears whole or not at all, and does not need the
    repository afterwards.

    The machine is off. If the night was taken --with-memory, it is saved, and `vmm start` continues it where it was:
    with --register and --allow memory, and if hardware and media are as they were. Otherwise the command says why the
    memory is left out.

    REPO need not be trusted: a definition that names anything outside the night, such as an ISO image or a switch, is
    refused, and each thing is listed with the option that allows it. --dry-run lists them, too.

    With --now the machine runs within seconds, whatever the size of its disks: what was not copied yet is read from
    the repository, which must stay reachable until the disks are whole (`vmm show`, `vmm events`). The night has a
    lease until then. A night that is known to be damaged is refused; sums are compared before a disk is filled, and
    what is damaged is not copied (`vmm events` says so).

    \b
    With --json: {name machine_id night taken consistency folder
      disks {id: path} granted [...] outside {thing: option} warnings [...]
      is_saved memory_left_out}
    """
    from vmm.api.restoring.found_night import RestoreRequest, consent_of
    from vmm.api.restoring.restoring import look_at_night, restore_machine

    if limit is not None and (not now or limit <= 0):
        raise click.UsageError("--limit takes a rate above 0, and needs --now")
    consent = consent_of(allow, dict(pair(word, "--map") for word in paths),
                         dict(pair(word, "--switch") for word in switches))  # fmt: skip
    request = RestoreRequest(
        repository, night, new_name, register, folder, consent, check=not no_check,
        without_memory="--discard-memory was given" if discard_memory else None,
    )  # fmt: skip
    if dry_run:
        found = look_at_night(request)
        _show_plan(found, as_json=as_json)
        return

    def announce(words: str) -> None:
        if not quiet and not as_json:
            print_line(words)

    with progress_line(shown=not quiet and not as_json) as progress:
        if now:
            from vmm.api.restoring.instant import restore_now

            done = restore_now(request, max_rate_bytes=limit, announce=announce, progress=progress)
        else:
            done = restore_machine(request, announce=announce, progress=progress)
    _report(done, is_running=now, as_json=as_json, quiet=quiet)


def _words_of(one: RestoredMachine) -> str:
    from vmm.api.restoring.found_night import CONSISTENCY

    return f"night {one.night} of {one.taken[:16].replace('T', ' ')} UTC, {CONSISTENCY[one.consistency]}"


def _report(done: RestoredMachine, *, is_running: bool, as_json: bool, quiet: bool) -> None:
    if as_json:
        print_json(asdict(done))
    elif not quiet:
        for words in done.warnings:
            print_line(f"warning of that night: {words}")
        print_line(f"{done.name} is {'running' if is_running else 'restored'}: {_words_of(done)}")
        if done.is_saved:
            print_line(f"it is saved, with the memory of that night: vmm start {done.name} continues it")
        if is_running:
            print_line(f"its disks are filled in the background: vmm show {done.name}")


def _show_plan(found: RestoredMachine, *, as_json: bool) -> None:
    if as_json:
        print_json(asdict(found))
        return
    print_pairs([
        ("name", found.name),
        ("from", _words_of(found)),
        *((disk_id, path) for disk_id, path in found.disks.items()),
        *(("allowed", words) for words in found.granted),
        *(("not allowed", f"{what}  [{option}]") for what, option in found.outside.items()),
        *([("memory", "continues from it")] if found.is_saved else []),
        *([("memory left out", found.memory_left_out)] if found.memory_left_out is not None else []),
        *(("warning", words) for words in found.warnings),
    ])  # fmt: skip
