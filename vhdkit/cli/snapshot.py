# SPDX-License-Identifier: Apache-2.0
"""`snapshot` and `clone`: freeze images by giving them children.

Decides how LEAF=NEW is parsed and what is reported about the new files.
"""

from __future__ import annotations

from collections.abc import Sequence

import click

import vhdkit
from vhdkit import formats
from vhdkit.chain.names.parents import refuse_child_name
from vhdkit.cli.common import PATH, Common, dry_run_option, epilog, image_options
from vhdkit.cli.create import needed_to_open
from vhdkit.cli.naming import note_other_name
from vhdkit.cli.output import note, print_json, print_text
from vhdkit.errors import printable
from vhdkit.folder import exists
from vhdkit.store import FileStore


@click.command(
    "snapshot",
    epilog=epilog(
        "vhdkit snapshot disk.vhd",
        "vhdkit snapshot disk.vhd before-update.avhd",
        "vhdkit snapshot --many system.vhd=system-1.avhd data.vhd=data-1.avhd",
    ),
)
@click.argument("images", metavar="LEAF [NEW]", nargs=-1, required=True, type=PATH)
@click.option("--many", is_flag=True, help="Freeze several disks at once, each LEAF or LEAF=NEW; all or none.")
@dry_run_option
@image_options(leaf_format=False)
def snapshot_command(images: tuple[str, ...], many: bool, dry_run: bool, common: Common) -> None:
    """Freeze LEAF: its content no longer changes, and later writes go to NEW, an empty child.

    Without NEW the child is made beside the leaf: disk.avhd for disk.vhd, disk-1.avhd for disk.avhd, with the next
    free number. No program may be writing to LEAF at the time.

    With --many the arguments are LEAF=NEW. If a name itself contains "=", the argument is split after the longest
    name that is an existing file.

    \b
    With --json: {"snapshots": [{"leaf", "new", "open_with"}], "dry_run"}
    """
    if not many and len(images) > 2:
        raise click.UsageError("give one LEAF and at most one NEW; for several disks use --many LEAF=NEW ...")
    pairs = [split_pair(word) for word in images] if many else [(images[0], images[1] if len(images) > 1 else None)]
    for leaf, child in pairs:
        if child is not None:
            refuse_child_name(child, leaf)
    made = vhdkit.snapshot_many(pairs, options=common.options, dry_run=dry_run)
    _print_result([leaf for leaf, _ in pairs], made, "snapshots", common, dry_run)


@click.command(
    "clone",
    epilog=epilog("vhdkit clone golden.vhd web-1.avhd web-2.avhd web-3.avhd"),
)
@click.argument("base", type=PATH)
@click.argument("new", nargs=-1, required=True, type=PATH)
@dry_run_option
@image_options(leaf_format=False)
def clone_command(base: str, new: tuple[str, ...], dry_run: bool, common: Common) -> None:
    """Create empty children NEW of one BASE, all or none. BASE is only read, and must not change from now on.

    vhdkit does not change BASE while it has a child. A child in another folder is recorded beside BASE, in
    .BASE.vhdkit-children, so that it is found from there. A child that you move with mv, and programs that
    ignore this record, are not covered: also make BASE read-only (chmod a-w).

    \b
    With --json: {"clones": [{"leaf", "new", "open_with"}], "dry_run"}
    """
    for child in new:
        refuse_child_name(child, base)
    made = vhdkit.clone(base, new, options=common.options, dry_run=dry_run)
    _print_result([base] * len(made), made, "clones", common, dry_run)


def split_pair(word: str) -> tuple[str, str | None]:
    """LEAF=NEW as its two names; LEAF alone when that is the name of a file, whatever it looks like."""
    if "=" not in word or exists(word):
        return word, None
    cuts = [index for index, letter in enumerate(word) if letter == "="]
    fitting = [index for index in cuts if exists(word[:index])]
    cut = fitting[-1] if fitting else cuts[0]
    leaf, new = word[:cut], word[cut + 1 :]
    if not leaf or not new:
        raise click.UsageError(f"{printable(word)!r} is not LEAF=NEW")
    return leaf, new


def _print_result(parents: Sequence[str], made: Sequence[str], kind: str, common: Common, dry_run: bool) -> None:
    """Report what was made, or would be."""
    needed = [
        [] if dry_run else needed_to_open(new, old, common.options) for old, new in zip(parents, made, strict=True)
    ]
    words = [[word for option in one for word in option] for one in needed]
    if common.json:
        rows = [
            {"leaf": old, "new": new, "open_with": with_} for old, new, with_ in zip(parents, made, words, strict=True)
        ]
        print_json({kind: rows, "dry_run": dry_run})
        return
    for old, new, with_ in zip(parents, made, words, strict=True):
        if not common.quiet:
            will = "would create" if dry_run else "created"
            print_text(f"{will} {printable(new)} on {printable(old)}, which is read-only from now on")
        with FileStore.open(old) as store:
            note_other_name(common, new, formats.named(formats.probed(store).child_format))
        if with_:
            note(common, f"opening {new} requires " + " ".join(with_))
