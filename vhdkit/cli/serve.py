# SPDX-License-Identifier: Apache-2.0
"""`serve`: images and chains as NBD exports, until the server is stopped.

Decides which options exclude each other, what is printed when the server is ready, and what a signal does: the first
one shuts it down cleanly, a second one stops waiting for slow clients. Everything that was answered is flushed either
way.
"""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import shlex
import signal
import ssl
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import click

import vhdkit
from vhdkit import CacheMode
from vhdkit.cli.common import PATH, Common, epilog, image_options
from vhdkit.cli.failure import show_log
from vhdkit.cli.output import print_json
from vhdkit.cli.serve_nbdkit import ARGUMENTS, EngineCommand, find_nbdkit, run_nbdkit
from vhdkit.cli.unmeant import unmeant_ignored
from vhdkit.errors import printable
from vhdkit.folder import NewFile, is_folder, is_regular, read_whole, remove_file, write_whole
from vhdkit.serve.control.confinement import confined_to
from vhdkit.serve.control.operations import Operations
from vhdkit.serve.control.server import Control
from vhdkit.serve.nbd.listen import Listeners, is_activated, parse_address, parse_owner
from vhdkit.serve.nbd.options import TlsMode
from vhdkit.serve.nbd.server import NbdServer
from vhdkit.serve.nbd.tls import certificate_context, psk_context
from vhdkit.serve.nbdkit.command import NbdkitLaunch, writes
from vhdkit.serve.notify import READY, STOPPING, notify
from vhdkit.serve.opening import ExportRequest, ImageExport, OpenMode, open_exports, requests_of_file
from vhdkit.sockets import SocketFile
from vhdkit.units import KIB

_STOPPING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGXCPU)
_EXAMPLES = (
    "vhdkit serve disk.vhd --socket /run/disk.sock",
    "vhdkit serve system.avhd data.vhd --read-only",
    "vhdkit serve backup.avhd --overlay --listen localhost:10809",
    "nbdcopy -- [ vhdkit serve child.avhd ] copy.raw",
    "vhdkit serve disk.vhd --engine nbdkit -- --filter=partition partition=1",
)


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """The command line of `serve`."""

    image: tuple[str, ...]
    export: tuple[str, ...]
    exports: str | None
    description: str | None
    socket: str | None
    listen: str | None
    read_only: bool
    overlay: bool
    keep_overlay: str | None
    tls_certs: str | None
    tls_psk: str | None
    tls_required: bool
    control: str | None
    control_owner: str | None
    control_dir: tuple[str, ...]
    remember: str | None
    follow_leaf: bool
    insecure: bool
    socket_owner: str | None
    exit_last: bool
    pid_file: str | None
    stats: bool
    engine: str
    cache: str | None


@click.command(
    "serve",
    cls=EngineCommand,
    epilog=epilog(*_EXAMPLES, codes="Exit code 0 after Ctrl-C or SIGTERM, once everything written is flushed."),
)
@click.argument("image", nargs=-1, type=PATH)
@click.option("--export", metavar="NAME=IMAGE", multiple=True, help="Serve IMAGE as the export NAME. Repeatable.")
@click.option("--exports", metavar="FILE", type=PATH,
              help="Serve what FILE lists, a JSON array of objects with name, path and optionally description,"
                   " read_only, follow_leaf, format, parent_dirs, allow_raw_parent, sector_bytes, cache. With"
                   " --control the array may be empty.")  # fmt: skip
@click.option("--description", metavar="TEXT",
              help="A description of IMAGE for clients that list the exports, instead of its kind, size and file"
                   " name. For one image.")  # fmt: skip
@click.option(
    "--socket",
    metavar="PATH",
    type=PATH,
    help="Listen on a unix socket that only you may use. Default, without --listen: one in a new folder.",
)
@click.option("--listen", metavar="HOST:PORT", help="Listen on TCP. Port 0 means any free port.")
@click.option("--read-only", is_flag=True, help="Refuse writes; the images are opened for reading.")
@click.option(
    "--overlay",
    is_flag=True,
    help="Allow clients to write, but leave the images unchanged: changes are discarded at the end.",
)
@click.option(
    "--keep-overlay",
    metavar="FILE",
    type=PATH,
    help="With --overlay: keep the changes as FILE, a new child of the image.",
)
@click.option(
    "--tls-certs",
    metavar="DIR",
    type=PATH,
    help="Offer TLS with server-cert.pem and server-key.pem in DIR. With a ca-cert.pem there, clients need a"
    " certificate that it signed.",
)
@click.option(
    "--tls-psk",
    metavar="FILE",
    type=PATH,
    help="Offer TLS with the pre-shared keys in FILE, lines USER:HEX (Python 3.13 and newer).",
)
@click.option("--tls-required", is_flag=True, help="Refuse clients that do not use TLS.")
@click.option("--control", metavar="PATH", type=PATH,
              help="Accept commands of `vhdkit ctl` on this unix socket.")  # fmt: skip
@click.option("--control-owner", metavar="USER[:GROUP]",
              help="The user who may use the control socket instead of you (as root). The socket controls every"
                   " export (snapshot, merge, resize, remove), the clients, the server's shutdown, and files in"
                   " the folders of --control-dir.")  # fmt: skip
@click.option("--control-dir", metavar="DIR", type=PATH, multiple=True,
              help="Let the control owner open images (add) and make new leaves (snapshot EXPORT=NEW) in DIR and"
                   " below. Only root and you may have write access to DIR. Repeatable.")  # fmt: skip
@click.option("--remember", metavar="DIR", type=PATH,
              help="Note in DIR, a private folder in memory, what is not yet in the images, so that clients lose"
                   " nothing when the server is killed and started again.")  # fmt: skip
@click.option("--follow-leaf", is_flag=True, help="Serve the newest descendant of IMAGE, as left by live snapshots.")
@click.option("--insecure", is_flag=True, help="Listen for other machines even without encryption.")
@click.option("--socket-owner", metavar="USER[:GROUP]",
              help="The user who may use the unix socket of the clients instead of you (as root).")  # fmt: skip
@click.option("--exit-last", is_flag=True, help="Exit when the last client has disconnected.")
@click.option("--pid-file", metavar="FILE", type=PATH, help="Write the server's process id to FILE when it is ready.")
@click.option("--cache", type=click.Choice([one.value for one in CacheMode]),
              help="none: keep little of the images in the page cache, for guests, which cache their disks. A flush"
                   " makes the same durable. Default: writeback.")  # fmt: skip
@click.option("--stats", is_flag=True, help="Show clients, requests and latencies on the terminal.")
@click.option("--engine", type=click.Choice(["builtin", "nbdkit"]), default="builtin", show_default=True,
              help="The server: the built-in one, which is faster, or nbdkit with our plugin, for its filters. "
                   "Arguments after -- then go to nbdkit.")  # fmt: skip
@image_options()
def serve_command(common: Common, **words: Any) -> None:
    """Serve IMAGE, a chain's leaf or a single image, as an NBD export named after its file, until Ctrl-C or SIGTERM.

    The first export is the default one. A client may use several connections: a flush on one of them flushes the
    writes of all. The address is printed on standard output when clients can connect; sockets that a service manager
    passes (LISTEN_FDS) are used as they are.

    \b
    With --json, when ready: {"pid", "uris": [...],
      "exports": [{"name", "uri", "path", "description", "size_bytes",
                   "read_only", "cache"}], "control",
      "addresses": [URI without an export's name, ...]}
    """
    given = ServeOptions(**words)
    _check(given)
    _log_to_stderr(common)
    if given.cache is not None:
        common = replace(common, options=replace(common.options, cache=CacheMode(given.cache)))
    with unmeant_ignored():
        _ENGINES[given.engine](given, common)


def _check(given: ServeOptions) -> None:
    """Raise UsageError for options that exclude each other."""
    if not given.image and not given.export and given.exports is None:
        raise click.UsageError("give an IMAGE to serve")
    if given.exports is not None and (given.overlay or given.read_only or given.cache or given.engine != "builtin"):
        raise click.UsageError(
            "--exports states for each image how it is opened: leave out --read-only, --overlay, --cache and --engine"
        )
    if given.description is not None and (given.exports is not None or len(given.image) + len(given.export) != 1):
        raise click.UsageError('--description is for one image; in a file for --exports each may have a "description"')
    if given.overlay and given.read_only:
        raise click.UsageError("--read-only and --overlay cannot be combined")
    if is_activated() and (given.socket or given.listen):
        raise click.UsageError("sockets were passed by LISTEN_FDS: leave out --socket and --listen")
    if given.keep_overlay is not None and (not given.overlay or len(given.image) + len(given.export) != 1):
        raise click.UsageError("--keep-overlay requires --overlay and one image")
    if given.tls_certs and given.tls_psk:
        raise click.UsageError("--tls-certs and --tls-psk cannot be combined")
    if given.tls_required and not (given.tls_certs or given.tls_psk):
        raise click.UsageError("--tls-required requires --tls-certs DIR")
    if (given.control_owner or given.control_dir) and given.control is None:
        raise click.UsageError("--control-owner and --control-dir require --control")
    if given.control_dir and not given.control_owner:
        raise click.UsageError("--control-dir requires --control-owner: without it, any file may be named")
    if given.socket_owner and given.listen and not given.socket:
        raise click.UsageError("--socket-owner applies to a unix socket, not to --listen")


def _log_to_stderr(common: Common) -> None:
    """Warnings always; with -v what every client does."""
    level = logging.ERROR if common.quiet else logging.INFO if common.verbose else logging.WARNING
    show_log(level, in_full=common.verbose)


def _wanted(given: ServeOptions, common: Common) -> list[ExportRequest]:
    """The images in the order of their kind: plain ones first."""
    wanted = [ExportRequest(path, description=given.description) for path in given.image]
    for word in given.export:
        name, sign, path = word.partition("=")
        if not sign or not path:
            raise click.UsageError(f"--export {word!r} is not NAME=IMAGE")
        wanted.append(ExportRequest(path, name, description=given.description))
    if given.exports is not None:
        wanted += [_trusting(one, common) for one in requests_of_file(given.exports)]
    if not wanted and given.control is None:
        raise click.UsageError(f"{given.exports} lists nothing, and without --control nothing can be added")
    return wanted


def _trusting(wanted: ExportRequest, common: Common) -> ExportRequest:
    """A request from a file for --exports, with the folders that are allowed for every command."""
    assert wanted.open_mode is not None
    options = wanted.open_mode.options
    options = replace(
        options,
        parent_dirs=(*options.parent_dirs, *common.trusted.parent_dirs),
        notes_folder=common.options.notes_folder,
    )
    return replace(wanted, open_mode=replace(wanted.open_mode, options=options))


def _serve_builtin(given: ServeOptions, common: Common) -> None:
    with contextlib.ExitStack() as unserved, contextlib.ExitStack() as cleanup:
        tls = _tls(given)
        common = replace(common, options=replace(common.options, notes_folder=_notes_folder(given)))
        open_mode = OpenMode(common.options, given.read_only, given.overlay, given.keep_overlay, given.follow_leaf)
        exports = open_exports(_wanted(given, common), open_mode)
        for export in exports:
            cleanup.callback(_close, export)
        if given.keep_overlay is not None:
            unserved.callback(_remove_quietly, given.keep_overlay)
        listeners = cleanup.enter_context(Listeners())
        activated = _listen(given, listeners)
        mode = TlsMode.OFF if tls is None else TlsMode.REQUIRED if given.tls_required else TlsMode.OFFERED
        server = NbdServer(exports, tls_context=tls, tls_mode=mode, exit_last=given.exit_last)
        cleanup.callback(server.close)
        for sock in listeners.sockets:
            server.listen(sock)
        if given.control is not None:
            _take_commands(given, common, server, exports, cleanup)
        cleanup.enter_context(stopped_in_order(server))
        if given.pid_file is not None:
            cleanup.enter_context(pid_file(given.pid_file))
        if not activated or common.json:
            _print_ready(exports, listeners, given, common)
        notify(READY)
        unserved.pop_all()  # from now on clients may have written to it
        if given.stats:
            from vhdkit.cli.statistics import stats_shown

            cleanup.enter_context(stats_shown(server))
        allow_descriptors()
        server.run()


def _notes_folder(given: ServeOptions) -> str | None:
    """Where changes of images are noted; changes that are discarded at the end need no notes. Raises NotFound."""
    if given.remember is not None:
        if not is_folder(given.remember):
            raise vhdkit.NotFound("no such folder", path=given.remember, hint="make it first")
        NewFile.check(os.path.join(given.remember, "notes"))  # now, not with the first write
    return None if given.overlay and given.keep_overlay is None else given.remember


def allow_descriptors() -> None:
    """Raise the limit of descriptors: each client takes one, and the usual limit allows too few clients."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _tls(given: ServeOptions) -> ssl.SSLContext | None:
    if given.tls_psk is not None:
        return psk_context(given.tls_psk)
    return certificate_context(given.tls_certs) if given.tls_certs is not None else None


def _take_commands(
    given: ServeOptions, common: Common, server: NbdServer, exports: list[ImageExport], cleanup: contextlib.ExitStack
) -> None:
    """Open the control socket. If it is given to another user, that user's paths are confined."""
    assert given.control is not None
    confined = confined_to(given.control_dir)
    try:
        owner = parse_owner(given.control_owner) if given.control_owner else None
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    socket_file = SocketFile(given.control, owner=owner)
    cleanup.callback(socket_file.close)
    operations = Operations(server, exports, notes_folder=common.options.notes_folder)
    control = Control(server.loop, operations.methods(), operations.methods(confined) if owner else None)
    cleanup.callback(operations.close)
    cleanup.callback(control.close)
    control.listen(socket_file.socket)


def _remove_quietly(path: str) -> None:
    """Remove a child that no client could use."""
    with contextlib.suppress(vhdkit.VhdkitError):
        remove_file(path)


def _serve_nbdkit(given: ServeOptions, common: Common) -> None:
    """Open all images first, for better error messages than nbdkit's; then leave them to nbdkit."""
    if given.control or given.keep_overlay or given.stats:
        raise click.UsageError(
            "--control, --keep-overlay and --stats do not work with nbdkit: leave out --engine nbdkit"
        )
    program = find_nbdkit()
    launch = NbdkitLaunch(
        (), common.options, given.read_only, given.overlay, given.exit_last,
        description=given.description, tls_certs=given.tls_certs, tls_psk=given.tls_psk,
        tls_required=given.tls_required, arguments=click.get_current_context().meta.get(ARGUMENTS, ()),
    )  # fmt: skip
    open_mode = OpenMode(common.options, read_only=not writes(launch), follow_leaf=given.follow_leaf)
    exports = open_exports(_wanted(given, common), open_mode)
    for export in exports:
        export.disk.close()
        export.read_only = given.read_only
    images = tuple((export.name, os.path.abspath(export.image_path)) for export in exports)
    with contextlib.ExitStack() as cleanup:
        listeners = cleanup.enter_context(Listeners())
        activated = _listen(given, listeners)

        def ready() -> None:
            if given.pid_file is not None:
                cleanup.enter_context(pid_file(given.pid_file))
            if not activated or common.json:
                _print_ready(exports, listeners, given, common)
            notify(READY)

        run_nbdkit(program, replace(launch, exports=images), listeners.sockets, ready)


def _close(export: ImageExport) -> None:
    """Close an export that the server has not closed."""
    export.disk.close()


def _listen(given: ServeOptions, listeners: Listeners) -> bool:
    """Open the requested sockets. True when a service manager passed them, which then knows their addresses."""
    if listeners.add_activated():
        return True
    try:
        owner = parse_owner(given.socket_owner) if given.socket_owner else None
        address = parse_address(given.listen) if given.listen is not None else None
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    if address is not None:
        listeners.add_tcp(*address, open_to_all=given.insecure or given.tls_required)
    if given.socket is not None or address is None:
        listeners.add_unix(given.socket, owner=owner)
    return False


@contextlib.contextmanager
def stopped_in_order(server: NbdServer) -> Iterator[None]:
    """From now on signals stop the server, not the process. They stay caught, so that the last flush completes."""
    seen = 0

    def stop(number: int, frame: object) -> None:
        nonlocal seen
        seen += 1
        notify(STOPPING)
        if seen == 1:
            server.stop()
        else:
            server.loop.stop()

    for one in _STOPPING_SIGNALS:
        if signal.getsignal(one) != signal.SIG_IGN:  # a signal that was ignored at our start (nohup) stays ignored
            signal.signal(one, stop)
    yield


def _is_pid_file(path: str) -> bool:
    """True for a file with a number in it and nothing else, or with nothing."""
    raw = read_whole(path, KIB)
    return raw is not None and (not raw or raw.strip().isdigit())


@contextlib.contextmanager
def pid_file(path: str) -> Iterator[None]:
    """Keep a file with our process id while the block runs."""
    text = f"{os.getpid()}\n".encode()
    if is_regular(path) and not _is_pid_file(path):
        raise vhdkit.AlreadyExists("exists and is not a pid file: it is not replaced", path=path)
    write_whole(path, text, mode=0o644)
    try:
        yield
    finally:
        with contextlib.suppress(vhdkit.VhdkitError):
            if read_whole(path, KIB) == text:  # else another process has replaced it
                remove_file(path)


def _print_ready(exports: list[ImageExport], listeners: Listeners, given: ServeOptions, common: Common) -> None:
    """Print the addresses of the exports."""
    secure = bool(given.tls_certs or given.tls_psk)
    addresses = [address.uri("", secure=secure) for address in listeners.addresses]
    uris = {
        export.name: [address.uri(export.name, secure=secure) for address in listeners.addresses] for export in exports
    }
    if common.json:
        rows = [
            {
                "name": export.name,
                "uri": uris[export.name][0],
                "path": export.image_path,
                "description": export.description,
                "size_bytes": export.disk.size_bytes,
                "read_only": export.read_only,
                "cache": export.open_mode.options.cache.value,
            }
            for export in exports
        ]
        print_json({"pid": os.getpid(), "uris": [one for export in exports for one in uris[export.name]],
                    "exports": rows, "control": given.control, "addresses": addresses})  # fmt: skip
    elif not common.quiet:
        for export in exports:
            for uri in uris[export.name]:
                click.echo(uri)
        if not exports:
            click.echo(f"ready at {' '.join(addresses)}, with no export yet; to add one: vhdkit ctl"
                       f" {shlex.quote(printable(given.control or ''))} add NAME=IMAGE")  # fmt: skip
    sys.stdout.flush()


_ENGINES: dict[str, Callable[[ServeOptions, Common], None]] = {"builtin": _serve_builtin, "nbdkit": _serve_nbdkit}
