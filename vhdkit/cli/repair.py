# SPDX-License-Identifier: Apache-2.0
"""`check --repair` and `check --restore`: what was repaired, what needs consent, what remains.

Decides how a repair is reported. The findings afterwards are shown by `cli.check`.
"""

from __future__ import annotations

from typing import Any

import vhdkit
from vhdkit import Repair
from vhdkit.cli.common import Common
from vhdkit.cli.output import count, print_text
from vhdkit.errors import printable
from vhdkit.units import format_size

_MAX_SHOWN = 20  # ranges of one fix; the report has them all


def repair_document(done: Repair, *, dry_run: bool) -> dict[str, Any]:
    """A repair for JSON, without the findings."""
    fixes = [
        {
            "code": fix.code,
            "message": fix.message,
            "done": fix.needs is None and not dry_run,
            "needs": fix.needs,
            "lost": [{"offset_bytes": offset, "size_bytes": size} for offset, size in fix.lost],
            "doubtful": [{"offset_bytes": offset, "size_bytes": size} for offset, size in fix.doubtful],
        }
        for fix in done.fixes
    ]
    return {
        "fixes": fixes,
        "changed_bytes": done.changed_bytes,
        "undo": done.undo_path,
        "report": done.report_path,
        "dry_run": dry_run,
    }


def print_repair(done: Repair, *, dry_run: bool) -> None:
    """One line per fix, and where backup and report are."""
    for fix in done.fixes:
        if fix.needs is not None:
            print_text(("not done: ", "yellow"), printable(fix.message), f"; requires {fix.needs}")
        else:
            print_text(("would do: " if dry_run else "repaired: ", "green"), printable(fix.message))
        for name, ranges in (("loses", fix.lost), ("doubtful", fix.doubtful)):
            for offset, size in ranges[:_MAX_SHOWN]:
                print_text(f"  {name} {format_size(size)} of the disk from byte {offset:#x}")
            if len(ranges) > _MAX_SHOWN:
                print_text(f"  and {count(len(ranges) - _MAX_SHOWN, 'more range')}")
    if not done.fixes:
        print_text("nothing to repair")
    if done.report_path is not None:
        print_text(f"the ranges are listed in {printable(done.report_path)}")
    if done.undo_path is not None:
        image, undo = vhdkit.errors.quoted(done.path), vhdkit.errors.quoted(done.undo_path)
        print_text(f"to undo the repair: vhdkit check {image} --restore {undo}")


def restore(image: str, undo: str, common: Common) -> dict[str, Any]:
    """Undo a repair, and report it."""
    restored = vhdkit.restore(image, undo)
    if not common.quiet and not common.json:
        print_text(f"restored {restored} bytes of {printable(image)} from {printable(undo)}")
    return {"restored_bytes": restored}
