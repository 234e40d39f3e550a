# SPDX-License-Identifier: Apache-2.0
"""`relocate`: move a whole chain into another folder."""

from __future__ import annotations

import click

import vhdkit
from vhdkit.cli.common import PATH, Common, dry_run_option, epilog, image_options, progress_option
from vhdkit.cli.output import print_json, print_text
from vhdkit.cli.progress import progress_shown
from vhdkit.errors import printable


@click.command(
    "relocate",
    epilog=epilog("vhdkit relocate leaf.avhd /srv/disks", "vhdkit relocate leaf.avhd /srv/disks --dry-run"),
)
@click.argument("leaf", type=PATH)
@click.argument("directory", metavar="DIR", type=PATH)
@dry_run_option
@image_options(leaf_format=False)
@progress_option
def relocate_command(leaf: str, directory: str, dry_run: bool, common: Common, progress: bool | None) -> None:
    """Move LEAF and all its parents into the folder DIR, which must exist; file names stay the same.

    Within one file system nothing is copied; across file systems the data is copied and flushed before the old files
    are removed. The chain can be opened at any moment, in its old place or in the new one. Refused while any layer is
    open, if a name is taken in DIR, and if an image that does not move depends on one of the layers.

    \b
    With --json: {"moves": [{"old", "new"}], "dry_run"}
    """
    with progress_shown(common, progress, "copying") as show:
        moves = vhdkit.relocate(leaf, directory, options=common.options, progress=show, dry_run=dry_run)
    if common.json:
        print_json({"moves": [{"old": one.old_path, "new": one.new_path} for one in moves], "dry_run": dry_run})
    elif not common.quiet:
        for one in moves:
            stays = one.old_path == one.new_path
            did = "unchanged:" if stays else "would move" if dry_run else "moved"
            print_text(f"{did} {printable(one.old_path)}", "" if stays else f" to {printable(one.new_path)}")
