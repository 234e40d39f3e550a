# SPDX-License-Identifier: Apache-2.0
"""`rebase`: record a new path of an image's parent, or another parent with the same content."""

from __future__ import annotations

import click

import vhdkit
from vhdkit.cli.common import PATH, Common, dry_run_option, epilog, image_options, progress_option
from vhdkit.cli.common import size as parsed_size
from vhdkit.cli.output import print_json, print_text
from vhdkit.cli.progress import progress_shown
from vhdkit.errors import printable


@click.command(
    "rebase",
    epilog=epilog(
        "vhdkit rebase child.avhd --parent /srv/bases/base.vhd",
        "vhdkit rebase child.avhd --parent converted.vhd --unsafe-new-id",
    ),
)
@click.argument("image", type=PATH)
@click.option("--parent", required=True, metavar="PARENT", type=PATH, help="Where the parent is now.")
@click.option("--unsafe-new-id", is_flag=True,
              help="Accept a PARENT with another id if the disk reads the same on it as on the old one.")  # fmt: skip
@click.option("--accept-parent-id", metavar="ID",
              help="Accept a PARENT with this id without a comparison, if the old parent is gone.")  # fmt: skip
@click.option("--accept-parent-size", metavar="SIZE", type=parsed_size,
              help="With --accept-parent-id: accept that PARENT has this size instead of the image's.")  # fmt: skip
@dry_run_option
@image_options(leaf_format=False)
@progress_option
def rebase_command(
    image: str,
    parent: str,
    unsafe_new_id: bool,
    accept_parent_id: str | None,
    accept_parent_size: int | None,
    dry_run: bool,
    common: Common,
    progress: bool | None,
) -> None:
    """Record where the parent of a differencing image is, after it was moved or renamed.

    The parent must be the one that the image was made on: its id is compared. Only the names of the parent change,
    the relative and the absolute one together; the content of the disk stays the same.

    With --unsafe-new-id the parent may be another image, such as a converted copy: every sector that the image reads
    through its parent is compared between the old and the new one, and one difference is enough to refuse.

    If the old parent is gone, there is nothing to compare with. --accept-parent-id ID, with the id of PARENT
    (`vhdkit info` shows it), then skips the comparison at your own risk: if PARENT does not hold what the old parent
    held, the disk is damaged. Only its size is compared with the image's; --accept-parent-size SIZE accepts another.

    \b
    With --json: {"path", "parent", "dry_run"}
    """
    if accept_parent_size is not None and accept_parent_id is None:
        raise click.UsageError("--accept-parent-size requires --accept-parent-id")
    with progress_shown(common, progress, "comparing") as show:
        vhdkit.rebase(
            image,
            parent,
            unsafe_new_id=unsafe_new_id,
            accept_parent_id=accept_parent_id,
            accept_parent_size_bytes=accept_parent_size,
            options=common.options,
            progress=show,
            dry_run=dry_run,
        )
    if common.json:
        print_json({"path": image, "parent": parent, "dry_run": dry_run})
    elif not common.quiet:
        becomes = "would become" if dry_run else "is now"
        word = "" if accept_parent_id is None else f" (id {printable(accept_parent_id)}, nothing was compared)"
        print_text(f"{printable(image)} {becomes} a child of {printable(parent)}{word}")
