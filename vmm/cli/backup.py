# SPDX-License-Identifier: Apache-2.0
"""`backup`: saving machines in a backup repository, and looking after it.

Decides which commands there are and which options they share. A command is the word after `backup`, never a guess: a
machine may be called `prune`. A command's module is imported when it is used.
"""

from __future__ import annotations

import shlex
from importlib import import_module

import click

from vmm.cli.common import VerbGroup, epilog

# Command -> its module in this package, and its purpose.
_COMMANDS = {
    "run": ("backup_run", "Save machines as new nights."),
    "list": ("backup_show", "List the machines of a repository, or the nights of one."),
    "show": ("backup_show", "Show what a night consists of."),
    "status": ("backup_show", "Say whether the backups of last night worked."),
    "verify": ("backup_verify", "Compare every file of a repository with its sums."),
    "prune": ("backup_prune", "Drop the nights that no rule keeps."),
    "delete": ("backup_prune", "Drop one night."),
    "protect": ("backup_prune", "Keep a night from being dropped."),
    "copy": ("backup_copy", "Copy a repository, or what has changed in it."),
    "promote": ("backup_copy", "Make a copy a repository of its own."),
    "serve": ("backup_serve", "Serve the change between two nights, for other programs."),
    "schedule": ("backup_schedule", "Save machines at set times."),
    "forget": ("backup_run", "Keep no images of a machine for its next backup."),
}


class _BackupCommands(VerbGroup):
    """The commands, each imported when it is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands in the order of the table."""
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command's module."""
        if cmd_name not in _COMMANDS:
            return None
        module, words = _COMMANDS[cmd_name]
        command: click.Command = getattr(import_module(f"vmm.cli.{module}"), f"{cmd_name}_command")
        command.short_help = words
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Refuse `backup NAME DIR`, as it was written before there were commands, with the line to type."""
        if len(args) > 1 and args[0] not in (*_COMMANDS, "-h", "--help") and not ctx.resilient_parsing:
            line = shlex.join(["vmm", "backup", "run", *args])
            raise click.UsageError(f"{args[0]!r} is not a command; to save a machine, write: {line}")
        return super().resolve_command(ctx, args)


@click.group(
    "backup",
    cls=_BackupCommands,
    epilog=epilog(
        "vmm backup run web /srv/backup",
        "vmm backup list /srv/backup",
        "vmm backup show /srv/backup web@18",
        "vmm backup verify /srv/backup web",
        "vmm backup prune /srv/backup web --keep-daily 7 --keep-weekly 4",
        "vmm backup schedule add nightly web /srv/backup --when 22:30 --keep-daily 7",
    ),
)
def backup_command() -> None:
    """Save machines in a backup repository: a folder of ordinary images, one for each night in which a disk changed.

    REPO is the folder. A machine of it is named by its name or its id, a night as NAME@NIGHT or NAME@TIME, such as
    web@18, web@2026-11-30 or web@2026-11-30T02:30.
    """
