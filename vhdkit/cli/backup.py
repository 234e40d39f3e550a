# SPDX-License-Identifier: Apache-2.0
"""`backup`: the commands on a backup repository.

Decides which commands there are and which options they share. A command is the word after `backup`, never a guess: a
machine may be called `prune`. The name of a file is an image to save, so an image `list` is named `./list`. A
command's module is imported when it is used.
"""

from __future__ import annotations

import functools
from importlib import import_module
from typing import Any

import click

from vhdkit import OpenOptions
from vhdkit.cli.common import PATH, Common, Verb, VerbGroup, epilog
from vhdkit.folder import exists

# Command -> its module and its purpose.
_COMMANDS = {
    "run": ("backup_run", "Save a disk as a new night."),
    "list": ("backup_show", "List machines, or the nights of one."),
    "show": ("backup_show", "Show what a night consists of."),
    "status": ("backup_show", "Say whether there is a recent whole night."),
    "verify": ("backup_verify", "Compare every file with its sums."),
    "prune": ("backup_prune", "Drop the nights that no rule keeps."),
    "delete": ("backup_prune", "Drop one night."),
    "protect": ("backup_prune", "Keep a night from being dropped."),
    "serve": ("backup_serve", "Serve what changed between two nights."),
    "copy": ("backup_copy", "Copy a repository, or what has changed in it."),
    "promote": ("backup_copy", "Make a copy a repository of its own."),
}


class _Commands(VerbGroup):
    """The commands, each imported when it is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands in the order of the table."""
        return list(_COMMANDS)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """`backup IMAGE REPO` is short for `backup run IMAGE REPO`."""
        word = args[0] if args and not ctx.resilient_parsing else "-h"
        if word not in (*_COMMANDS, "-h", "--help") and (word.startswith("-") or exists(word)):
            args = ["run", *args]
        return super().parse_args(ctx, args)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command's module."""
        if cmd_name not in _COMMANDS:
            return None
        module, words = _COMMANDS[cmd_name]
        command: click.Command = getattr(import_module(f"vhdkit.cli.{module}"), f"{cmd_name}_command")
        command.short_help = words
        return command


@click.group(
    "backup",
    cls=_Commands,
    epilog=epilog(
        "vhdkit backup web.vhd /srv/backup",
        "vhdkit backup list /srv/backup",
        "vhdkit backup verify /srv/backup web",
        "vhdkit backup prune /srv/backup web --keep-daily 7 --keep-weekly 4",
        "vhdkit backup copy /srv/backup /mnt/usb/backup",
    ),
    context_settings={"help_option_names": ["-h", "--help"]},
)
def backup_command() -> None:
    """Save disks in a backup repository: a folder of ordinary images, one for each night that changed.

    `backup IMAGE REPO` is short for `backup run IMAGE REPO`.

    REPO is the folder. A machine is named by its name or its id, a night as NAME@NIGHT or NAME@TIME, such as web@18,
    web@2026-11-30 or web@2026-11-30T02:30. Any tool can open the images; docs/backup.md describes the folder.
    """


def repository_options(verb: Verb) -> Verb:
    """The repository, and the options that all of these commands share: the command gets `repo` and `common`."""

    @functools.wraps(verb)
    def called(*args: Any, json: bool, quiet: bool, verbose: bool, **kwargs: Any) -> Any:
        return verb(*args, common=Common(OpenOptions(), json, quiet, verbose), **kwargs)

    decorated: Any = called
    for option in (
        click.option("-v", "--verbose", is_flag=True, help="Print more; show where an internal error came from."),
        click.option("-q", "--quiet", is_flag=True, help="Print no notes, summaries or progress."),
        click.option("--json", is_flag=True, help="Print one JSON document; errors are JSON objects too."),
        click.argument("repo", metavar="REPO", type=PATH),
    ):
        decorated = option(decorated)
    result: Verb = decorated
    return result
