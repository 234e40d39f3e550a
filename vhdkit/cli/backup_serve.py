# SPDX-License-Identifier: Apache-2.0
"""`backup serve`: the change between two nights as an NBD export, for nbdcopy and other backup programs.

Decides how the two nights are named, and what is printed when clients can connect.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys

import click

from vhdkit.backup.difference import FoundBy
from vhdkit.backup.repository import open_repository
from vhdkit.backup.serving import OpenChange, opened_changes
from vhdkit.cli.backup import repository_options
from vhdkit.cli.common import PATH, Common, epilog, progress_option
from vhdkit.cli.failure import show_log
from vhdkit.cli.output import note, print_json
from vhdkit.cli.progress import stages_shown
from vhdkit.cli.serve import allow_descriptors, pid_file, stopped_in_order
from vhdkit.cli.unmeant import unmeant_ignored
from vhdkit.errors import printable
from vhdkit.serve.nbd.export import Export
from vhdkit.serve.nbd.listen import Listeners, parse_address
from vhdkit.serve.nbd.server import NbdServer
from vhdkit.serve.notify import READY, notify
from vhdkit.units import format_size

_FOUND_BY = {
    FoundBy.LAYERS: "what the images of the nights in between own",
    FoundBy.COMPARISON: "found by a comparison, as the later night does not stand on the earlier one",
    FoundBy.ALL: "all of it: the earlier night does not have this disk",
}


@click.command(
    "serve",
    epilog=epilog(
        "vhdkit backup serve /srv/backup web 18..21 --listen localhost:10809",
        "nbdcopy --allocated --destination-is-zero nbd://localhost /dev/vg/copy-of-18",
        codes="Exit code 0 after Ctrl-C or SIGTERM.",
    ),
)
@repository_options
@click.argument("machine")
@click.argument("nights", metavar="A..B")
@click.option("--disk", "disks", metavar="ID", multiple=True, help="Serve this disk alone. Repeatable.")
@click.option("--socket", metavar="PATH", type=PATH,
              help="Listen on a unix socket that only you may use. Default: one in a new folder.")  # fmt: skip
@click.option("--listen", metavar="HOST:PORT", help="Listen on TCP. Port 0 means any free port.")
@click.option("--insecure", is_flag=True, help="Listen for other machines even without encryption.")
@click.option("--exit-last", is_flag=True, help="Exit when the last client has disconnected.")
@click.option("--pid-file", "pid_path", metavar="FILE", type=PATH,
              help="Write the server's process id to FILE when it is ready.")  # fmt: skip
@progress_option
def serve_command(
    repo: str,
    machine: str,
    nights: str,
    disks: tuple[str, ...],
    socket: str | None,
    listen: str | None,
    insecure: bool,
    exit_last: bool,
    pid_path: str | None,
    progress: bool | None,
    common: Common,
) -> None:
    """Serve the disks of night B of a MACHINE, read-only, with what changed since night A as their allocation.

    Each disk is an export named by its id; the first is the default one. It reads as night B everywhere. In
    `base:allocation` only what may have changed since night A is allocated, zeros included; everything else is a
    hole. So a client that copies what is allocated over a copy of night A makes night B of it. For clients that know
    QEMU's dirty bitmaps, the context `qemu:dirty-bitmap:A..B` says the same.

    A and B are numbers or times. Night B has a lease meanwhile, so no prune takes it.

    \b
    With --json, when ready: {"pid", "uris": [...], "repository", "machine",
      "earlier", "later", "exports": [{"name", "uri", "size_bytes",
      "changed_bytes", "found_by"}]}
    """
    earlier, dots, later = nights.partition("..")
    if not earlier or not dots or not later:
        raise click.UsageError(f"{printable(nights)!r} is not A..B, two nights such as 18..21")
    try:
        address = None if listen is None else parse_address(listen)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    show_log(logging.ERROR if common.quiet else logging.INFO if common.verbose else logging.WARNING,
             in_full=common.verbose)  # fmt: skip
    with unmeant_ignored(), contextlib.ExitStack() as cleanup:
        repository = cleanup.enter_context(open_repository(repo))
        found = cleanup.enter_context(repository.machine(repository.find_machine(machine)))
        with stages_shown(common, progress) as stage:
            changes = cleanup.enter_context(opened_changes(found, earlier, later, disks, stage))
        listeners = cleanup.enter_context(Listeners())
        if address is not None:
            listeners.add_tcp(*address, open_to_all=insecure)
        if socket is not None or address is None:
            listeners.add_unix(socket)
        exports = [Export(one.record.disk_id, one.disk, description=_described(one, found.name)) for one in changes]
        server = NbdServer(exports, exit_last=exit_last)
        cleanup.callback(server.close)
        for sock in listeners.sockets:
            server.listen(sock)
        cleanup.enter_context(stopped_in_order(server))
        if pid_path is not None:
            cleanup.enter_context(pid_file(pid_path))
        _print_ready(changes, listeners, repository.path, found.name, common)
        notify(READY)
        allow_descriptors()
        server.run()


def _described(one: OpenChange, name: str) -> str:
    return f"what changed on {one.record.disk_id} of {name} from night {one.earlier.night} to {one.later.night}"


def _print_ready(changes: list[OpenChange], listeners: Listeners, path: str, name: str, common: Common) -> None:
    rows = []
    for one in changes:
        uris = [address.uri(one.record.disk_id, secure=False) for address in listeners.addresses]
        rows.append(
            {
                "name": one.record.disk_id,
                "uri": uris[0],
                "size_bytes": one.disk.size_bytes,
                "changed_bytes": one.disk.change.size_bytes,
                "found_by": one.disk.change.found_by.value,
            }
        )
        if not common.json and not common.quiet:
            for uri in uris:
                click.echo(uri)
            size, how = format_size(one.disk.change.size_bytes), _FOUND_BY[one.disk.change.found_by]
            note(common, f"{printable(one.record.disk_id)}: {size} may have changed, {how}")
    if common.json:
        nights = {"earlier": changes[0].earlier.night, "later": changes[0].later.night}
        addresses = [one["uri"] for one in rows]
        print_json({"pid": os.getpid(), "uris": addresses, "repository": path, "machine": name, **nights,
                    "exports": rows})  # fmt: skip
    sys.stdout.flush()
