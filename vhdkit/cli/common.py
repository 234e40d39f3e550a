# SPDX-License-Identifier: Apache-2.0
"""What all verbs have in common: the options about images, sizes on the command line, help with examples.

Decides the names of shared options and what they mean to the library. Prints nothing but warnings about ignored
configuration.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import click

from vhdkit import FormatName, InvalidArgument, OpenOptions, TrustedFolders, VhdkitError, trusted_parent_dirs
from vhdkit.errors import printable
from vhdkit.folder import real_path
from vhdkit.units import DiskSize, parse_disk_size, parse_size

if TYPE_CHECKING:
    from vhdkit.rate import RateLimit

Verb = TypeVar("Verb", bound=Callable[..., Any])

BLOCK_SIZE_HELP = (
    "Unit of allocation, a power of two: 512K to 256M in a dynamic VHD, 1M to 256M in a VHDX; default 2M."
    " XenServer's vhd-util misreads VHDs of any size other than 2M."
)
STREAM = "-"  # standard input or output in place of a file


@dataclass(frozen=True, slots=True)
class Common:
    """The options that all verbs share."""

    options: OpenOptions
    json: bool
    quiet: bool
    verbose: bool
    given_parent_dirs: tuple[str, ...] = ()
    trusted: TrustedFolders = field(default_factory=lambda: TrustedFolders((), ()))

    def why_allowed(self, folder: str, image: str) -> str:
        """What allows parents of `image` in this folder: an option, a configuration file or the image's own place."""
        real = real_path(folder)
        if real == os.path.dirname(real_path(image)):
            return "the image's own folder"
        if real in map(real_path, self.given_parent_dirs):
            return "--allow-parent-dir"
        sources = [one.source for one in self.trusted.folders if real_path(one.path) == real]
        return sources[0] if sources else "the folder of the name it was called by"


def size(text: str) -> int:
    """Bytes as people write them: 512, 64K, 1.5G, 2TiB."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def disk_size(text: str) -> DiskSize:
    """The size of a disk as people write it, rounded up to whole sectors."""
    try:
        return parse_disk_size(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


class PathType(click.Path):
    """The name of a file. The file system is not consulted here: the library reports what is wrong with a file."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The name, which is not empty."""
        text = str(value)
        if not text:
            self.fail("a file name cannot be empty", param, ctx)
        if "\0" in text:
            raise InvalidArgument("is not a file name: it contains a NUL byte", path=text)
        return text


PATH = PathType()
_FOLDER = click.Path(exists=True, file_okay=False)


def image_options(*, leaf_format: bool = True) -> Callable[[Verb], Verb]:
    """The options of every verb that opens images; the verb gets them as one argument `common`.

    Without `leaf_format`, `--format` is left out: the verb has another meaning for it.
    """

    def decorate(verb: Verb) -> Verb:
        @functools.wraps(verb)
        def called(
            *args: Any,
            allow_parent_dir: tuple[str, ...],
            allow_raw_parent: bool,
            dynamic_bitmap: str,
            json: bool,
            quiet: bool,
            verbose: bool,
            image_format: str | None = None,
            **kwargs: Any,
        ) -> Any:
            trusted = trusted_parent_dirs()
            if not quiet:
                for ignored in trusted.findings:
                    text = f"{ignored.path}: {ignored.message}" if ignored.path else ignored.message
                    print_aside(f"vhdkit: warning: {text}")
            options = OpenOptions(
                parent_dirs=(*allow_parent_dir, *trusted.parent_dirs),
                allow_raw_parent=allow_raw_parent,
                ignore_bitmaps=dynamic_bitmap == "ignore",
                format_name=FormatName(image_format) if image_format else None,
            )
            return verb(*args, common=Common(options, json, quiet, verbose, allow_parent_dir, trusted), **kwargs)

        decorated: Any = called
        for option in reversed(_options(leaf_format)):
            decorated = option(decorated)
        result: Verb = decorated
        return result

    return decorate


def _options(leaf_format: bool) -> list[Callable[[Any], Any]]:
    options = [
        click.option("--allow-parent-dir", metavar="DIR", type=_FOLDER, multiple=True,
                     help="Allow parents in DIR, in addition to the image's own folder. Repeatable. To allow a"
                          " folder for every command, set VHDKIT_PARENT_DIRS, or parent_dirs in"
                          " ~/.config/vhdkit/config.toml or /etc/vhdkit/config.toml."),
        click.option("--allow-raw-parent", is_flag=True,
                     help="Accept a raw parent, which has no id to verify."),
        click.option("--dynamic-bitmap", type=click.Choice(["spec", "ignore"]), default="spec", show_default=True,
                     help="Read a clear bit in a dynamic disk's bitmap as zeros (spec), or ignore bitmaps."),
    ]  # fmt: skip
    if leaf_format:
        options.append(
            click.option("--format", "image_format", type=click.Choice([one.value for one in FormatName]),
                         help="The format of the image; detected by default.")
        )  # fmt: skip
    return [
        *options,
        click.option("--json", is_flag=True, help="Print one JSON document; errors are JSON objects too."),
        click.option("-q", "--quiet", is_flag=True, help="Print no notes, summaries or progress."),
        click.option("-v", "--verbose", is_flag=True, help="Print more; show where an internal error came from."),
    ]


def progress_option(verb: Verb) -> Verb:
    """`--progress/--no-progress` for verbs that may take long."""
    return click.option(
        "--progress/--no-progress", default=None,
        help="Show progress. Default: when standard error is a terminal.",
    )(verb)  # fmt: skip


def rate(text: str) -> RateLimit:
    """Bytes a second as people write them: 500K, 20M, 1.5G."""
    from vhdkit.rate import RateLimit  # few commands have a limit

    try:
        return RateLimit(parse_size(text))
    except (ValueError, VhdkitError) as error:
        raise click.BadParameter(str(error)) from error


def limit_option(verb: Verb) -> Verb:
    """`--limit` for verbs that copy much beside other work."""
    return click.option("--limit", metavar="RATE", type=rate, help="Copy at most this much a second, such as 20M.")(
        verb
    )


def dry_run_option(verb: Verb) -> Verb:
    """`--dry-run` for verbs that change files."""
    return click.option(
        "--dry-run", is_flag=True, help="Check everything and print what would be done; change nothing."
    )(verb)


def print_aside(text: str) -> None:
    """Print one line on standard error, beside a verb's result. A closed standard error does not stop the verb."""
    with contextlib.suppress(OSError, ValueError):
        click.echo(printable(text), err=True)


class VerbGroup(click.Group):
    """A group whose help shows what each verb is for in a whole sentence; click truncates them."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of verbs."""
        rows = []
        for name in self.list_commands(ctx):
            command = self.get_command(ctx, name)
            if command is not None:
                rows.append((name, command.get_short_help_str(limit=1000)))
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Without a verb: the help, as the program alone prints it."""
        if not args and not ctx.resilient_parsing:
            click.echo(ctx.get_help())
            ctx.exit()
        return super().parse_args(ctx, args)


def epilog(*examples: str, codes: str = "") -> str:
    """The end of a verb's help: examples as they are typed, and its exit codes where they are its own."""
    text = "\b\n" + "\n".join(["Examples:" if len(examples) > 1 else "Example:", *(f"  {one}" for one in examples)])
    return f"{text}\n\n{codes}" if codes else text
