# SPDX-License-Identifier: Apache-2.0
"""The command `vhdkit`: its verbs, its help, and the only place where it exits.

Decides how every failure becomes an exit code. Verbs only raise.
"""

from __future__ import annotations

import gc
import io
import logging
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

import click

import vhdkit
from vhdkit.cli.failure import (
    EXIT_FAILED,
    WarningLines,
    report,
    settle_standard_error,
    silence_standard_output,
    stopped_by_signals,
)
from vhdkit.wording import translate

_EPILOG = """\b
Examples:
  vhdkit create disk.vhd --size 10G
  vhdkit create child.avhd --parent disk.vhd
  vhdkit info child.avhd
  vhdkit convert child.avhd disk.raw --to raw

\b
Exit codes:
  0 success               4 check: warnings only
  1 failed, or differs    5 image in use
  2 usage                 6 parent missing or refused
  3 image damaged         7 no space left
  130 interrupted (143 by SIGTERM)

\b
Shell completion (add the line to ~/.bashrc or ~/.zshrc to keep it):
  bash:  eval "$(_VHDKIT_COMPLETE=bash_source vhdkit)"
  zsh:   eval "$(_VHDKIT_COMPLETE=zsh_source vhdkit)"
  fish:  _VHDKIT_COMPLETE=fish_source vhdkit | source

VHDKIT_DEBUG=1 shows where an internal error came from, as --verbose does. NO_COLOR=1 switches colours off.
"""


# Verb -> its module and its purpose, in the order in which they are usually needed. A module is imported when its verb
# is used: a server starts in less time, and `--help` loads none.
_VERBS = {
    "create": ("create", "Create an image, or a child of one."),
    "info": ("describe", "Show an image's metadata."),
    "chain": ("describe", "Show an image, its parents and what each owns."),
    "check": ("check", "Check an image and its parents, or repair it."),
    "map": ("map", "Show which layer owns which part of the disk."),
    "convert": ("convert", "Convert an image or chain to raw, VHD or VHDX."),
    "compare": ("compare", "Compare the content of two images."),
    "snapshot": ("snapshot", "Freeze a leaf; later writes go to a new child."),
    "clone": ("snapshot", "Create linked clones: children of one base."),
    "merge": ("merge", "Merge layers of a chain into one."),
    "pull": ("pull", "Fill an image from its parents; make it independent."),
    "rebase": ("rebase", "Point an image to its moved parent."),
    "relocate": ("relocate", "Move a whole chain into another folder."),
    "compact": ("compact", "Make an image's file smaller."),
    "resize": ("resize", "Change the virtual size of an image."),
    "serve": ("serve", "Serve images over NBD."),
    "ctl": ("ctl", "Control a running server."),
    "mount": ("mount", "Mount an image as files, or the files in it."),
    "umount": ("mount", "Unmount an image."),
    "mounts": ("mount", "List mounted images."),
    "backup": ("backup", "Save disks in a backup repository, and look after it."),
    "restore": ("restore", "Make new images from a night of a backup."),
    "gc": ("garbage", "Find unreferenced layers."),
    "dump": ("describe", "Show an image's raw structures, field by field."),
}


class _Group(click.Group):
    """A group that reports every failure as one line on standard error and an exit code, never as a traceback."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The verbs in the order of the table."""
        return list(_VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the verb's module."""
        if cmd_name not in _VERBS:
            return None
        module, words = _VERBS[cmd_name]
        command: click.Command = getattr(import_module(f"vhdkit.cli.{module}"), f"{cmd_name}_command")
        command.short_help = words  # for completion
        if not gc.isenabled():  # see `entry`
            gc.freeze()  # modules are never garbage; to look for it there at the end takes 26 ms
            gc.enable()
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of verbs, out of the table: nothing is imported for it."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, words) for name, (_, words) in _VERBS.items()])

    def main(self, args: Sequence[str] | None = None, *more: Any, **extra: Any) -> NoReturn:
        """Run the command line and exit."""
        arguments = list(sys.argv[1:] if args is None else args)
        as_json = "--json" in arguments
        verbose = bool({"--verbose", "-v"} & set(arguments)) or os.environ.get("VHDKIT_DEBUG", "") not in (
            "",
            "0",
        )
        if sys.stdout is None:
            sys.stdout = io.StringIO()  # closed by the parent process: the output is discarded
        if sys.stderr is None:
            sys.stderr = io.StringIO()
        if hasattr(sys.stdout, "reconfigure"):  # a name that the terminal cannot show must not stop us
            sys.stdout.reconfigure(errors="backslashreplace")
        logging.basicConfig(level=logging.WARNING, handlers=[WarningLines()])
        try:
            with stopped_by_signals():
                code = super().main(arguments, "vhdkit", standalone_mode=False)
                sys.stdout.flush()
        except BrokenPipeError:
            silence_standard_output()
            code = EXIT_FAILED
        except OSError as error:  # the library raises VhdkitErrors, so this is one of our streams
            code = report(translate(error, "standard output", "write"), as_json=as_json, verbose=verbose)
            silence_standard_output()
        except SystemExit:
            raise
        except BaseException as error:
            code = report(error, as_json=as_json, verbose=verbose)
        settle_standard_error()
        sys.exit(code if isinstance(code, int) else 0)


def _version_text() -> str:
    return f"vhdkit {vhdkit.__version__}, Python {sys.version.split()[0]}"


def _print_version(ctx: click.Context, param: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        click.echo(_version_text())
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
    """Virtual hard disks: VHD, VHDX and raw images, alone and in chains.

    A chain is an image and all its parents, always listed leaf first. Sizes are written as 512, 64K, 10G
    or 1.5T. Every verb takes --json.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


def mount_program() -> NoReturn:
    """The program `vhdkit-mount IMAGE MOUNTPOINT -o OPTIONS`, as mount.fuse3 calls it for a line of /etc/fstab."""
    main(["mount", *sys.argv[1:]])
    raise AssertionError("it exits")
