# SPDX-License-Identifier: Apache-2.0
"""The methods of the control socket: report the state, freeze disks, change exports, disconnect clients, shut down.

Decides the parameters and the result of each method. How requests are encoded is decided in `control`, in which order
a leaf becomes a parent in `chain.verbs.live`. A method that holds exports, or reads files, is marked as taking long.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from vhdkit import errors, formats
from vhdkit.chain.names.parents import allowed_folders, format_id, refuse_name_of_child
from vhdkit.chain.verbs.live import Freezing, freezing
from vhdkit.chain.verbs.resize import resize_open
from vhdkit.disk import Disk
from vhdkit.folder import real_path
from vhdkit.serve.control.confinement import Confinement
from vhdkit.serve.control.merging import MergeRequest, ServedMerge, flush_beside, plan_served_merge
from vhdkit.serve.control.parameters import flag, only, rate, text
from vhdkit.serve.control.pulling import PullRequest, ServedPull, plan_served_pull
from vhdkit.serve.control.server import BadParams, Method, Params
from vhdkit.serve.nbd.connection import Connection
from vhdkit.serve.nbd.server import NbdServer
from vhdkit.serve.opening import ExportRequest, ImageExport, open_exports, request_of_document


class Operations:
    """The methods of one server. `started`: when it began to serve, in seconds since the epoch."""

    def __init__(self, server: NbdServer, exports: list[ImageExport], *, notes_folder: str | None = None) -> None:
        """`notes_folder`: `OpenOptions.notes_folder` of the images that are added."""
        self._server = server
        self._notes_folder = notes_folder
        self._exports = exports
        self._started = time.time()
        self._work: dict[str, ServedMerge | ServedPull] = {}  # in progress, by export
        self._changing = threading.Lock()  # held to change a chain that is not being merged, or to start its merge
        # New leaves made in advance for the next snapshot, and what removes them again.
        self._prepared: tuple[Freezing, contextlib.ExitStack] | None = None

    def methods(self, confined: Confinement | None = None) -> dict[str, Method]:
        """The methods by name. `confined`: for clients that may have files opened and created only in some places."""
        return {
            "status": Method(self._status),
            "prepare": Method(partial(self._prepare, confined), takes_long=True),
            "snapshot": Method(partial(self._snapshot, confined), takes_long=True),
            "merge": Method(self._merge, takes_minutes=True),
            "pull": Method(self._pull, takes_minutes=True),
            "cancel": Method(self._cancel),
            "resize": Method(self._resize, takes_long=True),
            "set-read-only": Method(self._set_read_only, takes_long=True),
            "add": Method(partial(self._add, confined), takes_long=True),
            "remove": Method(self._remove, takes_long=True),
            "disconnect": Method(self._disconnect),
            "shutdown": Method(self._shutdown),
        }

    # -- parameters ---------------------------------------------------------------------------------------------

    def _find(self, name: object) -> ImageExport:
        for export in self._exports:
            if export.name == name:
                return export
        names = ", ".join(repr(export.name) for export in self._exports)
        raise errors.NotFound(f"no export is named {name!r}; there are {names}")

    def _one_or_all(self, params: Params) -> list[ImageExport]:
        """The export named by the parameter `export`, or all of them."""
        name = text(params, "export")
        return list(self._exports) if name is None else [self._find(name)]

    # -- looking ------------------------------------------------------------------------------------------------

    def _status(self, params: Params) -> object:
        """Exports with their layers, clients, counters. Runs on the loop: it waits for nothing."""
        only(params)
        stats = self._server.stats
        return {
            "pid": os.getpid(),
            "folder": real_path(os.curdir),  # where relative paths of layers begin
            "uptime_seconds": round(time.time() - self._started, 3),
            "exports": [_export_document(export) | self._work_document(export) for export in self._exports],
            "clients": [_client_document(connection) for connection in self._server.connections],
            "requests": stats.requests,
            "errors": stats.errors,
            "bytes_received": stats.bytes_received,
            "bytes_sent": stats.bytes_sent,
            "latency_us": [[limit, count] for limit, count in stats.histogram_us().items()],
        }

    def _work_document(self, export: ImageExport) -> dict[str, Any]:
        work = self._work.get(export.name)
        return {
            "merge": work.document() if isinstance(work, ServedMerge) else None,
            "pull": work.document() if isinstance(work, ServedPull) else None,
        }

    # -- merging ------------------------------------------------------------------------------------------------

    def _merge(self, params: Params) -> object:
        """Merge layers of one export into one of them while clients continue.

        {"export", "layer": path or null (the leaf), "into": path or null (its parent), "max_rate_bytes": or null}
        """
        only(params, "export", "layer", "into", "max_rate_bytes")
        request = MergeRequest(text(params, "layer"), text(params, "into"), rate(params))
        return self._work_on(params, lambda export: ServedMerge(self._server, plan_served_merge(export, request)))

    def _pull(self, params: Params) -> object:
        """Fill a layer of one export from those below it while clients continue.

        {"export", "layer": path or null (the leaf), "to": path or null (the base), "cut": false, "max_rate_bytes": or
        null}. With `cut` the layer then does without the layers that it was filled from.
        """
        only(params, "export", "layer", "to", "cut", "max_rate_bytes")
        request = PullRequest(text(params, "layer"), text(params, "to"), flag(params, "cut"), rate(params))
        return self._work_on(params, lambda export: ServedPull(self._server, plan_served_pull(export, request)))

    def _work_on(self, params: Params, make: Callable[[ImageExport], ServedMerge | ServedPull]) -> object:
        """Do what `make` gives for the export, alone."""
        name = text(params, "export")
        with self._changing:  # a snapshot in progress finishes first, and its chain is changed
            export = self._find(name)
            self._forget_prepared()
            self._refuse_merging([export])
            work = self._work[export.name] = make(export)
        try:
            with self._server.using():
                return work.run()
        finally:
            del self._work[export.name]

    def _cancel(self, params: Params) -> object:
        """Cancel the merge or pull of an export, or of all; copied data is kept. {"export": name or null}"""
        only(params, "export")
        exports = self._one_or_all(params)
        stopped = [export.name for export in exports if export.name in self._work]
        for name in stopped:
            self._work[name].cancel()
        return {"exports": stopped}

    def _refuse_merging(self, exports: list[ImageExport]) -> None:
        """Raise ImageInUse for an export whose layers are being merged or filled: that controls its chain."""
        for export in exports:
            if export.name in self._work:
                work = "merge" if isinstance(self._work[export.name], ServedMerge) else "pull"
                raise errors.ImageInUse(
                    f"the layers of export {export.name!r} are being {'merged' if work == 'merge' else 'filled'}",
                    path=export.image_path,
                    hint=f"wait for the {work} (`status` shows its progress), or stop it: cancel",
                )

    # -- changing -----------------------------------------------------------------------------------------------

    def _prepare(self, confined: Confinement | None, params: Params) -> object:
        """Create the new leaves of a snapshot in advance, so that taking it is quick; parameters as for `snapshot`.

        They are removed when others are prepared or taken, with {"exports": {}}, and at the server's end.
        """
        pairs = [] if params == {"exports": {}} else self._pairs(confined, params)
        with self._changing:
            self._forget_prepared()
            if not pairs:
                return {"exports": {}}
            self._refuse_merging([export for export, _ in pairs])
            with contextlib.ExitStack() as held:
                prepared = held.enter_context(freezing([(export.disk.chain, path) for export, path in pairs]))
                self._prepared = prepared, held.pop_all()
            paths = prepared.plan.paths
        return {"exports": {export.name: path for (export, _), path in zip(pairs, paths, strict=True)}}

    def _forget_prepared(self) -> None:
        prepared, self._prepared = self._prepared, None
        if prepared is not None:
            with contextlib.suppress(errors.VhdkitError):
                prepared[1].close()  # without having been taken, the new leaves are removed

    def close(self) -> None:
        """The server has ended: remove leaves that were only prepared."""
        with self._changing:
            self._forget_prepared()

    @contextlib.contextmanager
    def _freezing(self, pairs: list[tuple[ImageExport, str | None]]) -> Iterator[Freezing]:
        """The new leaves: those prepared for exactly these exports, or freshly made ones."""
        chains = [(export.disk.chain, path) for export, path in pairs]
        prepared = self._prepared
        if prepared is not None and prepared[0].plan.is_for(chains):
            self._prepared = None
            with prepared[1]:
                yield prepared[0]
            return
        self._forget_prepared()
        with freezing(chains) as made:
            yield made

    def _pairs(self, confined: Confinement | None, params: Params) -> list[tuple[ImageExport, str | None]]:
        """The exports to freeze, each with the path of its new leaf. Raises BadParams, and errors for refused ones."""
        only(params, "exports")
        wanted = params.get("exports")
        if wanted is None:
            wanted = {export.name: None for export in self._exports}
        if not isinstance(wanted, dict) or not wanted:
            raise BadParams('"exports" must be an object: {export: path of the new leaf or null}')
        pairs = [(self._find(name), _new_path(path)) for name, path in wanted.items()]
        for export, _ in pairs:
            if export.is_temporary:
                raise errors.InvalidArgument(
                    f"export {export.name!r} is a temporary overlay, not an image that could be frozen",
                    path=export.image_path,
                )
        if confined is not None:
            pairs = [(export, _confined_place(confined, export, path)) for export, path in pairs]
        for export, path in pairs:
            _check_place(export, path)
        return pairs

    def _snapshot(self, confined: Confinement | None, params: Params) -> object:
        """Freeze leaves, all or none; {"exports": {name: path of the child, or null}}; default: all exports."""
        pairs = self._pairs(confined, params)
        exports = [export for export, _ in pairs]
        with self._changing:
            self._refuse_merging(exports)
            frozen = [export.disk.path for export in exports]
            with self._freezing(pairs) as prepared:
                flush_beside(exports)
                with self._server.hold(exports) as hold:
                    disks = [Disk(chain) for chain in prepared.freeze()]
                    for export, disk in zip(exports, disks, strict=True):
                        export.exchange(disk)
                    prepared.done()
        rows = [
            {"export": export.name, "frozen": old, "leaf": new}
            for export, old, new in zip(exports, frozen, prepared.plan.paths, strict=True)
        ]
        return {"snapshots": rows, "held_seconds": round(hold.seconds, 6)}

    def _resize(self, params: Params) -> object:
        """Change the size of one export's disk; {"export", "size_bytes", "shrink", "under_clients"}.

        Connected clients keep the old size; those that connect later see the new one. So a smaller
        size, which requires `shrink`, is refused while clients are connected, unless `under_clients` is true.
        """
        only(params, "export", "size_bytes", "shrink", "under_clients")
        shrink, under_clients = flag(params, "shrink"), flag(params, "under_clients")
        export, size = self._find(text(params, "export")), params.get("size_bytes")
        if not isinstance(size, int) or isinstance(size, bool) or size <= 0:
            raise BadParams('"size_bytes" must be a positive number')
        if export.open_mode.overlay:
            raise errors.InvalidArgument("is under an overlay and is not changed", path=export.image_path)
        if export.read_only:
            raise errors.ReadOnly("is served read-only", path=export.image_path)
        with self._changing:
            self._refuse_merging([export])
            self._forget_prepared()
            with self._server.hold([export]):
                if size < export.disk.size_bytes and not under_clients:
                    self._refuse_clients(export)
                chain, outcome = resize_open(export.disk.chain, size, shrink=shrink)
                export.exchange(Disk(chain))
        if isinstance(outcome, errors.VhdkitError):
            raise outcome
        return {
            "export": export.name,
            "size_before_bytes": outcome.virtual_size_before_bytes,
            "size_bytes": outcome.virtual_size_after_bytes,
            "notes": list(outcome.notes),
        }

    def _refuse_clients(self, export: ImageExport) -> None:
        """Raise ImageInUse while clients are connected, since they would continue to use the part that is cut off."""
        clients = [one for one in self._server.connections if one.export is export]
        if clients:
            raise errors.ImageInUse(
                f"{len(clients)} clients are connected to {export.name!r} and would keep the larger size",
                path=export.image_path,
                hint="disconnect them first (`disconnect --export`), or add --under-clients",
            )

    def _set_read_only(self, params: Params) -> object:
        """Refuse further writes, with everything written so far on the device; {"export", "read_only": true}."""
        only(params, "export", "read_only")
        exports = self._one_or_all(params)
        read_only = params.get("read_only", True)
        if not isinstance(read_only, bool):
            raise BadParams('"read_only" must be true or false')
        for export in exports:
            if not read_only and not export.disk.chain.writable:
                raise errors.ReadOnly("was opened read-only", path=export.image_path)
        with self._server.hold(exports):
            for export in exports:
                export.disk.flush()
            for export in exports:
                export.set_read_only(read_only)
        return {"exports": [export.name for export in exports], "read_only": read_only}

    def _add(self, confined: Confinement | None, params: Params) -> object:
        """Add an export; the parameters are those of an entry of an exports file (`opening`)."""
        try:
            wanted = request_of_document(params)
        except errors.InvalidArgument as error:
            raise BadParams(error.problem) from error
        if confined is not None:
            wanted = _confined_image(confined, wanted)
        held = next((one for one in self._exports if real_path(one.image_path) == real_path(wanted.path)), None)
        if held is not None:
            raise errors.ImageInUse(f"is already served as {held.name!r}", path=wanted.path)
        assert wanted.open_mode is not None
        options = replace(wanted.open_mode.options, notes_folder=self._notes_folder)
        open_mode = replace(wanted.open_mode, options=options)
        [export] = open_exports([replace(wanted, open_mode=open_mode)], open_mode)
        try:
            self._server.add_export(export)
        except BaseException:
            export.disk.close()
            raise
        self._exports.append(export)
        return {"export": _export_document(export)}

    def _remove(self, params: Params) -> object:
        """Stop serving an export, with everything written on the device. {"export", "disconnect": false}

        Refused while it has clients, unless `disconnect` first disconnects them; they cannot reconnect to it.
        """
        only(params, "export", "disconnect")
        export, disconnect = self._find(text(params, "export")), flag(params, "disconnect")
        with self._changing, self._server.using():  # the server, when it ends, leaves closing the disk to us
            self._refuse_merging([export])
            self._server.remove_export(export, disconnect=disconnect)
            self._exports.remove(export)
            export.disk.close()
        return {"export": export.name}

    def _disconnect(self, params: Params) -> object:
        """Disconnect one client, by its number, or all clients of an export; {"client"} or {"export"}."""
        only(params, "client", "export")
        number = params.get("client")
        if ("client" in params) == ("export" in params):
            raise BadParams('give either "client", a number, or "export", a name')
        if "export" in params:
            export = self._find(text(params, "export"))
            leaving = [one for one in self._server.connections if one.export is export]
        elif isinstance(number, int) and not isinstance(number, bool):
            leaving = [one for one in self._server.connections if one.number == number]
            if not leaving:
                raise errors.NotFound(f"no client has the number {number}")
        else:
            raise BadParams('"client" must be a number')
        self._server.disconnect(leaving)
        return {"clients": [one.number for one in leaving]}

    def _shutdown(self, params: Params) -> object:
        """Shut down as on SIGTERM."""
        only(params)
        self._server.stop()
        return {}


def _new_path(path: object) -> str | None:
    """The path of a new child. It must be absolute, as clients do not know the server's working folder."""
    if path is None:
        return None
    if not isinstance(path, str) or not path.startswith(os.sep) or "\0" in path:
        raise BadParams("the path of a new leaf must be absolute, or null for the usual name")
    return path


def _confined_place(confined: Confinement, export: ImageExport, path: str | None) -> str | None:
    """The path of a new leaf requested by a client of another user."""
    if path is None:
        confined.beside(export.image_path)
        return None
    return confined.new_file(path)


def _confined_image(confined: Confinement, wanted: ExportRequest) -> ExportRequest:
    """A client of another user's request, with real paths. It may not ask which image is the newest, or where."""
    assert wanted.open_mode is not None
    if wanted.open_mode.follow_leaf:
        raise errors.AccessDenied(
            "a control owner must name the newest image, and cannot have the server search for it", path=wanted.path
        )
    options = wanted.open_mode.options
    folders = tuple(confined.folder(folder) for folder in options.parent_dirs)
    known = tuple(confined.image(image) for image in options.known_images)  # these are opened, too
    open_mode = replace(wanted.open_mode, options=replace(options, parent_dirs=folders, known_images=known))
    return replace(wanted, path=confined.image(wanted.path), open_mode=open_mode)


def _check_place(export: ImageExport, path: str | None) -> None:
    """Refuse a new leaf where an open of the frozen image would not find it: writes would then corrupt the leaf.

    Refuses the name of another format, too.
    """
    folders = allowed_folders(export.image_path, export.open_mode.options.parent_dirs)
    if path is not None and os.path.dirname(real_path(path)) not in folders:
        raise errors.InvalidArgument(
            f"the new leaf {errors.printable(path)} would be outside the folders that are searched for children",
            path=export.image_path,
            hint="put it into the same folder, or start the server with --allow-parent-dir and that folder",
        )
    if path is not None:
        refuse_name_of_child(path, export.disk.path, formats.of(export.disk.chain.leaf))


def _export_document(export: ImageExport) -> dict[str, Any]:
    """An export as reported by `status`. Layers are listed leaf first."""
    disk = export.disk
    layers = [
        {
            "path": layer.store.name,
            "kind": layer.facts.title,
            "format": layer.format_name,
            "unique_id": unique_id,
            "file_id": None if layer.facts.file_id is None else format_id(layer.facts.file_id),
            "writable": layer.writable,
        }
        for layer, unique_id in zip(disk.chain.layers, disk.layer_ids, strict=True)
    ]
    return {
        "name": export.name,
        "description": export.description,
        "path": export.image_path,
        "size_bytes": disk.size_bytes,
        "read_only": export.read_only,
        "overlay": export.is_temporary,
        "cache": export.open_mode.options.cache.value,
        "jobs": export.jobs,
        "layers": layers,
    }


def _client_document(connection: Connection) -> dict[str, Any]:
    return {
        "client": connection.number,
        "peer": connection.peer,
        "export": connection.export.name if connection.export is not None else None,
        "tls": connection.is_secure,
        "connected_seconds": round(time.time() - connection.opened, 3),
    }
