# SPDX-License-Identifier: Apache-2.0
"""`backup run`: saves the disk of an image, or of an export that is served, as the next night of a repository.

Decides how a night is described at the end.
"""

from __future__ import annotations

import time
from typing import Any

import click

from vhdkit import __version__
from vhdkit.backup.manifest import How
from vhdkit.backup.night import Wishes
from vhdkit.backup.single import SavedDisk, SingleWishes, backup_image
from vhdkit.cli.common import PATH, Common, epilog, image_options, limit_option, progress_option
from vhdkit.cli.common import size as parsed_size
from vhdkit.cli.output import note, print_json, print_text
from vhdkit.cli.progress import stages_shown
from vhdkit.errors import printable, quoted
from vhdkit.rate import RateLimit
from vhdkit.units import format_size

_HOW = {
    How.FULL: "all of the disk",
    How.LAYERS: "what changed since night {}",
    How.COMPARED: "what differs from night {}",
    How.SAME: "nothing changed since night {}",
}
_EXAMPLES = (
    "vhdkit backup run web.vhd /srv/backup",
    "vhdkit backup run web.vhd /srv/backup --keep-reference",
    "vhdkit backup run --control /run/disk.ctl /srv/backup --export web",
)


@click.command("run", epilog=epilog(*_EXAMPLES))
@click.argument("places", metavar="[IMAGE] REPO", nargs=-1, type=PATH, required=True)
@click.option("--control", metavar="SOCKET", type=PATH,
              help="Save a disk that is served: SOCKET is the PATH of its server's --control.")  # fmt: skip
@click.option("--export", metavar="NAME", help="With --control: which export; default the only one.")
@click.option("--as", "name", metavar="NAME",
              help="What the disk is called in REPO; default the name of IMAGE's file, or of the export.")  # fmt: skip
@click.option(
    "--keep-reference",
    is_flag=True,
    help="Keep the frozen image, so that the next night need not compare. Writes go on in a new child, whose name is"
    " another one.",
)
@click.option("--compare", is_flag=True, help="Compare the whole disk with its newest night, whatever is marked.")
@click.option("--full-every", metavar="N", type=click.IntRange(1),
              help="Begin a new chain with a full image after N images.")  # fmt: skip
@click.option("--keep-free", metavar="SIZE", type=parsed_size, default="0",
              help="Refuse if less than this would stay free.")  # fmt: skip
@limit_option
@click.option("--as-it-is", is_flag=True, help="Save IMAGE although it has children, so is not a disk's newest state.")
@image_options()
@progress_option
def run_command(
    places: tuple[str, ...],
    control: str | None,
    export: str | None,
    name: str | None,
    keep_reference: bool,
    compare: bool,
    full_every: int | None,
    keep_free: int,
    limit: RateLimit | None,
    as_it_is: bool,
    common: Common,
    progress: bool | None,
) -> None:
    """Save the disk of IMAGE, with all its parents, as a new night of REPO, a folder that is made if needed.

    The first night is a full image. Later ones are children of it that own what has changed: what lies above the image
    that the last night left marked (--keep-reference), or what differs. An unchanged disk adds no image. The night
    exists when the command ends without an error; interrupted at any moment, it does not, and nothing is left of it.

    IMAGE is not written to meanwhile. A disk that is in use is saved through its server (--control): it is frozen in
    milliseconds, clients go on in a new child, which is merged back at the end. With --keep-reference the child stays,
    and the old name shows the disk as it was when it was saved: name the newest image where the disk is used, or let
    the server find it (serve --follow-leaf). `backup run` finds it by the old name.

    \b
    With --json: {"repository", "machine", "night", "how", "reference_night",
      "image", "data_bytes", "virtual_size_bytes", "leaf", "merged_into",
      "warnings", "seconds"}
    """
    if len(places) != (1 if control else 2):
        raise click.UsageError("name " + ("REPO alone, with --control" if control else "IMAGE and REPO"))
    if export is not None and not control:
        raise click.UsageError("--export belongs to --control")
    wishes = SingleWishes(name, keep_reference, keep_free, Wishes(compare, full_every, limit), f"vhdkit {__version__}")
    begin = time.monotonic()
    with stages_shown(common, progress) as stage:
        if control:
            from vhdkit.serve.control.saving import backup_served  # only for served disks

            saved = backup_served(control, places[0], wishes, export=export, options=common.options, stage=stage)
        else:
            saved = backup_image(places[0], places[1], wishes, as_it_is=as_it_is, options=common.options, stage=stage)
    _print_result(saved, keep_reference, time.monotonic() - begin, common)


def _print_result(saved: SavedDisk, keeps: bool, seconds: float, common: Common) -> None:
    manifest, [disk] = saved.manifest, saved.manifest.disks
    added = 0 if disk.how is How.SAME else disk.data_bytes
    if common.json:
        document: dict[str, Any] = {
            "repository": saved.repository,
            "machine": saved.machine,
            "night": manifest.night,
            "how": disk.how.value,
            "reference_night": disk.reference_night,
            "image": disk.image.text,
            "data_bytes": added,
            "virtual_size_bytes": disk.virtual_size_bytes,
            "leaf": saved.leaf,
            "merged_into": saved.merged_into,
            "warnings": list(manifest.warnings),
            "seconds": round(seconds, 3),
        }
        print_json(document)
        return
    if common.quiet:
        return
    what = _HOW[disk.how].format(disk.reference_night)
    night = quoted(f"{saved.machine}@{manifest.night}")
    print_text(
        f"{printable(saved.machine)}@{manifest.night}: {what}, {format_size(added)} in {seconds:.1f} s;"
        f" restore it with `vhdkit restore {quoted(saved.repository)} {night} NEW`"
    )
    if saved.merged_into is not None:
        note(common, f"what the last night had frozen is now part of {printable(saved.merged_into)}")
    if keeps:
        note(common, f"the disk goes on in {printable(saved.leaf)}")
