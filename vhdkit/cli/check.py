# SPDX-License-Identifier: Apache-2.0
"""`check`: everything that is wrong with an image and its parents.

Decides the order in which findings are shown, and the exit code.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import click

import vhdkit
from vhdkit import Finding, Severity
from vhdkit.cli.common import PATH, Common, dry_run_option, epilog, image_options, progress_option
from vhdkit.cli.output import count, finding_document, print_finding, print_json, print_text
from vhdkit.cli.progress import progress_shown
from vhdkit.cli.repair import repair_document, restore, tell_repair
from vhdkit.errors import printable

EXIT_ERRORS = 3
EXIT_WARNINGS = 4
_STATUS = {
    None: ("clean", 0),
    Severity.NOTE: ("clean", 0),
    Severity.WARNING: ("warnings", EXIT_WARNINGS),
    Severity.ERROR: ("errors", EXIT_ERRORS),
}


@click.command(
    "check",
    epilog=epilog(
        "vhdkit check leaf.avhd",
        "vhdkit check leaf.avhd --repair --dry-run",
        "vhdkit check leaf.avhd --repair --undo leaf.undo",
        "vhdkit check leaf.avhd --restore leaf.undo",
        codes="Exit code 0 when clean (notes do not count), 3 for errors, 4 for warnings only; after a repair, of what"
        " is left.",
    ),
)
@click.argument("image", type=PATH)
@click.option("--repair", "wanted", is_flag=True, help="Put right what can be in IMAGE, then examine it again.")
@click.option("--undo", metavar="FILE", type=PATH, help="With --repair: write a backup of every byte that changes.")
@click.option("--accept-data-loss", is_flag=True,
              help="With --repair: clear blocks that cannot be where the table says, losing content.")  # fmt: skip
@click.option("--report", metavar="FILE", type=PATH,
              help="Where lost ranges are listed; IMAGE.lost.json when not given.")  # fmt: skip
@click.option("--writer-is-dead", is_flag=True,
              help="With --repair: remove the mark of another program (0xC7, v_poison) that is dead.")  # fmt: skip
@click.option("--restore", "undo_to_apply", metavar="FILE", type=PATH, help="Take a repair back with its backup.")
@dry_run_option
@image_options()
@progress_option
@click.pass_context
def check_command(
    context: click.Context, image: str, wanted: bool, undo: str | None, accept_data_loss: bool, report: str | None,
    writer_is_dead: bool, undo_to_apply: str | None, dry_run: bool, common: Common, progress: bool | None,
) -> None:  # fmt: skip
    """Examine an image and its parents; without --repair or --restore nothing is changed.

    Footers, header, BAT, bitmaps, locators, lost space, and whether the files of the chain belong together.
    An error means that bytes are read wrong or not at all; a warning, that others may read them differently
    or that space is lost.

    --repair changes IMAGE alone, all at once or, at a power cut, not at all. It mends footers, their checksums and
    their geometry, the header's checksum, BAT entries that cannot be, blocks that lie over one another, a last block
    that is cut short, bits behind the end of the disk, wrong bits of a batmap, the names of the parent (blank,
    outside the file, behind the blocks, or leading elsewhere), lost space, and garbage or zeros behind the footer.

    \b
    With --json: {"path", "status": "clean" | "warnings" | "errors",
      "findings": [{"severity", "code", "message", "path", "structure",
                    "offset_bytes"}],
      with --repair also "repair": {"changed_bytes", "undo", "report", "dry_run",
        "fixes": [{"code", "message", "done", "needs", "lost", "doubtful"}]},
      with --restore also "restored_bytes"}
    """
    given = [name for name, value in (("--undo", undo), ("--accept-data-loss", accept_data_loss), ("--report", report),
             ("--writer-is-dead", writer_is_dead), ("--dry-run", dry_run)) if value]  # fmt: skip
    if not wanted and given:
        raise click.UsageError(f"{given[0]} goes with --repair")
    if wanted and undo_to_apply:
        raise click.UsageError("--repair or --restore, not both")
    more: dict[str, Any] = {}
    if wanted:
        with progress_shown(common, progress, "examining") as show:
            done = vhdkit.repair(
                image, accept_data_loss=accept_data_loss, writer_is_dead=writer_is_dead, undo=undo, report=report,
                options=common.options, dry_run=dry_run, progress=show,
            )  # fmt: skip
        findings = list(done.findings)
        more["repair"] = repair_document(done, dry_run=dry_run)
        if not common.quiet and not common.json:
            tell_repair(done, dry_run=dry_run)
    else:
        if undo_to_apply:
            more |= restore(image, undo_to_apply, common)
        with progress_shown(common, progress, "examining") as show:
            findings = vhdkit.check(image, options=common.options, progress=show)
    worst = max((one.severity for one in findings), default=None)
    status, code = _STATUS[worst]
    if common.json:
        documents = [finding_document(one) for one in findings]
        print_json({"path": image, "status": status, "findings": documents, **more})
    elif not common.quiet:
        _tell(image, findings, status)
    context.exit(code)


def _tell(image: str, findings: list[Finding], status: str) -> None:
    # A stable sort: within one severity the chain's order, leaf first, stays.
    for finding in sorted(findings, key=lambda one: -one.severity):
        print_finding(finding)
    number = Counter(one.severity for one in findings)
    said = [count(number[one], one.name.lower()) for one in reversed(Severity) if number[one]]
    style = {"clean": "bold green", "warnings": "bold yellow", "errors": "bold red"}[status]
    print_text(f"{printable(image)}: ", (status, style), f" ({', '.join(said)})" if said else "")
