# SPDX-License-Identifier: Apache-2.0
"""`ctl`: sends a request to a running server.

Decides how the arguments become a call on the control socket and how the answer is shown.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import click

from vhdkit import CacheMode, FormatName, OpenOptions, Progress
from vhdkit.cli.common import PATH, Common, VerbGroup, disk_size, epilog, progress_option
from vhdkit.cli.common import size as parsed_size
from vhdkit.cli.output import columns, count, print_json, print_text, rounding
from vhdkit.cli.progress import progress_shown
from vhdkit.cli.pull import check_pull_options
from vhdkit.errors import printable
from vhdkit.serve.control.client import ControlClient
from vhdkit.units import DiskSize, format_size

_LOOK_SECONDS = 0.25  # between requests for the progress of a merge


@dataclass(frozen=True, slots=True)
class _Server:
    """A running server, by the path of its control socket."""

    path: str


# The help of each verb shows its own.
_EXAMPLES = (
    "vhdkit ctl /run/disk.ctl status",
    "vhdkit ctl /run/disk.ctl snapshot",
    "vhdkit ctl /run/disk.ctl snapshot system=system-1.avhd data=data-1.avhd",
    "vhdkit ctl /run/disk.ctl merge data --into /srv/data.vhd",
    "vhdkit ctl /run/disk.ctl pull data --layer /srv/data.vhd --independent",
    "vhdkit ctl /run/disk.ctl cancel data",
    "vhdkit ctl /run/disk.ctl resize data 20G",
    "vhdkit ctl /run/disk.ctl set-read-only",
    "vhdkit ctl /run/disk.ctl add more=/srv/more.vhd",
    "vhdkit ctl /run/disk.ctl disconnect --export data",
    "vhdkit ctl /run/disk.ctl remove data",
    "vhdkit ctl /run/disk.ctl shutdown",
)


@click.group(
    "ctl",
    cls=VerbGroup,
    epilog=epilog(*_EXAMPLES),
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.argument("socket", type=PATH)
@click.pass_context
def ctl_command(context: click.Context, socket: str) -> None:
    """Control the server that listens on SOCKET, the PATH of its --control.

    The exit code is that of the error that the server reports, and 1 if no server listens. With --json each verb
    prints the server's answer unchanged.
    """
    context.obj = _Server(socket)


def _verb(name: str, **settings: Any) -> Callable[[Callable[..., Any]], Any]:
    """A verb of `ctl`: it gets the server, and with --json prints its answer."""

    def decorate(function: Callable[..., Any]) -> Any:
        for option in (
            click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors."),
            click.option("--json", is_flag=True, help="Print the server's answer; errors are JSON objects too."),
        ):
            function = option(function)
        examples = [one for one in _EXAMPLES if one.split()[3] == name]
        return ctl_command.command(name, epilog=epilog(*examples), **settings)(click.pass_obj(function))

    return decorate


def _ask(server: _Server, method: str, *, as_json: bool, **params: object) -> Any:
    with ControlClient(server.path) as client:
        result = client.call(method, **params)
    if as_json:
        print_json(result)
    return result


@_verb("status")
def status_verb(server: _Server, json: bool, quiet: bool) -> None:
    """Show the exports, their files, the clients and the counts of requests."""
    status = _ask(server, "status", as_json=json)
    if json or quiet:
        return
    clients = status["clients"]
    print_text(
        f"server {status['pid']}, up {status['uptime_seconds']:.0f} s: {count(len(clients), 'client')},"
        f" {count(status['requests'], 'request')}, {count(status['errors'], 'error')}"
    )
    for export in status["exports"]:
        kind = "read-only" if export["read_only"] else "writable"
        if export["overlay"]:
            kind += ", changes are discarded at the end"
        if export.get("cache") == CacheMode.NONE:
            kind += ", not cached"
        print_text((f"{printable(export['name'])}", "bold"), f"  {format_size(export['size_bytes'])}, {kind}")
        rows = [
            [str(number), printable(layer["path"]), layer["kind"]] for number, layer in enumerate(export["layers"])
        ]
        for line in columns(rows, "r"):
            print_text("  ", line)
    for one in clients:
        where = "still negotiating" if one["export"] is None else printable(one["export"])
        tls = ", TLS" if one["tls"] else ""
        print_text(f"client {one['client']}: {where}, {printable(one['peer'])}{tls}, {one['connected_seconds']:.0f} s")


@_verb("snapshot")
@click.argument("exports", metavar="[EXPORT[=NEW]]...", nargs=-1)
def snapshot_verb(server: _Server, exports: tuple[str, ...], json: bool, quiet: bool) -> None:
    """Freeze all exports, or those named, while they are served; all of them or none.

    All leaves are frozen at the same moment, and later writes go to a new child of each: NEW, or a name beside the
    leaf as `vhdkit snapshot` chooses it. Clients notice nothing. If the server is started with --follow-leaf, the same
    command line serves the newest leaf again.
    """
    wanted: dict[str, str | None] = {}
    for word in exports:
        name, sign, new = word.rpartition("=")
        if not sign:
            name, new = word, ""
        if sign and not new:
            raise click.UsageError(f"{printable(word)!r} is not EXPORT=NEW")
        if name in wanted:
            raise click.UsageError(f"{printable(name)!r} is named twice")
        wanted[name] = os.path.abspath(new) if new else None
    result = _ask(server, "snapshot", as_json=json, **({"exports": wanted} if wanted else {}))
    if not json and not quiet:
        for row in result["snapshots"]:
            print_text(
                f"{printable(row['export'])}: froze {printable(row['frozen'])}, continues in {printable(row['leaf'])}"
            )


@_verb("merge")
@click.argument("export")
@click.option("--layer", metavar="LAYER", type=PATH, help="The newest layer to merge; default the leaf.")
@click.option(
    "--into",
    metavar="ANCESTOR",
    type=PATH,
    help="The layer to merge it, and all in between, into; default its parent.",
)
@click.option("--max-rate", metavar="SIZE", type=parsed_size, help="Copy at most this much a second, such as 50M.")
@progress_option
def merge_verb(
    server: _Server,
    export: str,
    layer: str | None,
    into: str | None,
    max_rate: int | None,
    progress: bool | None,
    json: bool,
    quiet: bool,
) -> None:
    """Merge layers of EXPORT into one of them while clients keep reading and writing.

    The merged files are removed; the ancestor keeps its name. If the leaf is merged too, the server continues in the
    ancestor: it freezes the leaf, merges what was frozen, and repeats this as long as the amount shrinks, so that
    clients wait only for a small remainder. Ctrl-C, or `cancel` from elsewhere, stops the merge; the disk then reads
    as before, and merging again continues where it stopped.
    """
    paths = {"layer": layer and os.path.abspath(layer), "into": into and os.path.abspath(into)}
    common = Common(OpenOptions(), json, quiet, verbose=False)
    result = _long(server, "merge", "merging", common, progress, export=export, max_rate_bytes=max_rate, **paths)
    if json:
        print_json(result)
    elif not quiet:
        passes = f"{result['passes']} {'pass' if result['passes'] == 1 else 'passes'}"
        print_text(
            f"{printable(result['export'])}: merged {count(len(result['merged']), 'layer')} into"
            f" {printable(result['into'])}, {format_size(result['copied_bytes'])} in {passes}; clients waited"
            f" {result['held_seconds'] * 1000:.0f} ms at most"
        )


def _is_done(job: Future[Any]) -> bool:
    return bool(wait([job], _LOOK_SECONDS).done)


def _long(
    server: _Server, method: str, doing: str, common: Common, progress: bool | None, *, export: str, **params: object
) -> Any:
    """The result of a method that takes minutes, with its progress; Ctrl-C cancels it on the server."""
    with (
        ControlClient(server.path, timeout_seconds=None) as client,
        progress_shown(common, progress, doing) as show,
        ThreadPoolExecutor(1) as pool,
    ):
        job = pool.submit(client.call, method, export=export, **params)
        try:
            while not _is_done(job):
                if show is not None:
                    _show_work(server, export, method, show)
        except BaseException:
            _ask(server, "cancel", as_json=False, export=export)
            raise
        return job.result()


def _show_work(server: _Server, export: str, method: str, show: Progress) -> None:
    for one in _ask(server, "status", as_json=False)["exports"]:
        work = one.get(method)
        if one["name"] == export and work is not None and work["total_bytes"]:
            show(work["done_bytes"], work["total_bytes"])


@_verb("pull")
@click.argument("export")
@click.option("--layer", metavar="LAYER", type=PATH, help="The layer to fill; default the leaf.")
@click.option("--to", metavar="ANCESTOR", type=PATH,
              help="The lowest layer to take data from; default the base.")  # fmt: skip
@click.option("--relink", is_flag=True, help="With --to: make LAYER a child of the layer below ANCESTOR.")
@click.option("--independent", is_flag=True, help="Take data from all parents, and need none of them any more.")
@click.option("--max-rate", metavar="SIZE", type=parsed_size, help="Copy at most this much a second, such as 50M.")
@progress_option
def pull_verb(
    server: _Server,
    export: str,
    layer: str | None,
    to: str | None,
    relink: bool,
    independent: bool,
    max_rate: int | None,
    progress: bool | None,
    json: bool,
    quiet: bool,
) -> None:
    """Fill a layer of EXPORT from the layers below it, as `vhdkit pull` does, while clients keep reading and writing.

    The layers below are only read, and stay. To fill the leaf, which clients write to, the server freezes it, fills
    what was frozen, and merges the new leaf into it, also if it could not be filled. Ctrl-C, or `cancel` from
    elsewhere, stops the pull; the disk then reads as before, and pulling again continues where it stopped.

    A server with --follow-leaf refuses to cut the disk off from the image that it was started with, since it would not
    find the disk from there again.
    """
    check_pull_options(to=to, relink=relink, independent=independent)
    paths = {"layer": layer and os.path.abspath(layer), "to": to and os.path.abspath(to)}
    result = _long(
        server, "pull", "pulling", Common(OpenOptions(), json, quiet, verbose=False), progress, export=export,
        cut=relink or independent, max_rate_bytes=max_rate, **paths,
    )  # fmt: skip
    if json:
        print_json(result)
    elif not quiet:
        below = result["parent"]
        place = "no parent any more" if below is None else f"the parent {printable(below)}"
        print_text(
            f"{printable(result['export'])}: copied {format_size(result['copied_bytes'])} from"
            f" {count(len(result['pulled']), 'layer')} into {printable(result['layer'])}, which has {place}; clients"
            f" waited {result['held_seconds'] * 1000:.0f} ms at most"
        )


@_verb("cancel")
@click.argument("export", required=False)
def cancel_verb(server: _Server, export: str | None, json: bool, quiet: bool) -> None:
    """Stop the merge or the pull of EXPORT, or of all exports; the next one reuses what was copied."""
    result = _ask(server, "cancel", as_json=json, export=export)
    if not json and not quiet:
        names = ", ".join(map(printable, result["exports"]))
        print_text(f"stopping the work on {names}" if names else "nothing is being merged or filled")


@_verb("resize")
@click.argument("export")
@click.argument("size", type=disk_size)
@click.option("--shrink", is_flag=True, help="Allow SIZE to be smaller than the disk.")
@click.option("--under-clients", is_flag=True, help="Shrink even while clients are connected.")
def resize_verb(
    server: _Server, export: str, size: DiskSize, shrink: bool, under_clients: bool, json: bool, quiet: bool
) -> None:
    """Change the size of the disk of EXPORT while it is served, with the limits of `vhdkit resize`.

    A smaller SIZE requires --shrink, and is refused while clients are connected, because they would
    use what is cut off.

    Connected clients keep the old size, and see the new one when they reconnect: `disconnect --export EXPORT` makes
    them do so.
    """
    flags = {name: True for name, given in (("shrink", shrink), ("under_clients", under_clients)) if given}
    result = _ask(server, "resize", as_json=json, export=export, size_bytes=size, **flags)
    if not json and not quiet:
        before, after = format_size(result["size_before_bytes"]), format_size(result["size_bytes"])
        print_text(f"{printable(export)}: {before} -> {after}, for clients that connect from now on")
        for text in [*([rounding(size)] if size.asked else []), *result["notes"]]:
            print_text(f"note: {printable(text)}")


@_verb("set-read-only")
@click.option("--export", help="Only this export; default all of them.")
@click.option("--off", is_flag=True, help="Allow writing again.")
def read_only_verb(server: _Server, export: str | None, off: bool, json: bool, quiet: bool) -> None:
    """Flush what was written, then refuse writes with EPERM.

    Connections stay open. With --off they may write again; clients that connected in between have to reconnect first.
    """
    result = _ask(server, "set-read-only", as_json=json, export=export, read_only=not off)
    if not json and not quiet:
        for name in result["exports"]:
            print_text(f"{printable(name)} is {'writable again' if off else 'read-only'}")


@_verb("add")
@click.argument("export", metavar="NAME=IMAGE")
@click.option("--read-only", is_flag=True, help="Refuse writes; the image is opened for reading.")
@click.option("--follow-leaf", is_flag=True, help="Serve the newest descendant of IMAGE.")
@click.option("--format", "image_format", type=click.Choice([one.value for one in FormatName]),
              help="The format of IMAGE; detected by default.")  # fmt: skip
@click.option("--allow-parent-dir", metavar="DIR", multiple=True, help="Allow parents in DIR as well. Repeatable.")
@click.option("--allow-raw-parent", is_flag=True, help="Accept a raw parent, which has no id to verify.")
@click.option(
    "--cache",
    type=click.Choice([one.value for one in CacheMode]),
    help="What the host's page cache may keep of IMAGE; see `vhdkit serve --help`. Default: writeback.",
)
@click.option("--description", metavar="TEXT", help="A description for clients that list the exports.")
def add_verb(
    server: _Server,
    export: str,
    read_only: bool,
    follow_leaf: bool,
    image_format: str | None,
    allow_parent_dir: tuple[str, ...],
    allow_raw_parent: bool,
    cache: str | None,
    description: str | None,
    json: bool,
    quiet: bool,
) -> None:
    """Serve another image, as the export NAME."""
    name, sign, path = export.partition("=")
    if not sign or not path:
        raise click.UsageError(f"{printable(export)!r} is not NAME=IMAGE")
    folders = [os.path.abspath(folder) for folder in allow_parent_dir]
    result = _ask(
        server, "add", as_json=json, name=name, path=os.path.abspath(path), read_only=read_only,
        follow_leaf=follow_leaf, format=image_format, parent_dirs=folders, allow_raw_parent=allow_raw_parent,
        **{name: value for name, value in (("description", description), ("cache", cache)) if value is not None},
    )  # fmt: skip
    if not json and not quiet:
        print_text(f"{printable(name)}: {printable(result['export']['description'])}")


@_verb("remove")
@click.argument("export")
@click.option("--disconnect", is_flag=True, help="Disconnect its clients first; they cannot reconnect.")
def remove_verb(server: _Server, export: str, disconnect: bool, json: bool, quiet: bool) -> None:
    """Flush EXPORT and stop serving it; refused while clients use it, unless --disconnect is given."""
    _ask(server, "remove", as_json=json, export=export, **({"disconnect": True} if disconnect else {}))
    if not json and not quiet:
        print_text(f"{printable(export)} is no longer served")


@_verb("disconnect")
@click.option("--export", help="All clients of this export.")
@click.option("--client", type=int, help="The client with this number, as `status` lists it.")
def disconnect_verb(server: _Server, export: str | None, client: int | None, json: bool, quiet: bool) -> None:
    """Disconnect clients when their pending requests are answered. They may reconnect."""
    if (export is None) == (client is None):
        raise click.UsageError("give either --export NAME or --client NUMBER")
    whom: dict[str, object] = {"export": export} if client is None else {"client": client}
    result = _ask(server, "disconnect", as_json=json, **whom)
    if not json and not quiet:
        print_text(f"disconnected {count(len(result['clients']), 'client')}")


@_verb("shutdown")
def shutdown_verb(server: _Server, json: bool, quiet: bool) -> None:
    """Stop the server as SIGTERM does: it answers pending requests and flushes everything."""
    _ask(server, "shutdown", as_json=json)
    if not json and not quiet:
        print_text("the server is shutting down")
