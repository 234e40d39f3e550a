# SPDX-License-Identifier: Apache-2.0
"""`repair`: finds the newest image of a machine that has lost track of it.

Decides how the result is reported, and that the user must confirm it. What is wrong and how to repair it is decided in
`vmm.api.repair`.
"""

from __future__ import annotations

import dataclasses

import click

from vmm.api.manager import Manager
from vmm.api.repair import RepairStep
from vmm.cli.common import confirm, epilog, output_options, print_json, print_line


@click.command("repair", epilog=epilog("vmm repair web --dry-run", "vmm repair web --yes"))
@click.argument("name")
@click.option("--dry-run", is_flag=True, help="Only show what was found and what would be done.")
@click.option("--yes", is_flag=True, help="Do not ask for confirmation.")
@click.option("--leaf", metavar="IMAGE", help="The newest image, if it cannot be determined.")
@click.option("--give-up-missing", is_flag=True,
              help="Give up a newest image that is lost, and continue with the one below it.")  # fmt: skip
@output_options
def repair_command(
    name: str, dry_run: bool, yes: bool, leaf: str | None, give_up_missing: bool, as_json: bool, quiet: bool
) -> None:
    """Find the newest images of the machine NAME, which must be off, and use them.

    This is for a machine whose definition names an image that is missing, or on which another image builds; vmm 0.1.0
    could leave such a machine when it was killed. Nothing is removed or moved, and nothing is guessed.
    """
    manager = Manager()
    found = manager.repair(name, dry_run=True, leaf=leaf, give_up_missing=give_up_missing)
    if not as_json and not quiet:
        _tell(name, found)
    if not dry_run and any(step.remedy is not None for step in found):
        confirm("Do this?", yes=yes)
        found = manager.repair(name, leaf=leaf, give_up_missing=give_up_missing)
        if not as_json and not quiet:
            print_line("done")
    if as_json:
        print_json([dataclasses.asdict(step) for step in found])


def _tell(name: str, found: list[RepairStep]) -> None:
    if not found:
        print_line(f"{name}: its disks are in order")
    for step in found:
        place = "" if step.disk is None else f"{step.disk}: {step.path}: "
        print_line(f"{place}{step.problem}")
        print_line(f"    -> {step.remedy}" if step.remedy is not None else f"    {step.hint}")
