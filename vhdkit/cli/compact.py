# SPDX-License-Identifier: Apache-2.0
"""`compact`: makes the file of an image smaller without changing its disk."""

from __future__ import annotations

from dataclasses import asdict

import click

import vhdkit
from vhdkit.cli.common import PATH, Common, epilog, image_options, progress_option
from vhdkit.cli.output import count, print_json, print_text
from vhdkit.cli.progress import progress_shown
from vhdkit.errors import printable
from vhdkit.units import format_size


@click.command(
    "compact",
    epilog=epilog("vhdkit compact disk.vhd", "vhdkit compact --dry-run disk.vhd"),
)
@click.argument("image", type=PATH)
@click.option("--dry-run", is_flag=True, help="Only print what would be done.")
@image_options()
@progress_option
def compact_command(image: str, dry_run: bool, common: Common, progress: bool | None) -> None:
    """Drop the blocks of IMAGE that hold only zeros, close the gaps, and truncate the file.

    Zeros that hide a parent's data stay; whole blocks of them take no space in a VHDX. In a fixed VHD or a raw image,
    whose file keeps its size, runs of zeros become holes; a fixed VHDX is refused. The disk reads the same
    throughout: Ctrl-C or a power cut loses nothing, and compacting again continues. An image with children can be
    compacted too, but no program may have it open. First let the guest discard or zero what it has deleted (fstrim,
    sdelete -z).

    \b
    With --json: {"path", "file_size_before_bytes", "file_size_after_bytes",
      "allocated_before_bytes", "allocated_after_bytes", "dropped_block_count",
      "moved_block_count", "punched_bytes"}
    "allocated" is what the file takes up on its file system; with --dry-run
    "allocated_after_bytes" is null.
    """
    with progress_shown(common, progress, "compacting") as show:
        done = vhdkit.compact(image, options=common.options, dry_run=dry_run, progress=show)
    if common.json:
        print_json(asdict(done))
    elif dry_run or not common.quiet:
        print_text(f"{printable(image)}: {'would ' if dry_run else ''}{_sentence(done, dry_run)}")


def _sentence(done: vhdkit.CompactResult, dry_run: bool) -> str:
    if done.punched_bytes:
        return f"{'make' if dry_run else 'made'} holes of {format_size(done.punched_bytes)} of zeros"
    if done.file_size_after_bytes == done.file_size_before_bytes and not done.dropped_block_count:
        return "change nothing: there is nothing to gain" if dry_run else "nothing to gain"
    blocks = f"{count(done.dropped_block_count, 'block')}, {'move' if dry_run else 'moved'} {done.moved_block_count}"
    sizes = f"{format_size(done.file_size_before_bytes)} -> {format_size(done.file_size_after_bytes)}"
    return f"{'drop' if dry_run else 'dropped'} {blocks}; file size {sizes}"
