# SPDX-License-Identifier: Apache-2.0
"""`compare`: do two images hold the same disk?"""

from __future__ import annotations

import click

import vhdkit
from vhdkit import Comparison
from vhdkit.cli.common import PATH, Common, epilog, image_options, progress_option
from vhdkit.cli.failure import EXIT_FAILED
from vhdkit.cli.output import count, print_json, print_text
from vhdkit.cli.progress import progress_shown
from vhdkit.errors import printable
from vhdkit.units import SECTOR_SIZE, format_size


@click.command(
    "compare",
    epilog=epilog(
        "vhdkit compare leaf.avhd copy.raw",
        codes="Exit code 0 when the content is equal, 1 when it differs (or the comparison failed).",
    ),
)
@click.argument("first", metavar="A", type=PATH)
@click.argument("second", metavar="B", type=PATH)
@image_options()
@progress_option
@click.pass_context
def compare_command(context: click.Context, first: str, second: str, common: Common, progress: bool | None) -> None:
    """Compare the content of two images of any kinds, each with its parents.

    If the sizes differ, the rest of the longer disk is compared with zeros.

    \b
    With --json: {"same", "first_size_bytes", "second_size_bytes",
                  "first_difference_bytes", "different_sector_count"}
    """
    with progress_shown(common, progress, "comparing") as show:
        result = vhdkit.compare(first, second, options=common.options, progress=show)
    if common.json:
        document = {
            "same": result.same_content,
            "first_size_bytes": result.first_size_bytes,
            "second_size_bytes": result.second_size_bytes,
            "first_difference_bytes": result.first_difference_bytes,
            "different_sector_count": result.different_sector_count,
        }
        print_json(document)
    elif not common.quiet:
        _print_result(result, printable(first), printable(second))
    context.exit(0 if result.same_content else EXIT_FAILED)


def _print_result(result: Comparison, first: str, second: str) -> None:
    if result.first_difference_bytes is None:
        print_text(("equal", "bold green"), f": {first} and {second} hold the same disk")
    else:
        offset = result.first_difference_bytes
        size_bytes = result.different_sector_count * SECTOR_SIZE
        print_text(
            ("different", "bold red"),
            f": {first} and {second} differ in {count(result.different_sector_count, 'sector')}"
            f" ({format_size(size_bytes)}), first at byte {offset:#x} (sector {offset // SECTOR_SIZE})",
        )
    one, other = result.first_size_bytes, result.second_size_bytes
    if one != other:
        longer = first if one > other else second
        rest = "is zeros" if result.same_content else "was compared with zeros"
        print_text(f"sizes differ: {one} and {other} bytes; the rest of {longer} {rest}")
