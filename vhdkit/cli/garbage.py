# SPDX-License-Identifier: Apache-2.0
"""`gc`: the unreferenced layers of a folder.

Decides how they are listed, and that nothing is removed without `--delete`.
"""

from __future__ import annotations

from collections.abc import Sequence

import click

import vhdkit
from vhdkit import GarbageItem
from vhdkit.cli.common import PATH, Common, epilog, image_options
from vhdkit.cli.output import columns, count, print_json, print_text
from vhdkit.errors import printable
from vhdkit.units import format_size


@click.command(
    "gc",
    epilog=epilog("vhdkit gc /srv/disks --keep web.avhd mail.avhd", "vhdkit gc . --keep leaf.avhd --delete"),
)
@click.argument("directory", metavar="DIR", type=PATH)
@click.argument("leaves", metavar="", nargs=-1, type=PATH)
@click.option("--keep", metavar="LEAF...", multiple=True, required=True, type=PATH,
              help="A leaf whose whole chain is kept; more names may follow.")  # fmt: skip
@click.option("--delete", is_flag=True, help="Remove the listed files; without it nothing is removed.")
@click.option("--dry-run", is_flag=True, help="Only list, even with --delete.")
@image_options(leaf_format=False)
def gc_command(
    directory: str, leaves: tuple[str, ...], keep: tuple[str, ...], delete: bool, dry_run: bool, common: Common
) -> None:
    """List images in DIR that no LEAF depends on, half-made files of dead programs and records of merges that are
    gone; remove them with --delete.

    Name every leaf that is still needed: an image without parents or children counts as unreferenced, too. An image
    that is damaged, in use, or has an unfinished merge or resize is kept with all its parents, and so is the parent
    of any image in DIR, in the folders directly above and below it, and in those of --allow-parent-dir. Raw disks and
    other files are never touched, and links are not followed.

    \b
    With --json: {"directory", "items": [{"path", "size_bytes", "allocated_bytes",
      "kind": "image" | "part" | "record", "kept", "removed"}]}
    where "kept" gives the reason if a file is kept.
    """
    delete = delete and not dry_run
    items = vhdkit.collect_garbage(directory, [*keep, *leaves], delete=delete, options=common.options)
    if common.json:
        print_json({"directory": directory, "items": [_document(one) for one in items]})
    elif not common.quiet:
        _print_result(items, delete=delete)


def _document(item: GarbageItem) -> dict[str, object]:
    return {
        "path": item.path,
        "kind": item.kind.value,
        "size_bytes": item.size_bytes,
        "allocated_bytes": item.allocated_bytes,
        "kept": item.kept,
        "removed": item.removed,
    }


def _print_result(items: Sequence[GarbageItem], *, delete: bool) -> None:
    rows = [(_word(one, delete=delete), format_size(one.allocated_bytes), printable(one.path)) for one in items]
    for line, item in zip(columns(rows, "lrl") if rows else [], items, strict=True):
        print_text(line, f"  ({item.kept})" if item.kept else "")
    going = [one for one in items if one.kept is None]
    size = format_size(sum(one.allocated_bytes for one in going))
    if not going:
        print_text(("nothing to remove", "bold green"))
    elif delete:
        print_text(f"removed {count(len(going), 'file')}, {size}")
    else:
        print_text(f"{count(len(going), 'file')}, {size}, would be removed with --delete")


def _word(item: GarbageItem, *, delete: bool) -> str:
    if item.kept is not None:
        return "kept"
    return "removed" if delete else "unreferenced"
