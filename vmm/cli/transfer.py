# SPDX-License-Identifier: Apache-2.0
"""`export` and `import`: machines on their way to another host."""

from __future__ import annotations

from dataclasses import asdict

import click

from vmm.cli.common import epilog, output_options, print_json, print_line, progress_line
from vmm.transfer import Transfer, export, import_machine


def told(done: Transfer, words: str, *, as_json: bool, quiet: bool) -> None:
    """Say what was done."""
    if as_json:
        print_json(asdict(done))
    elif not quiet:
        images = f"{done.images} image{'s' if done.images != 1 else ''}"
        snapshots = f", {done.snapshots} snapshot{'s' if done.snapshots != 1 else ''}" if done.snapshots else ""
        print_line(f"{words}: {images}{snapshots}")


@click.command("export", epilog=epilog("vmm export web /mnt/usb/web", "vmm export web /mnt/usb/web --flat"))
@click.argument("machine")
@click.argument("folder", type=click.Path())
@click.option("--snapshot", help="As it was at this snapshot, instead of as it is.")
@click.option("--flat", is_flag=True, help="One image for each disk, without parents and snapshots.")
@output_options
def export_command(machine: str, folder: str, snapshot: str | None, flat: bool, as_json: bool, quiet: bool) -> None:
    """Put MACHINE, which is off or saved, into the new FOLDER: configuration, snapshots, all images, saved memory.

    Images that others share are copied, too: the folder needs nothing else. `vmm import` makes a machine of it.
    """
    with progress_line(shown=not quiet and not as_json) as progress:
        done = export(machine, folder, snapshot=snapshot, flat=flat, progress=progress)
    told(done, f"{machine} is in {done.folder}", as_json=as_json, quiet=quiet)


@click.command("import", epilog=epilog("vmm import /mnt/usb/web", "vmm import /srv/web --register"))
@click.argument("folder", type=click.Path())
@click.option("--name", help="What to call the machine; by default as it was called.")
@click.option("--register", is_flag=True, help="Use the files where they lie, and the old id, instead of a copy.")
@output_options
def import_command(folder: str, name: str | None, register: bool, as_json: bool, quiet: bool) -> None:
    """Make a machine out of FOLDER, which `vmm export` wrote. Every file is checked before anything is changed.

    A copy has an id of its own, so it can be there more than once, and beside the original.
    """
    with progress_line(shown=not quiet and not as_json) as progress:
        done = import_machine(folder, name=name, register=register, progress=progress)
    told(done, f"{done.name} is there", as_json=as_json, quiet=quiet)
