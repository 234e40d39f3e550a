# SPDX-License-Identifier: Apache-2.0
"""`check`: everything that can be said against an image and its parents.

Decides the order in which findings are shown and the exit code they make.
"""

from __future__ import annotations

from collections import Counter

import click

import vhdkit
from vhdkit import Finding, Severity
from vhdkit.cli.common import PATH, Common, epilog, image_options
from vhdkit.cli.output import count, finding_document, print_finding, print_json, print_text
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
    short_help="Examine an image and its parents.",
    epilog=epilog(
        "vhdkit check leaf.avhd",
        codes="Exit code 0 when clean (notes do not count), 3 for errors, 4 for warnings only.",
    ),
)
@click.argument("image", type=PATH)
@image_options()
@click.pass_context
def check_command(context: click.Context, image: str, common: Common) -> None:
    """Examine an image and its parents; nothing is changed.

    Footers, header, BAT, bitmaps, locators, lost space, and whether the files of the chain belong together.
    An error means that bytes are read wrong or not at all; a warning, that others may read them differently
    or that space is lost.

    \b
    With --json: {"path", "status": "clean" | "warnings" | "errors",
                  "findings": [{"severity", "code", "message", "path", "structure", "offset_bytes"}]}
    """
    findings = vhdkit.check(image, options=common.options)
    worst = max((one.severity for one in findings), default=None)
    status, code = _STATUS[worst]
    if common.json:
        documents = [finding_document(one) for one in findings]
        print_json({"path": image, "status": status, "findings": documents})
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
