# SPDX-License-Identifier: Apache-2.0
"""`check`: everything that is wrong with an image and its parents.

Decides the order in which findings are shown, and the exit code.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import click

import vhdkit
from vhdkit import Finding, Severity
from vhdkit.cli.common import PATH, Common, dry_run_option, epilog, image_options, progress_option
from vhdkit.cli.output import count, finding_document, print_finding, print_json, print_text
from vhdkit.cli.progress import progress_shown
from vhdkit.cli.repair import print_repair, repair_document, restore
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
        codes="Exit code 0 if clean (notes do not count), 3 for errors, 4 for warnings only; after a repair, for what"
        " remains.",
    ),
)
@click.argument("image", type=PATH)
@click.option("--repair", "wanted", is_flag=True, help="Repair what can be repaired in IMAGE, then check it again.")
@click.option("--undo", metavar="FILE", type=PATH, help="With --repair: back up every byte that changes to FILE.")
@click.option("--accept-data-loss", is_flag=True,
              help="With --repair: also repair what may lose content, such as impossible BAT entries; give up what a"
                   " killed server had noted elsewhere.")  # fmt: skip
@click.option("--report", metavar="FILE", type=PATH,
              help="The list of lost ranges; IMAGE.lost.json by default.")  # fmt: skip
@click.option("--writer-is-dead", is_flag=True,
              help="With --repair: remove the in-use mark (0xC7, v_poison) of a program that has died.")  # fmt: skip
@click.option("--remember", metavar="DIR", type=PATH,
              help="With --repair: first write what a killed `serve --remember DIR` had noted of IMAGE.")  # fmt: skip
@click.option("--restore", "undo_to_apply", metavar="FILE", type=PATH, help="Undo a repair with its backup.")
@dry_run_option
@image_options()
@progress_option
@click.pass_context
def check_command(
    context: click.Context, image: str, wanted: bool, undo: str | None, accept_data_loss: bool, report: str | None,
    writer_is_dead: bool, remember: str | None, undo_to_apply: str | None, dry_run: bool, common: Common,
    progress: bool | None,
) -> None:  # fmt: skip
    """Check an image and its parents; without --repair or --restore nothing is changed.

    Covers footers, headers, region tables, log, BAT, bitmaps, locators, lost space, and whether the files of the
    chain belong together.
    An error means that data is read wrong or not at all; a warning, that other programs may read it differently
    or that space is lost.

    --repair changes IMAGE alone, and atomically: after a power cut all of it is done, or nothing. It repairs footers,
    their checksums and their geometry, the header's checksum, impossible BAT entries, overlapping blocks, a truncated
    last block, bits past the end of the disk, wrong bits of a batmap, the names of the parent (blank, outside the
    file, after the blocks, or leading elsewhere), lost space, and garbage or zeros after the footer. Of a VHDX it
    repairs the identifier, headers, log, region tables, parent locator, BAT and sector bitmaps.

    \b
    With --json: {"path", "status": "clean" | "warnings" | "errors",
      "findings": [{"severity", "code", "message", "path", "structure",
                    "offset_bytes"}],
      with --repair also "repair": {"changed_bytes", "undo", "report", "dry_run",
        "fixes": [{"code", "message", "done", "needs", "lost", "doubtful"}]},
      with --restore also "restored_bytes"}
    """
    given = [name for name, value in (("--undo", undo), ("--accept-data-loss", accept_data_loss), ("--report", report),
             ("--writer-is-dead", writer_is_dead), ("--remember", remember), ("--dry-run", dry_run))
             if value]  # fmt: skip
    if not wanted and given:
        raise click.UsageError(f"{given[0]} requires --repair")
    if wanted and undo_to_apply:
        raise click.UsageError("--repair and --restore cannot be combined")
    more: dict[str, Any] = {}
    if wanted:
        with progress_shown(common, progress, "checking") as show:
            done = vhdkit.repair(
                image, accept_data_loss=accept_data_loss, writer_is_dead=writer_is_dead, undo=undo, report=report,
                options=replace(common.options, notes_folder=remember), dry_run=dry_run, progress=show,
            )  # fmt: skip
        findings = list(done.findings)
        more["repair"] = repair_document(done, dry_run=dry_run)
        if not common.quiet and not common.json:
            print_repair(done, dry_run=dry_run)
    else:
        if undo_to_apply:
            more |= restore(image, undo_to_apply, common)
        with progress_shown(common, progress, "checking") as show:
            findings = vhdkit.check(image, options=common.options, progress=show)
    worst = max((one.severity for one in findings), default=None)
    status, code = _STATUS[worst]
    if common.json:
        documents = [finding_document(one) for one in findings]
        print_json({"path": image, "status": status, "findings": documents, **more})
    elif not common.quiet:
        _print_result(image, findings, status)
    context.exit(code)


def _print_result(image: str, findings: list[Finding], status: str) -> None:
    # A stable sort: within one severity the chain's order, leaf first, stays.
    for finding in sorted(findings, key=lambda one: -one.severity):
        print_finding(finding)
    number = Counter(one.severity for one in findings)
    counts = [count(number[one], one.name.lower()) for one in reversed(Severity) if number[one]]
    style = {"clean": "bold green", "warnings": "bold yellow", "errors": "bold red"}[status]
    print_text(f"{printable(image)}: ", (status, style), f" ({', '.join(counts)})" if counts else "")
