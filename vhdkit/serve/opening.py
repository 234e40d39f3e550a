# SPDX-License-Identifier: Apache-2.0
"""From what the user names to exports: which image is opened how, under which name, with which words.

Decides names and descriptions of exports, and what is refused before anything is opened. Must not know sockets.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

from vhdkit import errors
from vhdkit.chain.create import create_child
from vhdkit.chain.live import newest_leaf, scratch_child
from vhdkit.chain.resolve import OpenOptions
from vhdkit.disk import Disk, open_disk
from vhdkit.errors import printable
from vhdkit.folder import real_path, remove_file
from vhdkit.formats.vhd.dynamic import DynamicImage
from vhdkit.formats.vhd.fixed import FixedImage
from vhdkit.image import Layer
from vhdkit.serve import nbd_wire as wire
from vhdkit.serve.export import Export
from vhdkit.units import format_size


@dataclass(frozen=True, slots=True)
class Wanted:
    """An image to be served: its path, and its name where it is not to be called as the file."""

    path: str
    name: str | None = None

    @property
    def export_name(self) -> str:
        """What clients call it."""
        return os.path.basename(self.path) if self.name is None else self.name


@dataclass(frozen=True, slots=True)
class Manner:
    """How images are opened. `follow_leaf`: the newest image that stands on the named one is served in its place.

    `overlay`: what is written goes to a nameless temporary child that is gone when the server ends, or to a new child
    `keep_overlay`, which is a whole image at every moment.
    """

    options: OpenOptions
    read_only: bool = False
    overlay: bool = False
    keep_overlay: str | None = None
    follow_leaf: bool = False


class ImageExport(Export):
    """An export that knows how its image was opened, for what is done to it while it is served."""

    def __init__(self, name: str, disk: Disk, manner: Manner) -> None:
        super().__init__(name, disk, read_only=manner.read_only)
        self.manner = manner
        self.description = described(disk, temporary=self.is_temporary)

    @property
    def is_temporary(self) -> bool:
        """True while the top layer is a nameless one."""
        return self.manner.overlay and self.manner.keep_overlay is None

    @property
    def image_path(self) -> str:
        """The image that is served, whatever lies on it for the time being."""
        return self.disk.chain.layers[1 if self.is_temporary else 0].store.name

    def set_read_only(self, read_only: bool) -> None:
        """Refuse all writing from now on, or allow it again; the export is held.

        Clients that are connected get EPERM. Those that came while it was read-only have to come anew to write.
        """
        self.read_only = read_only
        self.disk.writable = self.disk.chain.writable and not read_only

    def exchange(self, disk: Disk) -> None:
        """Serve another disk from now on; the export is held."""
        disk.writable = disk.writable and not self.read_only
        self.disk = disk
        self.description = described(disk, temporary=self.is_temporary)


def check_wanted(wanted: Sequence[Wanted]) -> None:
    """Raise InvalidArgument for names that cannot be, ImageInUse for an image that is named twice."""
    names: set[str] = set()
    paths: set[str] = set()
    for one in wanted:
        name = one.export_name
        try:
            size = len(name.encode())
        except UnicodeEncodeError as error:
            raise errors.InvalidArgument(
                "has a name that is no UTF-8 text, as the names of exports are",
                path=one.path,
                hint="give it another: --export NAME=IMAGE",
            ) from error
        if size > wire.MAX_STRING_BYTES or "\0" in name:
            raise errors.InvalidArgument(f"the name of an export has at most {wire.MAX_STRING_BYTES} bytes, none zero")
        real = real_path(one.path)
        if real in paths:
            raise errors.ImageInUse("is exported twice", path=one.path)
        if name in names:
            raise errors.InvalidArgument(
                f"two exports are called {name!r}", path=one.path, hint="name them apart: --export NAME=IMAGE"
            )
        names.add(name)
        paths.add(real)


def open_exports(wanted: Sequence[Wanted], manner: Manner) -> list[ImageExport]:
    """Open all images, or none. Raises what opening them raises."""
    check_wanted(wanted)
    exports: list[ImageExport] = []
    try:
        for one in wanted:
            exports.append(ImageExport(one.export_name, _open(one.path, manner), manner))
    except BaseException:
        for export in exports:
            export.disk.close()
        raise
    return exports


def _open(path: str, manner: Manner) -> Disk:
    if manner.follow_leaf:
        path = newest_leaf(path, manner.options)
    if manner.keep_overlay is not None:
        return _open_kept(path, manner.keep_overlay, manner.options)
    writable = not manner.read_only and not manner.overlay
    disk = open_disk(path, writable=writable, options=manner.options)
    if not manner.overlay:
        return disk
    try:
        return Disk(scratch_child(disk.chain, scratch_folder()))
    except BaseException:
        disk.close()
        raise


def _open_kept(path: str, child: str, options: OpenOptions) -> Disk:
    """A new child of the image, open for writing; removed again when it cannot be opened."""
    try:
        create_child(child, path, options=options)
    except errors.AlreadyExists as error:
        error.hint = "choose another name, or serve that file: it holds what was kept"
        raise
    try:
        # The parent was opened with its own folder allowed; from the child on, that has to be said.
        folders = (*options.parent_dirs, os.path.dirname(real_path(path)))
        trusting = replace(options, parent_dirs=folders, allow_raw_parent=True, format_name=None)
        return open_disk(child, writable=True, options=trusting)
    except BaseException:
        remove_file(child)
        raise


def scratch_folder() -> str | None:
    """Where temporary children lie: $TMPDIR, else the place for large temporary files; None to look elsewhere."""
    return os.environ.get("TMPDIR") or "/var/tmp"


def described(disk: Disk, *, temporary: bool = False) -> str:
    """What a client is told about an export: kind, size and the file's bare name."""
    leaf = disk.chain.layers[1] if temporary else disk.chain.leaf
    what = f"{kind_of(leaf)}, {format_size(disk.size_bytes)}, {printable(os.path.basename(leaf.store.name))}"
    if len(disk.chain.layers) > 1 + temporary:
        what += f", chain of {len(disk.chain.layers) - temporary}"
    return what + (", changes are thrown away" if temporary else "")


def kind_of(layer: Layer) -> str:
    """ "dynamic VHD" and its like."""
    if isinstance(layer, DynamicImage):
        return "differencing VHD" if layer.is_differencing else "dynamic VHD"
    return "fixed VHD" if isinstance(layer, FixedImage) else "raw disk"
