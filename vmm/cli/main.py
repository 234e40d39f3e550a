# SPDX-License-Identifier: Apache-2.0
"""The command `vmm`: its verbs, its help, and the only place where it exits.

Decides which module contains each verb, so that only that module is imported, and how every failure becomes an exit
code. Verbs only raise.
"""

from __future__ import annotations

import gc
import importlib.util
import io
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

import click

from vmm.cli.failure import EXIT_FAILED, interruptible, report, settle_standard_error, silence_standard_output
from vmm.model.errors import Unsupported

_EPILOG = """\b
Examples:
  vhdkit create web.vhd --size 20G
  vmm create web --memory 1G --disk web.vhd --cdrom installer.iso
  vmm start web
  vmm list

\b
Exit codes:
  0 success                           6 refused for safety
  1 failed                            7 no space left
  2 wrong usage or settings           8 the host lacks something
  5 in use, or in the wrong state     9 it took too long
  130 interrupted

\b
Shell completion (put the line into ~/.bashrc or ~/.zshrc to keep it):
  bash:  eval "$(_VMM_COMPLETE=bash_source vmm)"
  zsh:   eval "$(_VMM_COMPLETE=zsh_source vmm)"
  fish:  _VMM_COMPLETE=fish_source vmm | source

VMM_DEBUG=1 shows where an internal error came from. VMM_HOME and VMM_RUNTIME are the folders of machines and sockets.
"""

# Verb -> ("module:command", summary for `vmm --help`, which imports no module); in the order of first use.
_VERBS: dict[str, tuple[str, str]] = {
    "create": ("vmm.cli.define:create_command", "Define a machine."),
    "list": ("vmm.cli.show:list_command", "List all machines and their states."),
    "show": ("vmm.cli.show:show_command", "Show everything about a machine."),
    "set": ("vmm.cli.define:set_command", "Change a machine's settings."),
    "delete": ("vmm.cli.define:delete_command", "Remove a machine."),
    "start": ("vmm.cli.life:start_command", "Start a machine, with its saved memory if it has any."),
    "shutdown": ("vmm.cli.life:shutdown_command", "Have the guest shut down."),
    "stop": ("vmm.cli.life:stop_command", "Power a machine off."),
    "reset": ("vmm.cli.life:reset_command", "Press the reset button."),
    "pause": ("vmm.cli.life:pause_command", "Pause a machine."),
    "resume": ("vmm.cli.life:resume_command", "Resume a paused machine."),
    "save": ("vmm.cli.life:save_command", "Save memory and devices to disk, and switch off."),
    "console": ("vmm.cli.console:console_command", "Connect this terminal to a machine's serial console."),
    "screen": ("vmm.cli.console:screen_command", "Look at a machine's screen, or take a picture of it."),
    "agent": ("vmm.cli.integration:agent_command", "Query the agent inside a machine; freeze its file systems."),
    "kvp": ("vmm.cli.integration:kvp_command", "Exchange short texts with a machine's guest."),
    "disk": ("vmm.cli.disk:disk_command", "Add, remove, list and resize disks."),
    "nic": ("vmm.cli.nic:nic_command", "Add, remove, list and change network adapters."),
    "switch": ("vmm.cli.switch:switch_command", "Create, watch and remove virtual network switches."),
    "host": ("vmm.cli.host:host_group", "This host: properties, diagnosis, disks, folders, and autostart."),
    "snapshot": ("vmm.cli.snapshot:snapshot_command", "Take snapshots of a machine, and go back to them."),
    "export": ("vmm.cli.transfer:export_command", "Export a machine to a folder, for another host."),
    "import": ("vmm.cli.transfer:import_command", "Create a machine from an exported folder."),
    "hyperv": ("vmm.cli.hyperv:hyperv_command", "Look at machines of Hyper-V."),
    "restore": ("vmm.cli.restore:restore_command", "Make a machine from a night of a backup."),
    "repair": ("vmm.cli.repair:repair_command", "Find a machine's newest images, and use them."),
    "backup": ("vmm.cli.backup:backup_command", "Save machines in a backup repository, and look after it."),
    "events": ("vmm.cli.log:events_command", "Show what happened to a machine."),
    "logs": ("vmm.cli.log:logs_command", "Show the logs of a machine's programs."),
}


_PACKAGES = {"pydantic": "pydantic", "pyroute2": "pyroute2", "qemu": "qemu.qmp"}  # of the extra: module -> package


class _Group(click.Group):
    """A group that imports a verb when it is used, and ends with one line and an exit code, never with a traceback."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The verbs in the order of first use."""
        return list(_VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the verb's module."""
        place = _VERBS.get(cmd_name)
        if place is None:
            return None
        _refuse_without_packages()
        module, _, name = place[0].partition(":")
        command: click.Command = getattr(import_module(module), name)
        gc.enable()
        if "_VMM_COMPLETE" in os.environ:
            from vmm.cli.completion import with_names

            return with_names(command, cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of verbs, from the table: nothing is imported for it."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, words) for name, (_, words) in _VERBS.items()])

    def main(self, args: Sequence[str] | None = None, *more: Any, **extra: Any) -> NoReturn:
        """Run the command line and exit."""
        arguments = list(sys.argv[1:] if args is None else args)
        as_json = "--json" in arguments
        verbose = os.environ.get("VMM_DEBUG", "") not in ("", "0")
        if sys.stdout is None:
            sys.stdout = io.StringIO()  # the caller closed it: output is dropped
        if sys.stderr is None:
            sys.stderr = io.StringIO()
        if hasattr(sys.stdout, "reconfigure"):  # so that a name that the terminal cannot show is not an error
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            with interruptible():
                code = super().main(arguments, "vmm", standalone_mode=False)
                sys.stdout.flush()
        except BrokenPipeError:
            silence_standard_output()
            code = EXIT_FAILED
        except SystemExit:
            raise
        except BaseException as error:
            code = report(error, as_json=as_json, verbose=verbose)
        settle_standard_error()
        sys.exit(code if isinstance(code, int) else 0)


def _refuse_without_packages() -> None:
    """Raise Unsupported if packages that vmm needs are missing. Searches for the packages without importing them."""
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise Unsupported(
            f"vmm needs {', '.join(_PACKAGES[name] for name in missing)}, which this Python lacks",
            hint="pip install 'vhdkit[vmm]'",
        )


def _print_version(ctx: click.Context, param: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        import vhdkit

        click.echo(f"vmm, version {vhdkit.__version__}")
        ctx.exit()


@click.group(
    cls=_Group,
    epilog=_EPILOG,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version,
    help="Show the version and exit.",
)  # fmt: skip
@click.pass_context
def main(context: click.Context) -> None:
    """Virtual machines on KVM and QEMU whose disks are chains of virtual hard disks.

    Disks are created with the command vhdkit. Sizes are written as 512M, 4G or 1.5T. Every verb takes --json, except
    console.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())
