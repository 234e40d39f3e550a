# SPDX-License-Identifier: Apache-2.0
"""`backup serve`: the change between two nights as an NBD export.

vhdkit's command does it, in this process: a service manager that waits for it, and its signals, reach it as they are.
"""

from __future__ import annotations

import os
import sys

import click

from vmm.cli.common import epilog, output_options
from vmm.host.proc import python_command, python_environment


@click.command(
    "serve",
    epilog=epilog(
        "vmm backup serve /srv/backup web 18..21 --listen localhost:10809",
        "nbdcopy --allocated --destination-is-zero nbd://localhost /dev/vg/copy-of-18",
    ),
)
@click.argument("repo")
@click.argument("machine")
@click.argument("nights", metavar="A..B")
@click.option("--disk", "disks", metavar="ID", multiple=True, help="Serve this disk alone. Repeatable.")
@click.option("--socket", metavar="PATH",
              help="Listen on a unix socket that only you may use. Default: one in a new folder.")  # fmt: skip
@click.option("--listen", metavar="HOST:PORT", help="Listen on TCP. Port 0 means any free port.")
@click.option("--insecure", is_flag=True, help="Listen for other machines even without encryption.")
@click.option("--exit-last", is_flag=True, help="Exit when the last client has disconnected.")
@click.option("--pid-file", metavar="FILE", help="Write the server's process id to FILE when it is ready.")
@output_options
def serve_command(
    repo: str,
    machine: str,
    nights: str,
    disks: tuple[str, ...],
    socket: str | None,
    listen: str | None,
    insecure: bool,
    exit_last: bool,
    pid_file: str | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Serve the disks of night B of MACHINE in REPO, read-only, with what changed since night A as their allocation.

    Each disk is an export named by its id; the first is the default one. It reads as night B everywhere. In
    `base:allocation` only what may have changed since night A is allocated, zeros included; everything else is a
    hole. So a client that copies what is allocated over a copy of night A makes night B of it.

    A and B are numbers or times. Night B has a lease meanwhile, so no prune takes it. Ends with Ctrl-C.
    """
    values = (("--socket", socket), ("--listen", listen), ("--pid-file", pid_file))
    flags = (("--insecure", insecure), ("--exit-last", exit_last), ("--json", as_json), ("--quiet", quiet))
    options = [word for disk in disks for word in ("--disk", disk)]
    options += [word for option, value in values if value is not None for word in (option, value)]
    options += [option for option, given in flags if given]
    sys.stdout.flush()
    command = python_command("vhdkit", "backup", "serve", *options, "--", repo, machine, nights)
    os.execve(command[0], command, python_environment())
