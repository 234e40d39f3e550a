# SPDX-License-Identifier: Apache-2.0
"""`merge`: merge layers of a chain into one of them, or into a new file.

Decides how a merge is described, before (`--dry-run`) and after, and what is reported about an interrupted one.
"""

from __future__ import annotations

import time
from typing import Any

import click

import vhdkit
from vhdkit import VhdkitError
from vhdkit.cli.common import PATH, Common, epilog, image_options, progress_option
from vhdkit.cli.output import count, exact_size, note, print_json, print_text
from vhdkit.cli.progress import progress_shown
from vhdkit.errors import printable
from vhdkit.units import format_size

_EXAMPLES = (
    "vhdkit merge leaf.avhd",
    "vhdkit merge leaf.avhd --into base.vhd",
    "vhdkit merge leaf.avhd --into base.vhd --to flat.vhd",
    "vhdkit merge leaf.avhd --dry-run --json",
    "vhdkit merge leaf.avhd --resume",
)


@click.command("merge", epilog=epilog(*_EXAMPLES))
@click.argument("leaf", type=PATH)
@click.option("--into", metavar="ANCESTOR", type=PATH,
              help="The layer that the others are merged into; default the parent of LEAF.")  # fmt: skip
@click.option("--to", metavar="NEW", type=PATH, help="Write the result to a new file; leave the chain unchanged.")
@click.option("--relink", is_flag=True, help="Make the children of LEAF children of the result.")
@click.option("--resume", is_flag=True, help="Finish an interrupted merge. LEAF may be any of its images.")
@click.option("--dry-run", is_flag=True, help="Show what would be done, and do nothing.")
@image_options(leaf_format=False)
@progress_option
def merge_command(
    leaf: str, into: str | None, to: str | None, relink: bool, resume: bool, dry_run: bool, common: Common,
    progress: bool | None,
) -> None:  # fmt: skip
    """Merge LEAF, and every layer between, into its ancestor in one pass.

    The ancestor then has the content and size of LEAF; LEAF and the layers between are removed. The merge is exact
    to the sector, zeros included. No other image may depend on a file that changes.

    After Ctrl-C, a full disk or a power cut LEAF reads as before; --resume continues from there.

    \b
    With --json: {"target", "merged", "removed", "relinked",
      "virtual_size_bytes", "data_bytes", "zero_bytes", "block_count", "dry_run",
      "seconds", "bytes_per_second", "left"}
    """
    if resume and (into or to or relink or dry_run):
        raise click.UsageError("--resume continues the merge as it was started: leave out the other options")
    begin = time.monotonic()
    try:
        with progress_shown(common, progress, "merging") as show:
            if resume:
                done = vhdkit.resume_merge(leaf, options=common.options, progress=show)
            else:
                done = vhdkit.merge(
                    leaf, into=into, to=to, relink_children=relink, dry_run=dry_run, options=common.options,
                    progress=show,
                )  # fmt: skip
    except BaseException:
        _note_unfinished(leaf, common)
        raise
    seconds = time.monotonic() - begin
    if common.json:
        print_json(_document(done, dry_run, seconds))
    elif not common.quiet or dry_run:
        _print_result(done, dry_run, seconds)


def _note_unfinished(leaf: str, common: Common) -> None:
    """After a failure: note how to continue, if the merge can be continued."""
    try:
        unfinished = vhdkit.merge_under_way(leaf, options=common.options)
    except VhdkitError:
        return
    if unfinished is not None:
        note(common, f"{leaf} reads as before; continue with `vhdkit merge {leaf} --resume`")


def _document(done: vhdkit.Merge, dry_run: bool, seconds: float) -> dict[str, Any]:
    return {
        "target": done.target,
        "merged": list(done.merged),
        "removed": list(done.removed),
        "relinked": list(done.relinked),
        "left": list(done.left),
        "virtual_size_bytes": done.size_bytes,
        "data_bytes": done.data_bytes,
        "zero_bytes": done.zero_bytes,
        "block_count": done.block_count,
        "dry_run": dry_run,
        "seconds": round(seconds, 3),
        "bytes_per_second": int(done.data_bytes / max(seconds, 0.001)),
    }


def _print_result(done: vhdkit.Merge, dry_run: bool, seconds: float) -> None:
    moved = f"{format_size(done.data_bytes)} of data, {format_size(done.zero_bytes)} of zeros"
    if dry_run:
        print_text(f"would merge {count(len(done.merged), 'layer')} into {printable(done.target)}: {moved}")
        for path in done.removed:
            print_text(f"would remove {printable(path)}")
        for path in done.relinked:
            print_text(f"would repoint {printable(path)}")
        return
    speed = format_size(int(done.data_bytes / max(seconds, 0.001)))
    print_text(
        f"merged {count(len(done.merged), 'layer')} into {printable(done.target)}: {exact_size(done.size_bytes)},"
        f" {moved}, in {seconds:.1f} s ({speed}/s)"
    )
    for path in done.relinked:
        print_text(f"{printable(path)} is now a child of it")
    for path in done.left:
        print_text(
            f"kept {printable(path)}: it has the name of a merged layer, but nothing proves that it is that layer"
        )
