# SPDX-License-Identifier: Apache-2.0
"""`info`, `chain` and `dump`: the metadata of an image, its parents, and its raw structures.

Decides which facts are shown on the terminal, and how they are worded. These verbs need neither a lock nor sound
parents: they work on an image in use, and on one without its parent.
"""

from __future__ import annotations

import os
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import click

from vhdkit import CorruptImage, FormatName, ParentMissing, UnsupportedFormat, formats
from vhdkit.chain.verbs.describe import ChainInfo, ImageInfo, ParentInfo, describe_chain, describe_image
from vhdkit.cli.common import PATH, Common, epilog, image_options, print_aside
from vhdkit.cli.output import (
    columns,
    exact_size,
    finding_document,
    is_unicode,
    print_finding,
    print_json,
    print_pairs,
    print_text,
)
from vhdkit.errors import printable
from vhdkit.formats.format import Format, StructureDump
from vhdkit.formats.probe import format_of
from vhdkit.store import FileStore
from vhdkit.units import format_size

_INDENT, _MAX_INDENTS = "   ", 8  # a deeper tree is not indented further
UNFINISHED = ("merge-unfinished", "merge-under-way", "change-unfinished", "change-under-way")
_HOSTS = {"Wi2k": "Windows", "Mac": "Macintosh"}


@click.command(
    "info",
    epilog=epilog("vhdkit info disk.vhd", "vhdkit info disk.vhd --json | jq .virtual_size_bytes"),
)
@click.argument("image", type=PATH)
@image_options()
def info_command(image: str, common: Common) -> None:
    """Show an image's kind, sizes, creator, space and parent, and anything unusual about it.

    Works on an image in use, and on one whose parent is missing.

    \b
    With --json: one object, with null for what this kind of image does not have:
      path kind virtual_size_bytes file_size_bytes allocated_bytes in_use
      unique_id
      creator creator_version creator_host created_unix_seconds geometry
      current_size_bytes original_size_bytes size_from_geometry saved_state hidden
      block_size_bytes block_count allocated_block_count batmap
      logical_sector_bytes physical_sector_bytes virtual_disk_id log_entries
      parent {name unique_id timestamp locators path problem
        allowed_folder allowed_by}
      findings [{severity code message path structure offset_bytes}]
    """
    facts = describe_image(image, options=common.options)
    if common.json:
        print_json(image_document(facts, common))
        return
    print_text((printable(facts.path), "bold"), f": {_kind_words(facts)}")
    rows = _fact_rows(facts, common.verbose)
    if facts.parent is not None:
        rows += _parent_rows(facts, facts.parent, common)
    print_pairs(rows)
    for finding in facts.findings if not common.quiet else ():
        print_finding(finding)


def image_document(facts: ImageInfo, common: Common) -> dict[str, Any]:
    """An image's facts for JSON."""
    document = {**asdict(facts), "findings": [finding_document(one) for one in facts.findings]}
    del document["title"]  # for people; programs have the kind
    if facts.parent is not None:
        document["parent"]["allowed_by"] = _why_allowed(facts, facts.parent, common)
    return document


def _why_allowed(facts: ImageInfo, parent: ParentInfo, common: Common) -> str | None:
    return None if parent.allowed_folder is None else common.why_allowed(parent.allowed_folder, facts.path)


def _kind_words(facts: ImageInfo) -> str:
    return "raw image" if facts.kind == "raw" else facts.title


def _fact_rows(facts: ImageInfo, verbose: bool) -> list[tuple[str, str]]:
    rows = [
        ("virtual size", exact_size(facts.virtual_size_bytes)),
        ("file size", f"{exact_size(facts.file_size_bytes)}, {format_size(facts.allocated_bytes)} on disk"),
    ]
    if facts.block_size_bytes is not None:
        blocks = f"{facts.allocated_block_count} of {facts.block_count} allocated"
        rows.append(("blocks", f"{blocks}, {format_size(facts.block_size_bytes)} each"))
    if facts.logical_sector_bytes is not None:
        rows.append(("sectors", f"{facts.logical_sector_bytes} bytes, physically {facts.physical_sector_bytes}"))
    rows.append(("unique id", facts.unique_id or ""))
    rows.append(("disk id", facts.virtual_disk_id or ""))
    if facts.log_entries is not None:
        rows.append(("log", f"{facts.log_entries} entries not replayed" if facts.log_entries else "empty"))
    if facts.created_unix_seconds is not None:
        known = (facts.creator_host or "").strip("\0 ")
        host = f" on {_HOSTS.get(known, repr(known))}" if known else ""
        creator = f"by {facts.creator!r} {facts.creator_version}{host}"
        rows.append(("created", f"{_date(facts.created_unix_seconds)} {creator}"))
    if facts.geometry is not None:
        meaning = ", which is the virtual size" if facts.size_from_geometry else ""
        cylinders, heads, sectors = facts.geometry
        rows.append(("geometry", f"{cylinders} cylinders, {heads} heads, {sectors} sectors{meaning}"))
    if verbose and facts.current_size_bytes is not None and facts.original_size_bytes is not None:
        rows.append(("current size", exact_size(facts.current_size_bytes)))
        rows.append(("original size", exact_size(facts.original_size_bytes)))
    flags = {"saved state": facts.saved_state, "hidden": facts.hidden, "Xen batmap": facts.batmap}
    rows.append(("marks", ", ".join(name for name, is_set in flags.items() if is_set)))
    rows.append(("in use", "yes, another program is writing to it" if facts.in_use else ""))
    return rows


def _date(unix_seconds: int) -> str:
    return f"{datetime.fromtimestamp(unix_seconds, UTC):%Y-%m-%d %H:%M:%S} UTC"


def _parent_rows(facts: ImageInfo, parent: ParentInfo, common: Common) -> list[tuple[str, str]]:
    where = parent.path if parent.path is not None else f"{parent.name or '(unnamed)'}, NOT USABLE"
    rows = [("parent", where), ("parent id", parent.unique_id)]
    why = _why_allowed(facts, parent, common)
    rows.append(("allowed in", f"{parent.allowed_folder} ({why})" if why else ""))
    if common.verbose:
        rows += [(f"locator {code}", text or "(unreadable)") for code, text in parent.locators]
    rows.append(("problem", parent.problem or ""))
    return rows


@click.command(
    "chain",
    epilog=epilog(
        "vhdkit chain leaf.avhd", codes="Exit code 6 when a parent is missing or refused, 3 when a file is damaged."
    ),
)
@click.argument("image", type=PATH)
@image_options()
@click.pass_context
def chain_command(context: click.Context, image: str, common: Common) -> None:
    """Show an image and its parents, leaf first, and how much each layer owns.

    "owns" counts what a layer provides to the disk as the leaf shows it; data that a newer layer hides does not
    count. A broken chain is shown as far as it can be followed.

    \b
    With --json: {"layers": [{...as info..., "owned_bytes"}], "unowned_bytes",
                  "problem", "damaged"}
    The leaf comes first; owned_bytes and unowned_bytes are null where the chain
    is broken.
    """
    facts = describe_chain(image, options=common.options)
    if common.json:
        layers = [{**image_document(one.image, common), "owned_bytes": one.owned_bytes} for one in facts.layers]
        print_json(
            {
                "layers": layers,
                "unowned_bytes": facts.unowned_bytes,
                "problem": facts.problem,
                "damaged": facts.damaged,
            }
        )
    else:
        _print_tree(facts, common)
    if facts.problem is not None:
        if not common.json:
            # The problem itself names a damaged file; for a missing parent it is the child that is named here.
            whose = "" if facts.damaged else f"{facts.layers[-1].image.path}: "
            print_aside(f"vhdkit: {whose}{facts.problem}")
        context.exit((CorruptImage if facts.damaged else ParentMissing).exit_code)


def _print_tree(facts: ChainInfo, common: Common) -> None:
    branch = "└─ " if is_unicode() else "`- "
    home = os.path.dirname(os.path.abspath(facts.layers[0].image.path))
    rows = [["", "layer", "kind", "virtual size", "file on disk", "owns"]]
    for depth, layer in enumerate(facts.layers):
        image = layer.image
        name = image.path if depth == 0 else _short(image.path, home)
        tree = "" if depth == 0 else _INDENT * min(depth - 1, _MAX_INDENTS) + branch
        owns = "?" if layer.owned_bytes is None else format_size(layer.owned_bytes)
        rows.append(
            [str(depth), tree + printable(name), image.kind, format_size(image.virtual_size_bytes),
             format_size(image.allocated_bytes), owns + (", in use" if image.in_use else "")]
        )  # fmt: skip
    lost = facts.layers[-1].image.parent
    if facts.problem is not None and lost is not None:
        tree = _INDENT * min(len(facts.layers) - 1, _MAX_INDENTS) + branch
        rows.append(["?", f"{tree}{printable(lost.name or '(unnamed)')}", "not usable", "", "", ""])
    elif facts.unowned_bytes is not None:
        rows.append(["", "unowned zeros", "", "", "", format_size(facts.unowned_bytes)])
    for index, line in enumerate(columns(rows, "rllrrl")):
        style = "dim" if index == 0 else "bold" if index == 1 else "red" if line.startswith("?") else ""
        print_text((line, style))
    for layer in facts.layers if not common.quiet else ():
        for finding in layer.image.findings:
            if finding.code in UNFINISHED:
                print_finding(finding)
    if common.verbose:
        for depth, layer in enumerate(facts.layers):
            print_pairs([(f"{depth} path", os.path.abspath(layer.image.path)), ("  id", layer.image.unique_id or "")])


def _short(path: str, home: str) -> str:
    """The path from the leaf's folder when it lies there or below, else whole."""
    relative = os.path.relpath(path, home)
    return path if relative.startswith(os.pardir) else relative


@click.command(
    "dump",
    epilog=epilog("vhdkit dump disk.vhd", "vhdkit dump --json broken.vhd"),
)
@click.argument("image", type=PATH)
@image_options()
def dump_command(image: str, common: Common) -> None:
    """Show the raw structures of a VHD or VHDX field by field with their offsets, even where they are damaged.

    Of a VHD: both footers, the dynamic header, the parent locators and a batmap header. Of a VHDX: the file type
    identifier, both headers, the log, both region tables, the metadata and the parent locator.

    \b
    With --json: [{"structure", "offset_bytes", "state",
                   "fields": [{"name", "offset_bytes", "size_bytes", "value"}]}]
    """
    with FileStore.open(image) as store:
        image_format = _format_to_show(store, common.options.format_name)
        if image_format.is_plain:
            raise UnsupportedFormat(
                "is a raw image: it has no structures to show",
                path=image,
                hint="if it is a damaged VHD, add --format vhd",
            )
        dumps = image_format.dump(store)
    if common.json:
        print_json([asdict(one) for one in dumps])
        return
    for number, one in enumerate(dumps):
        if number:
            print_text("")
        _print_structure(one)


def _format_to_show(store: FileStore, format_name: FormatName | None) -> Format:
    """The format of the file, or the one that its name suggests. Raises for other formats and empty files."""
    try:
        return format_of(store, format_name)
    except CorruptImage:  # the name of a VHD, but no footer left: this verb shows what there is
        called = formats.by_suffix(store.name)
        if called is None:
            raise
        return called


def _print_structure(dump: StructureDump) -> None:
    good = dump.state.startswith(("good", "present"))
    print_text(
        (dump.structure, "bold"),
        f" at byte {dump.offset_bytes:#x}: ",
        (printable(dump.state), "green" if good else "red"),
    )
    rows = [
        [f"{field.offset_bytes:#x}", str(field.size_bytes), field.name, printable(field.value)]
        for field in dump.fields
    ]
    for line in columns(rows, "rrll") if rows else ():
        print_text("  ", line)
