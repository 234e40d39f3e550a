# SPDX-License-Identifier: Apache-2.0
"""Saves the disk of an export while clients use it, through the control socket of its server.

Decides which calls freeze the export and merge its layers; `backup.single` decides when. The server may be another
process of another version, started in another folder: its paths are read from there.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vhdkit import errors, formats
from vhdkit.arguments import AnyPath
from vhdkit.backup.night import Stages
from vhdkit.backup.repository import create_repository
from vhdkit.backup.single import SavedDisk, SingleWishes, save_line
from vhdkit.chain.names.options import OpenOptions
from vhdkit.serve.control.client import ControlClient
from vhdkit.store import FileStore


@dataclass(slots=True)
class ServedLine:
    """The chain of an export. `folder` is the one that the server was started in."""

    client: ControlClient
    export: str
    leaf: str
    folder: str
    source: str
    must_freeze: bool = True
    max_rate_bytes: int | None = None  # of merges

    def freeze(self, note: Callable[[FileStore, bytes], None]) -> str:
        """See `Line.freeze`."""
        [row] = self.client.call("snapshot", exports={self.export: None})["snapshots"]
        self.leaf = os.path.join(self.folder, row["leaf"])
        return os.path.join(self.folder, row["frozen"])

    def give_back(self, frozen: str) -> None:
        """See `Line.give_back`."""
        self.client.call("merge", export=self.export, layer=None, into=frozen, max_rate_bytes=self.max_rate_bytes)
        self.leaf = frozen

    def merge(self, frozen: str, into: str) -> None:
        """See `Line.merge`."""
        self.client.call("merge", export=self.export, layer=frozen, into=into, max_rate_bytes=self.max_rate_bytes)


def backup_served(
    socket: AnyPath,
    repository: AnyPath,
    wishes: SingleWishes,
    *,
    export: str | None = None,
    options: OpenOptions | None = None,
    stage: Stages | None = None,
) -> SavedDisk:
    """Save the disk of an export as the next night of a repository, which is made if it does not exist.

    `export` may be left out if there is one. While the night is written, the export goes on in a new child of its
    image; afterwards that is merged back, or with `wishes.keep_reference` stays. Raises NotFound, InvalidArgument,
    ReadOnly, the errors of the server, and what `save_line` raises.
    """
    with ControlClient(socket, timeout_seconds=None) as client:
        status = client.call("status")
        found = _export(status, export, os.fsdecode(socket))
        folder = str(status.get("folder", os.curdir))
        leaf = os.path.join(folder, found["layers"][0]["path"])
        name = os.path.basename(found["name"] or leaf)
        name = os.path.splitext(name)[0] if formats.by_suffix(name) is not None else name
        source = f"{os.path.abspath(os.fsdecode(socket))}:{found['name']}"
        line = ServedLine(client, found["name"], leaf, folder, source)
        if wishes.night.limit is not None:
            line.max_rate_bytes = wishes.night.limit.bytes_per_second
        with create_repository(repository) as opened:
            return save_line(line, opened, wishes.name or name, wishes, options or OpenOptions(), stage)


def _export(status: dict[str, Any], name: str | None, socket: str) -> dict[str, Any]:
    """The export of this name, or the only one. Raises NotFound, InvalidArgument, ReadOnly."""
    exports: list[dict[str, Any]] = status["exports"]
    found = [one for one in exports if name in (None, one["name"])]
    names = ", ".join(errors.printable(repr(one["name"])) for one in exports)
    if not found:
        raise errors.NotFound(f"no export is named {errors.printable(repr(name))}; there are {names}", path=socket)
    if len(found) > 1:
        raise errors.InvalidArgument(f"serves {names}", path=socket, hint="name one of them: --export NAME")
    if found[0]["overlay"]:
        raise errors.InvalidArgument("is a temporary overlay, which is not saved", path=found[0]["path"])
    if found[0]["read_only"]:
        raise errors.ReadOnly("is served read-only: save the image itself", path=found[0]["path"])
    return found[0]
