# SPDX-License-Identifier: Apache-2.0
"""`restore`: the disks of a night of a backup repository as new images.

Decides how the result is described.
"""

from __future__ import annotations

import time

import click

from vhdkit import DiskFormat
from vhdkit.backup.restore import Restored, restore
from vhdkit.cli.backup import repository_options
from vhdkit.cli.common import PATH, Common, dry_run_option, epilog, limit_option, progress_option
from vhdkit.cli.output import note, print_json, print_text
from vhdkit.cli.progress import stages_shown
from vhdkit.errors import printable
from vhdkit.rate import RateLimit

_EXAMPLES = (
    "vhdkit restore /srv/backup web web.vhd",
    "vhdkit restore /srv/backup web@18 /srv/images",
    "vhdkit restore /srv/backup web@2026-11-30T02:30 web.raw --to raw",
)


@click.command("restore", epilog=epilog(*_EXAMPLES))
@repository_options
@click.argument("night", metavar="NAME[@NIGHT|@TIME]")
@click.argument("destination", metavar="DST", type=PATH)
@click.option("--disk", "disks", metavar="ID", multiple=True,
              help="Only this disk, as `backup show` lists it, and no other files. Repeatable.")  # fmt: skip
@click.option("--to", "kind", type=click.Choice([one.value for one in DiskFormat]),
              help="Kind of the new images; by default a dynamic VHD or VHDX, as the disk was.")  # fmt: skip
@click.option("--no-check", is_flag=True, help="Do not compare what is read with its sums first.")
@limit_option
@dry_run_option
@progress_option
def restore_command(
    repo: str,
    night: str,
    destination: str,
    disks: tuple[str, ...],
    kind: str | None,
    no_check: bool,
    limit: RateLimit | None,
    dry_run: bool,
    progress: bool | None,
    common: Common,
) -> None:
    """Make a new image of each disk of a night: the newest, or NIGHT, or the newest one by TIME.

    DST is the new image's path if the night has one disk, or a folder that exists; there the images are named after
    the machine, and other files of the night (a definition, firmware variables) get their own names. Zeros become
    holes. All files appear or none, and no file is replaced. The repository is not needed afterwards.

    To look at a night, or to take single files out of it, nothing has to be restored: mount its image, whose path
    `backup show` prints, with `vhdkit mount --fs`.

    \b
    With --json: {"machine", "night", "taken", "disks": {ID: PATH}, "files",
      "dry_run", "seconds", "unchecked"}
    """
    begin = time.monotonic()
    with stages_shown(common, progress) as stage:
        done = restore(
            repo,
            night,
            destination,
            disks=disks,
            kind=kind,
            check=not no_check,
            dry_run=dry_run,
            limit=limit,
            stage=stage,
        )
    _print_result(done, dry_run, time.monotonic() - begin, common)


def _print_result(done: Restored, dry_run: bool, seconds: float, common: Common) -> None:
    manifest = done.manifest
    for path in done.unchecked:
        note(
            common,
            f"{printable(path)} was read without comparing its sums: a prune that was interrupted changes it, and it"
            " could not be finished here",
        )
    if common.json:
        document = {
            "machine": manifest.machine_name,
            "night": manifest.night,
            "taken": manifest.local_time.isoformat(),
            "disks": done.disks,
            "files": list(done.files),
            "dry_run": dry_run,
            "seconds": round(seconds, 3),
            "unchecked": list(done.unchecked),
        }
        print_json(document)
    elif dry_run or not common.quiet:
        did = "would restore" if dry_run else "restored"
        for disk_id, path in done.disks.items():
            print_text(f"{did} {printable(disk_id)} to {printable(path)}")
        for path in done.files:
            print_text(f"{did} {printable(path)}")
        when = f"{manifest.local_time:%Y-%m-%d %H:%M:%S}"
        print_text(f"{printable(manifest.machine_name)}@{manifest.night}, as it was on {when}, in {seconds:.1f} s")
