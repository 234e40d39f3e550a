# SPDX-License-Identifier: Apache-2.0
"""`rebase`: repoint an image to where its parent lies now."""

from __future__ import annotations

import click

import vhdkit
from vhdkit.cli.common import PATH, Common, epilog, image_options
from vhdkit.cli.output import print_json, print_text
from vhdkit.errors import printable


@click.command(
    "rebase",
    short_help="Repoint an image to its moved parent.",
    epilog=epilog("vhdkit rebase child.avhd --parent /srv/bases/base.vhd"),
)
@click.argument("image", type=PATH)
@click.option("--parent", required=True, metavar="PARENT", type=PATH, help="Where the parent lies now.")
@image_options(leaf_format=False)
def rebase_command(image: str, parent: str, common: Common) -> None:
    """Let a differencing image find its parent after that was moved or renamed.

    The parent must be the one the image was made on: its id is compared. Only the names of the parent change, the
    relative and the absolute one together; the disk stays as it is.

    \b
    With --json: {"path", "parent"}
    """
    vhdkit.rebase(image, parent, options=common.options)
    if common.json:
        print_json({"path": image, "parent": parent})
    elif not common.quiet:
        print_text(f"{printable(image)} now stands on {printable(parent)}")
