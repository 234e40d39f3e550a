# SPDX-License-Identifier: Apache-2.0
"""`export` and `import`: moving machines to another host."""

from __future__ import annotations

from dataclasses import asdict

import click

from vmm.api.export_import.exporting import TransferResult, export
from vmm.api.export_import.foreign import ALLOWANCES, Consent
from vmm.api.export_import.importing import import_machine
from vmm.cli.common import epilog, output_options, print_json, print_line, progress_line


def report(done: TransferResult, words: str, *, as_json: bool, quiet: bool) -> None:
    """Report what was done."""
    if as_json:
        print_json(asdict(done))
    elif not quiet:
        images = f"{done.images} image{'s' if done.images != 1 else ''}"
        snapshots = f", {done.snapshots} snapshot{'s' if done.snapshots != 1 else ''}" if done.snapshots else ""
        print_line(f"{words}: {images}{snapshots}")


@click.command("export", epilog=epilog("vmm export web /mnt/usb/web", "vmm export web /mnt/usb/web --flat"))
@click.argument("machine")
@click.argument("folder", type=click.Path())
@click.option("--snapshot", help="Export the state at this snapshot instead of the present one.")
@click.option("--flat", is_flag=True, help="Write one image for each disk, without parents and snapshots.")
@output_options
def export_command(machine: str, folder: str, snapshot: str | None, flat: bool, as_json: bool, quiet: bool) -> None:
    """Export MACHINE, which must be off or saved, to the new FOLDER: configuration, snapshots, all images, saved
    memory.

    Images shared with other machines are copied, too, so the folder is complete. `vmm import` creates a machine from
    it.
    """
    with progress_line(shown=not quiet and not as_json) as progress:
        done = export(machine, folder, snapshot=snapshot, flat=flat, progress=progress)
    report(done, f"{machine} is in {done.folder}", as_json=as_json, quiet=quiet)


@click.command(
    "import",
    epilog=epilog(
        "vmm import /mnt/usb/web",
        "vmm import /srv/web --register",
        "vmm import /mnt/usb/web --switch lan=office --map /isos/a.iso=/srv/a.iso",
    ),
)
@click.argument("folder", type=click.Path())
@click.option("--name", help="Name of the machine; by default its old name.")
@click.option("--register", is_flag=True, help="Use the files where they are, with the old id, instead of copying.")
@click.option("--map", "paths", metavar="OLD=NEW", multiple=True,
              help="Replace OLD, a file, device or folder outside FOLDER, with NEW; an empty NEW"
                   " leaves it out. Repeatable.")  # fmt: skip
@click.option("--switch", "switches", metavar="OLD=NEW", multiple=True,
              help="Connect adapters of the switch OLD to NEW, '-' for none. Repeatable.")  # fmt: skip
@click.option("--allow", type=click.Choice(list(ALLOWANCES)), multiple=True,
              help="Let the machine have this setting. Repeatable.")  # fmt: skip
@output_options
def import_command(
    folder: str,
    name: str | None,
    register: bool,
    paths: tuple[str, ...],
    switches: tuple[str, ...],
    allow: tuple[str, ...],
    as_json: bool,
    quiet: bool,
) -> None:
    """Create a machine from FOLDER, which `vmm export` wrote. Every file is checked before anything is changed.

    A copy gets an id of its own, so it can exist several times, and beside the original. FOLDER need not be
    trusted: a machine that would reach outside FOLDER is refused, and each problem is listed with the option that
    allows it. What was allowed is printed before the machine is created.
    """
    consent = Consent(dict(pair(word, "--map") for word in paths),
                      dict(pair(word, "--switch") for word in switches), frozenset(allow))  # fmt: skip
    with progress_line(shown=not quiet and not as_json) as progress:
        done = import_machine(
            folder, name=name, register=register, consent=consent, progress=progress,
            announce=lambda words: None if quiet or as_json else print_line(f"allowed: {words}"),
        )  # fmt: skip
    report(done, f"{done.name} is imported", as_json=as_json, quiet=quiet)


def pair(word: str, option: str) -> tuple[str, str]:
    """Parse OLD=NEW; OLD, which comes from the export, may contain any number of "="."""
    old, sign, new = word.rpartition("=")
    if not sign or not old:
        raise click.BadParameter(f"{word!r} is not OLD=NEW", param_hint=option)
    return old, new
