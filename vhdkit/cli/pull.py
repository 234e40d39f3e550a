# SPDX-License-Identifier: Apache-2.0
"""`pull`: fill an image from its parents, and free it from them.

Decides how this is described, before (`--dry-run`) and after.
"""

from __future__ import annotations

import time
from typing import Any

import click

import vhdkit
from vhdkit.cli.common import PATH, Common, dry_run_option, epilog, image_options, progress_option
from vhdkit.cli.output import count, print_json, print_text
from vhdkit.cli.progress import progress_shown
from vhdkit.errors import printable
from vhdkit.units import format_size

_EXAMPLES = (
    "vhdkit pull clone.avhd --independent",
    "vhdkit pull leaf.avhd",
    "vhdkit pull leaf.avhd --to middle.avhd --relink",
    "vhdkit pull clone.avhd --independent --dry-run --json",
)


@click.command("pull", epilog=epilog(*_EXAMPLES))
@click.argument("image", type=PATH)
@click.option("--to", metavar="LAYER", type=PATH,
              help="The lowest layer to take data from; default the base of the chain.")  # fmt: skip
@click.option("--relink", is_flag=True,
              help="With --to: make IMAGE a child of the layer below LAYER.")  # fmt: skip
@click.option("--independent", is_flag=True, help="Take data from all parents, and need none of them any more.")
@dry_run_option
@image_options(leaf_format=False)
@progress_option
def pull_command(
    image: str, to: str | None, relink: bool, independent: bool, dry_run: bool, common: Common, progress: bool | None
) -> None:
    """Copy what IMAGE shows of its parents into IMAGE itself; the parents are only read, and stay.

    The disk reads the same at every moment, and so do the children of IMAGE. With --independent a linked clone becomes
    a disk of its own: a differencing image becomes a dynamic one. With --to and --relink IMAGE no longer needs the
    layers down to LAYER, which other images may still need. `vhdkit ctl` fills a layer of a disk that is served.
    `vhdkit serve --follow-leaf` with the name of such a layer does not find IMAGE any more: name IMAGE then.

    After Ctrl-C, a full disk or a power cut nothing is lost; the same command continues.

    \b
    With --json: {"path", "pulled", "parent", "virtual_size_bytes",
      "data_bytes", "zero_bytes", "dry_run", "seconds", "bytes_per_second"}
    """
    check_pull_options(to=to, relink=relink, independent=independent)
    begin = time.monotonic()
    with progress_shown(common, progress, "pulling") as show:
        done = vhdkit.pull(
            image,
            to=to,
            relink=relink,
            independent=independent,
            dry_run=dry_run,
            options=common.options,
            progress=show,
        )
    seconds = time.monotonic() - begin
    if common.json:
        print_json(_document(done, dry_run, seconds))
    elif not common.quiet or dry_run:
        _print_result(done, dry_run, seconds, is_freed=relink or independent)


def check_pull_options(*, to: str | None, relink: bool, independent: bool) -> None:
    """Raise UsageError for options that contradict each other."""
    if independent and (to or relink):
        raise click.UsageError("--independent takes everything from all parents: leave out --to and --relink")
    if relink and not to:
        raise click.UsageError("--relink requires --to; to need no parent at all, use --independent")


def _document(done: vhdkit.Pull, dry_run: bool, seconds: float) -> dict[str, Any]:
    return {
        "path": done.path,
        "pulled": list(done.pulled),
        "parent": done.parent,
        "virtual_size_bytes": done.size_bytes,
        "data_bytes": done.data_bytes,
        "zero_bytes": done.zero_bytes,
        "dry_run": dry_run,
        "seconds": round(seconds, 3),
        "bytes_per_second": int(done.data_bytes / max(seconds, 0.001)),
    }


def _print_result(done: vhdkit.Pull, dry_run: bool, seconds: float, *, is_freed: bool) -> None:
    path, moved = (
        printable(done.path),
        f"{format_size(done.data_bytes)} of data, {format_size(done.zero_bytes)} of zeros",
    )
    if not done.pulled:
        print_text(f"{path} has no parent: it is independent already")
        return
    layers = count(len(done.pulled), "layer")
    if not done.data_bytes + done.zero_bytes:
        print_text(f"{path} has everything that it shows of {layers} already")
    elif dry_run:
        print_text(f"would copy {moved} from {layers} into {path}")
    else:
        speed = format_size(int(done.data_bytes / max(seconds, 0.001)))
        print_text(f"copied {moved} from {layers} into {path}, in {seconds:.1f} s ({speed}/s)")
    if is_freed:
        becomes = "would become" if dry_run else "is now"
        place = "independent of them" if done.parent is None else f"a child of {printable(done.parent)}"
        print_text(f"{path} {becomes} {place}")
