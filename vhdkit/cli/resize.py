# SPDX-License-Identifier: Apache-2.0
"""`resize`: change the virtual size."""

from __future__ import annotations

from dataclasses import asdict

import click

import vhdkit
from vhdkit.cli.common import PATH, Common, disk_size, epilog, image_options, progress_option
from vhdkit.cli.create import note_larger_child
from vhdkit.cli.output import count, exact_size, note, note_rounding, print_json, print_text
from vhdkit.cli.progress import progress_shown
from vhdkit.errors import printable
from vhdkit.units import DiskSize


@click.command(
    "resize",
    epilog=epilog("vhdkit resize disk.vhd 20G", "vhdkit resize --shrink --dry-run disk.vhd 8G"),
)
@click.argument("image", type=PATH)
@click.argument("size", type=disk_size)
@click.option("--shrink", is_flag=True, help="Allow SIZE to be smaller than the disk.")
@click.option("--dry-run", is_flag=True, help="Only check, and print what would be done.")
@image_options()
@progress_option
def resize_command(
    image: str, size: DiskSize, shrink: bool, dry_run: bool, common: Common, progress: bool | None
) -> None:
    """Change the virtual size of IMAGE, a VHD, a VHDX or a raw file, to SIZE.

    SIZE is rounded up to whole sectors of 512 bytes, with a note. A disk with sectors of 4096 bytes needs a SIZE of
    whole ones.

    What is added reads as zeros; grow partitions and file systems in the guest. A disk becomes smaller only with
    --shrink, and even then nothing in use is cut off: no partition, no file system (or LVM, LUKS, swap) that lies on
    the disk without a partition table, no byte that is not zero. Shrink those first, with their own tools. An image
    with children keeps its size, and a child cannot become smaller than its parent. At any moment the disk has its old
    size or its new one: after Ctrl-C, kill or a power cut, run the command again.

    \b
    With --json: {"path", "virtual_size_before_bytes", "virtual_size_after_bytes",
      "file_size_before_bytes", "file_size_after_bytes", "moved_block_count",
      "dropped_block_count", "notes": [...]}
    file_size_after_bytes is null with --dry-run.
    """
    with progress_shown(common, progress, "resizing") as show:
        done = vhdkit.resize(image, size, shrink=shrink, options=common.options, dry_run=dry_run, progress=show)
    if common.json:
        print_json(asdict(done))
        return
    note_rounding(common, size)
    if not dry_run:
        note_larger_child(common, image, common.options)
    for one in done.notes:
        note(common, one)
    if dry_run or not common.quiet:
        print_text(f"{printable(image)}: {_sentence(done, dry_run)}")


def _sentence(done: vhdkit.ResizeResult, dry_run: bool) -> str:
    if done.virtual_size_before_bytes == done.virtual_size_after_bytes:
        return f"is {exact_size(done.virtual_size_after_bytes)} already"
    blocks = ""
    if done.moved_block_count or done.dropped_block_count:
        moved = count(done.moved_block_count, "block")
        blocks = f"; {moved} {'to move' if dry_run else 'moved'}, {done.dropped_block_count} dropped"
    sizes = f"{exact_size(done.virtual_size_before_bytes)} -> {exact_size(done.virtual_size_after_bytes)}"
    return f"{'would be ' if dry_run else ''}resized {sizes}{blocks}"
