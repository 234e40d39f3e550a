# SPDX-License-Identifier: Apache-2.0
"""The command `vmm` itself: its help and its version.

Decides what `vmm` alone says. Verb families live in modules of their own beside this one.
"""

from __future__ import annotations

import click


@click.group(invoke_without_command=True)
@click.version_option(package_name="vhdkit", prog_name="vmm")
@click.pass_context
def main(context: click.Context) -> None:
    """Manage KVM/QEMU virtual machines whose disks are chains of virtual hard disks.

    This version holds no machine commands yet. To create, inspect, check and convert the disks themselves
    use the command vhdkit.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())
