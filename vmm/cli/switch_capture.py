# SPDX-License-Identifier: Apache-2.0
"""`switch capture`: writes the frames on a switch to files for Wireshark.

Decides how a capture is requested and how it ends. How the stream is split into files is decided in
`net.capture_files`.
"""

from __future__ import annotations

import sys
from typing import Any

import click

from vmm.cli.common import SIZE, epilog, output_options, print_json, print_line
from vmm.model.errors import WrongState, of_os_error
from vmm.net import switches
from vmm.net.capture_files import MAX_FILES, MIN_SIZE_BYTES, CaptureFiles
from vmm.net.host_side import HostSide


@click.command(
    "capture",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=epilog(
        "vmm switch capture lab -o lab.pcapng",
        "vmm switch capture lab -o lab.pcapng --max-size 64M --files 10",
        "vmm switch capture lab --port web/nic-0 -o - | tshark -r -",
    ),
)
@click.argument("name")
@click.option(
    "--port", metavar="MACHINE/ADAPTER", help="Both directions of this port. Default: what every port sends."
)
@click.option("--snap", type=int, metavar="BYTES", help="Keep only the first BYTES of each frame.")
@click.option("-o", "--output", required=True, metavar="FILE", help="Output file, as pcapng; - for standard output.")
@click.option(
    "--max-size", type=SIZE, metavar="SIZE", help="Stop when FILE has this size; with --files: begin a new file."
)
@click.option("--files", type=click.IntRange(2, MAX_FILES), metavar="N",
              help="Keep the newest N files of --max-size: FILE's name with -00001 and so on.")  # fmt: skip
@output_options
def capture_command(
    name: str, port: str | None, snap: int | None, output: str, max_size: int | None, files: int | None,
    as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Write the frames on the switch NAME to FILE, until Ctrl-C. Wireshark and tshark read it.

    If the switch ends meanwhile, that is an error; the frames captured until then are in FILE.
    """
    spec = switches.load(name)
    host = HostSide(spec)
    host.backend.refuse_capture(output)
    if files is not None and (max_size is None or output == "-"):
        raise click.UsageError("--files needs --max-size and a FILE")
    if max_size is not None and max_size < MIN_SIZE_BYTES:
        raise click.BadParameter(f"{MIN_SIZE_BYTES >> 10}K or more", param_hint="--max-size")
    if as_json and output == "-":
        raise click.UsageError("standard output takes the frames or the JSON document, not both")
    host.ensure()
    with host.user.capture(None if port is None else _port_of(port), snap) as stream:
        try:
            with CaptureFiles(
                output, max_bytes=max_size or 0, max_files=files or 0,
                stream=sys.stdout.buffer if output == "-" else None,
            ) as taken:  # fmt: skip
                _copy(stream, taken, name)
        except OSError as error:
            if output == "-":
                raise
            raise of_os_error(error, "write the capture", path=output) from error
    if as_json:
        print_json({"files": list(taken.names), "frames": taken.frame_count})
    elif not quiet and output != "-":
        print_line(f"{', '.join(taken.names)}: {taken.frame_count} frames")


def _copy(stream: Any, taken: CaptureFiles, name: str) -> None:
    try:
        while True:
            try:
                received = stream.recv(1 << 16)
            except ConnectionError:
                received = b""
            if not received:
                where = "" if taken.path == "-" else f"; {taken.names[-1]} has the frames captured until then"
                raise WrongState(f"switch {name} ended during the capture{where}")
            if not taken.write(received):
                return
    except KeyboardInterrupt:
        pass  # the normal end of a capture


def _port_of(words: str) -> str:
    from vmm.api import adapters
    from vmm.net.adapter import port_name
    from vmm.store import registry

    machine, sign, adapter = words.partition("/")
    if not sign:
        raise click.BadParameter("write MACHINE/ADAPTER, as in web/nic-0", param_hint="--port")
    found = registry.load(machine)
    return port_name(found.spec.id, adapters.find(found, adapter).id)
