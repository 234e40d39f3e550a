# SPDX-License-Identifier: Apache-2.0
"""`backup run`: copies all disks of a machine, as they are at one moment, into a folder."""

from __future__ import annotations

from dataclasses import asdict

import click

from vmm.api.manager import Manager
from vmm.cli.common import epilog, output_options, print_json, print_line, progress_line


@click.command("run", epilog=epilog("vmm backup run web /backups/web-monday"))
@click.argument("name")
@click.argument("folder", metavar="DIR")
@output_options
def run_command(name: str, folder: str, as_json: bool, quiet: bool) -> None:
    """Copy all disks of the machine NAME, and its definition, into the new folder DIR. The machine may keep running.

    The copies are dynamic images without parents, VHDXs of VHDX disks and VHDs of others, and all show the same
    moment. If the guest agent is running, the guest's file systems are flushed and frozen for that moment; otherwise
    the copies are as after a power cut. Memory is not copied.
    """
    with progress_line(shown=not quiet and not as_json) as progress:
        result = Manager().backup(name, folder, progress=progress)
    if as_json:
        print_json(asdict(result))
    elif not quiet:
        how = "with flushed file systems" if result.consistent else "as after a power cut"
        number = len(result.disks)
        print_line(f"{name}: {number} {'disk' if number == 1 else 'disks'} in {result.folder}, {how}")
