# SPDX-License-Identifier: Apache-2.0
"""`convert`: a disk with all its parents as a new image of another kind, or through a pipe.

Decides when a pipe is meant, that a terminal never gets a disk's bytes, and what is reported at the end.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import click

from vhdkit import DiskFormat, InvalidArgument, formats
from vhdkit.chain.engine.chain import Chain
from vhdkit.chain.records.pending import file_of
from vhdkit.chain.verbs.convert import convert_chain
from vhdkit.chain.verbs.stream import export_stream, import_stream, pass_stream
from vhdkit.cli.common import BLOCK_SIZE_HELP, PATH, STREAM, Common, epilog, image_options, progress_option
from vhdkit.cli.common import size as parsed_size
from vhdkit.cli.naming import format_by_name, note_other_name, refuse_contradiction
from vhdkit.cli.output import exact_size, note, print_json
from vhdkit.cli.pipes import PipeReader, PipeWriter
from vhdkit.cli.progress import progress_shown
from vhdkit.errors import printable
from vhdkit.formats.format import DEFAULT_BLOCK_SIZE
from vhdkit.named import identity_of
from vhdkit.store import translated
from vhdkit.units import SECTOR_SIZE, format_size

_EXAMPLES = (
    "vhdkit convert leaf.avhd disk.vhd --to fixed",
    "vhdkit convert disk.raw disk.vhd --to dynamic --block-size 512K",
    "vhdkit convert leaf.avhd - --to raw | zstd > disk.raw.zst",
    "curl https://example.org/disk.raw | vhdkit convert - disk.vhd --to dynamic",
)


@dataclass(frozen=True, slots=True)
class _Conversion:
    """What the command line requests. A path of `-` is a pipe."""

    source: str
    destination: str
    kind: DiskFormat
    block_size_bytes: int
    azure: bool
    accept_sector_size: bool
    replace: bool
    sync: bool


@click.command("convert", epilog=epilog(*_EXAMPLES))
@click.argument("source", metavar="SRC", type=PATH)
@click.argument("destination", metavar="DST", type=PATH)
@click.option("--to", "kind", type=click.Choice([one.value for one in DiskFormat]),
              help="Kind of the new image; by default what DST's name says (.vhd, .vhdx, .raw).")  # fmt: skip
@click.option("--azure", is_flag=True, help="Make a fixed VHD of whole MiB, as Azure requires.")
@click.option("--accept-sector-size", is_flag=True,
              help="Convert a disk with sectors of 4096 bytes to a VHD, whose sectors have 512.")  # fmt: skip
@click.option("--block-size", type=parsed_size, help=BLOCK_SIZE_HELP)
@click.option(
    "--force",
    is_flag=True,
    help="Replace an existing file, unless it is in use, a parent, or in SRC's chain.",
)
@click.option(
    "--no-sync",
    is_flag=True,
    help="Do not wait until the result is flushed to the device: a power cut soon after may leave DST damaged.",
)
@image_options()
@progress_option
def convert_command(
    source: str, destination: str, kind: str | None, azure: bool, accept_sector_size: bool,
    block_size: int | None, force: bool, no_sync: bool, common: Common, progress: bool | None,
) -> None:  # fmt: skip
    """Write the content of SRC, with all its parents, to a new image DST.

    Zeros become holes. DST is created completely or not at all. SRC or DST may be - for a pipe: raw images and fixed
    VHDs can be read from one and written to one, and every kind can be made from one. --format gives the format of
    SRC. On a file system that can share space between files (XFS, Btrfs), a raw or fixed DST shares that of SRC, zeros
    included, and nothing is copied.

    A VHDX keeps the sector size of the disk. A disk with sectors of 4096 bytes becomes a VHD only with
    --accept-sector-size, because its partition table counts in these sectors. A raw image records no sector size:
    attach it with sectors of 4096 bytes. A VHD holds up to 2040 GiB.

    \b
    With --json: {"source", "destination", "format", "virtual_size_bytes",
                  "seconds", "bytes_per_second"}
    """
    default = DiskFormat.FIXED if azure else format_by_name(destination, raw=True)
    target = DiskFormat(kind) if kind is not None else default
    if target is None:
        raise click.UsageError(f"choose the kind of image with --to: {', '.join(one.value for one in DiskFormat)}")
    refuse_contradiction(destination, target, "--to")
    if block_size is not None and not target.has_blocks:
        raise click.UsageError(f"a {target} image has no blocks: leave out --block-size")
    if destination == STREAM and common.json:
        raise click.UsageError("standard output cannot take both the disk and the JSON document")
    job = _Conversion(
        source, destination, target, block_size or DEFAULT_BLOCK_SIZE, azure, accept_sector_size, force, not no_sync
    )
    begin = time.monotonic()
    size_bytes = _run(job, common, progress)
    _print_result(job, size_bytes, time.monotonic() - begin, common)


def _run(job: _Conversion, common: Common, wanted: bool | None) -> int:
    """Convert; returns the virtual size of the result."""
    if job.source == STREAM:
        return _from_pipe(job, common, wanted)
    with Chain.open(job.source, options=common.options) as chain:
        odd = chain.leaf.store.size() if not chain.leaf.block_size_bytes else 0
        if odd % SECTOR_SIZE and odd < chain.size_bytes:
            note(
                common, f"rounded {odd} bytes up to {chain.size_bytes}: a disk is whole sectors of {SECTOR_SIZE} bytes"
            )
        with progress_shown(common, wanted, "converting") as show:
            if job.destination == STREAM:
                output = _standard_output()
                _refuse_layers(output, chain)
                made = export_stream(
                    chain, output.write, job.kind, azure=job.azure,
                    accept_sector_size=job.accept_sector_size, progress=show,
                )  # fmt: skip
                output.flush()
            else:
                made = convert_chain(
                    chain, job.destination, job.kind, block_size_bytes=job.block_size_bytes,
                    azure=job.azure, accept_sector_size=job.accept_sector_size, replace=job.replace, sync=job.sync,
                    options=common.options, progress=show,
                )  # fmt: skip
        sectors = chain.leaf.sector_bytes
        if sectors not in formats.making(job.kind).sector_sizes:
            note(common, f"the disk has sectors of {sectors} bytes: attach the result with that sector size")
        if made != chain.size_bytes:
            note(
                common,
                f"rounded {chain.size_bytes} bytes up to {made} ({format_size(made)}): Azure requires whole MiB",
            )
    return made


def _refuse_layers(output: PipeWriter, chain: Chain) -> None:
    """Refuse a standard output that was redirected into a file of the source."""
    try:
        identity = identity_of(output.fileno())
    except (OSError, ValueError):
        return  # not a file
    for layer in chain.layers:
        file = file_of(layer.store)
        if file is not None and file.identity == identity:
            raise InvalidArgument("standard output is this file, which is part of the source", path=file.name)


def _from_pipe(job: _Conversion, common: Common, wanted: bool | None) -> int:
    read = _standard_input()
    source_format = common.options.format_name
    if job.destination == STREAM:
        output = _standard_output()
        made = pass_stream(read, output.write, job.kind, source_format=source_format, azure=job.azure)
        output.flush()
        return made
    with progress_shown(common, wanted, "reading", endless=True) as show:
        return import_stream(
            read, job.destination, job.kind, source_format=source_format,
            block_size_bytes=job.block_size_bytes, azure=job.azure, replace=job.replace, sync=job.sync,
            progress=show,
        )  # fmt: skip


def _standard_input() -> Callable[[int], bytes]:
    if sys.stdin is None or sys.stdin.isatty():
        raise InvalidArgument("standard input is a terminal or closed, not a disk image")
    stream = PipeReader(sys.stdin.buffer)

    def read(size_bytes: int) -> bytes:
        with translated("standard input", "read"):
            return stream.read(size_bytes)

    return read


def _standard_output() -> PipeWriter:
    stream = getattr(sys.stdout, "buffer", None)
    if stream is None or sys.stdout.isatty():
        raise InvalidArgument(
            "standard output is a terminal or closed: a disk cannot go there", hint="name a file, or use a pipe"
        )
    return PipeWriter(stream)


def _print_result(job: _Conversion, size_bytes: int, seconds: float, common: Common) -> None:
    if job.destination == STREAM:
        return
    note_other_name(common, job.destination, formats.making(job.kind))
    speed = int(size_bytes / max(seconds, 0.001))
    if common.json:
        document = {
            "source": job.source,
            "destination": job.destination,
            "format": job.kind.value,
            "virtual_size_bytes": size_bytes,
            "seconds": round(seconds, 3),
            "bytes_per_second": speed,
        }
        print_json(document)
    elif not common.quiet:
        click.echo(
            f"wrote {printable(job.destination)}: {job.kind.label}, {exact_size(size_bytes)},"
            f" in {seconds:.1f} s ({format_size(speed)}/s)"
        )
