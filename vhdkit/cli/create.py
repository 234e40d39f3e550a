# SPDX-License-Identifier: Apache-2.0
"""`create`: a new empty image, or a new child of an image.

Decides which options exclude each other and what is reported about the new file.
"""

from __future__ import annotations

import os

import click

import vhdkit
from vhdkit import DiskFormat, OpenOptions, formats
from vhdkit.chain.names.parents import refuse_child_name
from vhdkit.cli.common import BLOCK_SIZE_HELP, PATH, Common, disk_size, epilog, image_options
from vhdkit.cli.common import size as parsed_size
from vhdkit.cli.naming import (
    format_by_name,
    note_other_name,
    refuse_contradiction,
    refuse_other_name,
)
from vhdkit.cli.output import exact_size, note, note_rounding, print_json
from vhdkit.errors import printable
from vhdkit.folder import is_within, real_path
from vhdkit.store import FileStore
from vhdkit.units import DiskSize, format_size

_EXAMPLES = (
    "vhdkit create disk.vhd --size 10G",
    "vhdkit create azure.vhd --size 30G --azure",
    "vhdkit create child.avhd --parent disk.vhd",
)


@click.command("create", epilog=epilog(*_EXAMPLES))
@click.argument("path", type=PATH)
@click.option("--size", type=disk_size,
              help="Virtual size, such as 10G, in whole sectors. A child may be larger than its parent.")  # fmt: skip
@click.option("--parent", type=PATH, help="Make a differencing image on this parent, which is not changed.")
@click.option("--format", "disk_format", type=click.Choice([one.value for one in DiskFormat]),
              help="Kind of the new image; by default vhdx for a name in .vhdx, else dynamic.")  # fmt: skip
@click.option("--block-size", type=parsed_size, help=BLOCK_SIZE_HELP)
@click.option("--sector-size", type=click.Choice(["512", "4096"]), help="Logical sector size of a VHDX, in bytes.")
@click.option("--preallocate", is_flag=True, help="Allocate the whole space of a fixed or raw image now.")
@click.option("--azure", is_flag=True, help="Make a fixed VHD of whole MiB, as Azure requires.")
@click.option("--force", is_flag=True, help="Replace an existing file, unless it is in use or a parent.")
@image_options(leaf_format=False)
def create_command(
    path: str, size: DiskSize | None, parent: str | None, disk_format: str | None, block_size: int | None,
    sector_size: str | None, preallocate: bool, azure: bool, force: bool, common: Common,
) -> None:  # fmt: skip
    """Create an image of zeros, or with --parent an empty child.

    A child has its parent's format: a VHDX has children that are VHDXs, a VHD or a raw disk has VHDs.

    \b
    With --json: {"path", "format", "virtual_size_bytes", "parent", "open_with"}
    where open_with lists the options that opening the new image needs.
    """
    if parent is not None:
        if disk_format is not None or preallocate or azure or sector_size is not None:
            raise click.UsageError(
                "a child is a differencing image with its parent's format and sectors:"
                " leave out --format, --sector-size, --preallocate and --azure"
            )
        refuse_child_name(path, parent)
        made = vhdkit.create_child(
            path, parent, size_bytes=size, block_size_bytes=block_size, options=common.options, replace=force
        )  # fmt: skip
        note_rounding(common, size)
        note_larger_child(common, path, trusting(path, parent, common.options))
        needed = needed_to_open(path, parent, common.options)
        with FileStore.open(path) as store:
            made_format = formats.probed(store)
        note_other_name(common, path, made_format)
        _print_result(common, path, "differencing", f"differencing {made_format.title}", made, parent, needed)
        return
    if size is None:
        raise click.UsageError("give the size with --size (such as 10G), or a parent with --parent")
    if disk_format is None and not azure:
        refuse_other_name(path)
    default = DiskFormat.FIXED if azure else format_by_name(path) or DiskFormat.DYNAMIC
    kind = DiskFormat(disk_format or default)
    refuse_contradiction(path, kind, "--format")
    if block_size is not None and not kind.has_blocks:
        raise click.UsageError(f"a {kind} image has no blocks: leave out --block-size")
    sizes = {} if block_size is None else {"block_size_bytes": block_size}
    if sector_size is not None:
        sizes["sector_bytes"] = int(sector_size)
    made = vhdkit.create_image(
        path, size, disk_format=kind, preallocate=preallocate, azure=azure, replace=force, **sizes
    )
    if made != size:
        asked = size.asked or str(int(size))
        unit = " bytes" if asked.isdigit() else ""
        note(common, f"rounded {asked}{unit} up to {made} bytes ({format_size(made)}): Azure requires whole MiB")
    else:
        note_rounding(common, size)
    note_other_name(common, path, formats.making(kind))
    _print_result(common, path, kind.value, kind.label, made, None, [])


def _print_result(
    common: Common, path: str, kind: str, label: str, size_bytes: int, parent: str | None, needed: list[list[str]]
) -> None:
    if common.json:
        document = {
            "path": path,
            "format": kind,
            "virtual_size_bytes": size_bytes,
            "parent": parent,
            "open_with": [word for option in needed for word in option],
        }
        print_json(document)
    elif not common.quiet:
        on = "" if parent is None else f" on {printable(parent)}"
        click.echo(f"created {printable(path)}: {label}, {exact_size(size_bytes)}{on}")
    if needed:
        note(common, "opening it requires " + " ".join(word for option in needed for word in option))


def note_larger_child(common: Common, path: str, options: OpenOptions) -> None:
    """Note which programs cannot use an image that is larger than its parent."""
    with vhdkit.open_disk(path, options=options) as disk:
        sizes = [layer.size_bytes for layer in disk.chain.layers[:2]]
        text = formats.of(disk.chain.leaf).larger_child
    if len(sizes) > 1 and sizes[0] > sizes[1] and text:
        note(common, text)


def trusting(path: str, parent: str, options: OpenOptions) -> OpenOptions:
    """Options that open a new child of `parent`; opening the parent allowed the parent's own folder."""
    folders = (
        os.path.dirname(real_path(path)),
        *(real_path(folder) for folder in options.parent_dirs),
        os.path.dirname(real_path(parent)),
    )
    return OpenOptions(parent_dirs=folders, allow_raw_parent=True, ignore_bitmaps=options.ignore_bitmaps, lock=False)


def needed_to_open(path: str, parent: str, options: OpenOptions) -> list[list[str]]:
    """The options that opening the new child needs, because of where its chain lies or what its base is."""
    home = os.path.dirname(real_path(path))
    with vhdkit.open_disk(path, options=trusting(path, parent, options)) as disk:
        layers = disk.chain.layers
        outside = dict.fromkeys(
            os.path.dirname(real_path(layer.store.name))
            for layer in layers
            if not is_within(real_path(layer.store.name), (home,))
        )
        needed = [["--allow-parent-dir", folder] for folder in outside]
        if layers[-1].unique_id is None:
            needed.append(["--allow-raw-parent"])
    return needed
