# SPDX-License-Identifier: Apache-2.0
"""From the user's arguments to exports: how each image is opened, under which name, and with which description.

Decides names and descriptions of exports, and what is refused before anything is opened. Must not know sockets.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

from vhdkit import errors, formats
from vhdkit.chain.names.options import OpenOptions
from vhdkit.chain.names.parents import refuse_child_name
from vhdkit.chain.verbs.create import create_child
from vhdkit.chain.verbs.live import scratch_child
from vhdkit.chain.verbs.newest import newest_leaf
from vhdkit.disk import Disk, open_disk
from vhdkit.errors import printable
from vhdkit.folder import exists, read_whole, real_path, remove_file
from vhdkit.formats.probe import FormatName
from vhdkit.named import opened_again
from vhdkit.serve.nbd.export import Export, check_text
from vhdkit.uncached import CacheMode
from vhdkit.units import MIB, format_size

MAX_EXPORTS_FILE_BYTES = 16 * MIB  # enough for a thousand exports and ten thousand images with long paths
_ENTRY_KINDS: dict[str, tuple[type, str]] = {
    "name": (str, "a string"),
    "path": (str, "a string"),
    "description": (str, "a string"),
    "read_only": (bool, "true or false"),
    "follow_leaf": (bool, "true or false"),
    "format": (str, "a string"),
    "parent_dirs": (list, "a list of folders"),
    "known_images": (list, "a list of images"),
    "allow_raw_parent": (bool, "true or false"),
    "sector_bytes": (int, "512 or 4096"),
    "cache": (str, "a string"),
}


@dataclass(frozen=True, slots=True)
class OpenMode:
    """How images are opened. `follow_leaf`: serve the newest descendant of the named image in its place.

    `overlay`: writes go to a nameless temporary child that disappears when the server ends, or to a new child
    `keep_overlay`, which is a complete image at every moment.
    """

    options: OpenOptions
    read_only: bool = False
    overlay: bool = False
    keep_overlay: str | None = None
    follow_leaf: bool = False


@dataclass(frozen=True, slots=True)
class ExportRequest:
    """An image to serve: its path, its export name if it differs from the file's, and its own mode if it has one.

    `description`: the text that clients receive for it, instead of the result of `described`. `sector_bytes`: the
    logical sector size that the clients expect, so that an image with another one is refused; None accepts any.
    """

    path: str
    name: str | None = None
    open_mode: OpenMode | None = None
    description: str | None = None
    sector_bytes: int | None = None

    @property
    def export_name(self) -> str:
        """The export name that clients use."""
        return os.path.basename(self.path) if self.name is None else self.name


class ImageExport(Export):
    """An export that knows how its image was opened, for operations on it while it is served."""

    def __init__(
        self, name: str, disk: Disk, open_mode: OpenMode, description: str | None = None, *, asked_path: str = ""
    ) -> None:
        """`asked_path` is the image that the caller named; with `OpenMode.follow_leaf` the next start begins there."""
        super().__init__(name, disk, description=description or "", read_only=open_mode.read_only)
        self.open_mode = open_mode
        self.asked_path = asked_path
        self._chosen_description = description
        self._describe()

    def _describe(self) -> None:
        if self._chosen_description is None:
            self.description = described(self.disk, temporary=self.is_temporary)

    @property
    def is_temporary(self) -> bool:
        """True while the top layer is a nameless temporary one."""
        return self.open_mode.overlay and self.open_mode.keep_overlay is None

    @property
    def image_path(self) -> str:
        """The image that is served, whatever layer lies on it at present."""
        return self.disk.chain.layers[1 if self.is_temporary else 0].store.name

    def set_read_only(self, read_only: bool) -> None:
        """Refuse all writes from now on, or allow them again; the export must be held.

        Connected clients then get EPERM. Clients that connected while it was read-only must reconnect to write.
        """
        self.read_only = read_only
        self.disk.writable = self.disk.chain.writable and not read_only

    def exchange(self, disk: Disk) -> None:
        """Serve another disk from now on; the export must be held."""
        disk.writable = disk.writable and not self.read_only
        self.disk = disk
        self._describe()


def check_wanted(wanted: Sequence[ExportRequest]) -> None:
    """Raise InvalidArgument for invalid names, ImageInUse for an image that is listed twice."""
    names: set[str] = set()
    paths: set[str] = set()
    for one in wanted:
        name = one.export_name
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise errors.InvalidArgument(
                "has a name that is not UTF-8, which the name of an export must be",
                path=one.path,
                hint="give it another name: --export NAME=IMAGE",
            ) from error
        check_text("name", name)
        check_text("description", one.description or "")
        real = real_path(one.path)
        if real in paths:
            raise errors.ImageInUse("is exported twice", path=one.path)
        if name in names:
            raise errors.InvalidArgument(
                f"two exports are named {name!r}", path=one.path, hint="give them different names: --export NAME=IMAGE"
            )
        names.add(name)
        paths.add(real)


def request_of_document(document: object) -> ExportRequest:
    """Parse one entry of an exports file, or the parameters of `ctl add`. Raises InvalidArgument.

    {"name", "path", "description": null, "read_only": false, "follow_leaf": false, "format": null,
     "parent_dirs": [], "allow_raw_parent": false, "known_images": [], "sector_bytes": null, "cache": null}

    `format`: a `FormatName`, or null to detect it. `known_images`: images, in any folder, that may be children of this
    one; if one of them is, this one is not written to. `sector_bytes`: see `ExportRequest`.
    `cache`: a `CacheMode`, or null for writeback.
    """
    if not isinstance(document, dict):
        raise errors.InvalidArgument("an export must be a JSON object")
    unknown = [name for name in document if name not in _ENTRY_KINDS]
    if unknown:
        raise errors.InvalidArgument(f"{', '.join(map(repr, unknown))} is not a setting of an export")
    for name, (kind, what) in _ENTRY_KINDS.items():
        value = document.get(name)
        if not isinstance(value, kind) and (value is not None or name in ("name", "path")):
            raise errors.InvalidArgument(f"{name!r} of an export must be {what}")
    folders = document.get("parent_dirs") or []
    if not all(isinstance(folder, str) and folder and "\0" not in folder for folder in folders):
        raise errors.InvalidArgument("'parent_dirs' of an export must be paths of folders")
    known = document.get("known_images") or []
    if not all(isinstance(image, str) and image and "\0" not in image for image in known):
        raise errors.InvalidArgument("'known_images' of an export must be paths of files")
    path = document["path"]
    if not path or "\0" in path:
        raise errors.InvalidArgument("the path of an export must not be empty or contain a zero byte")
    format_name = document.get("format")
    if format_name not in (None, *FormatName):
        raise errors.InvalidArgument(f"the format of an export must be one of {', '.join(FormatName)}")
    cache = document.get("cache")
    if cache not in (None, *CacheMode):
        raise errors.InvalidArgument(f"the cache of an export must be one of {', '.join(CacheMode)}")
    options = OpenOptions(
        parent_dirs=tuple(folders),
        allow_raw_parent=bool(document.get("allow_raw_parent")),
        format_name=FormatName(format_name) if format_name else None,
        known_images=tuple(known),
        cache=CacheMode(cache or CacheMode.WRITEBACK),
    )
    open_mode = OpenMode(
        options, read_only=bool(document.get("read_only")), follow_leaf=bool(document.get("follow_leaf"))
    )
    sector_bytes = document.get("sector_bytes")
    if sector_bytes not in (None, *(size for one in formats.FORMATS for size in one.sector_sizes)):
        raise errors.InvalidArgument("'sector_bytes' of an export must be 512 or 4096")
    return ExportRequest(path, document["name"], open_mode, document.get("description"), sector_bytes)


def requests_of_file(path: str) -> list[ExportRequest]:
    """The exports listed in a file. Raises NotFound, InvalidArgument, AccessDenied.

    A JSON array, or {"exports": the array, "known_images": []} for known images that all entries share.
    """
    raw = read_whole(path, MAX_EXPORTS_FILE_BYTES)
    if raw is None and not exists(path):
        raise errors.NotFound("no such list of exports", path=path)
    if raw is None:
        raise errors.InvalidArgument(
            f"is not a list of exports: not a regular file of at most {MAX_EXPORTS_FILE_BYTES} bytes", path=path
        )
    try:
        document = json.loads(raw)
        shared = document if isinstance(document, dict) else {"exports": document}
        if unknown := sorted(set(shared) - {"exports", "known_images"}):
            raise errors.InvalidArgument(f"a list of exports has no {', '.join(map(repr, unknown))}")
        entries, known = shared.get("exports"), shared.get("known_images")
        if not isinstance(entries, list):
            raise errors.InvalidArgument("is not a list of exports")
        common = {} if known is None else {"known_images": known}
        return [request_of_document({**common, **entry} if isinstance(entry, dict) else entry) for entry in entries]
    except (ValueError, RecursionError) as error:
        raise errors.InvalidArgument("is not a list of exports: it is not JSON", path=path) from error
    except errors.InvalidArgument as error:
        error.path = path
        raise


def open_exports(wanted: Sequence[ExportRequest], open_mode: OpenMode) -> list[ImageExport]:
    """Open all images, or none. Raises what opening an image raises."""
    check_wanted(wanted)
    exports: list[ImageExport] = []
    try:
        for one in wanted:
            own = one.open_mode or open_mode
            disk, asked = _open(one.path, own), os.path.abspath(one.path)
            exports.append(ImageExport(one.export_name, disk, own, one.description, asked_path=asked))
            _check_sectors(exports[-1], one.sector_bytes)
    except BaseException:
        for export in exports:
            export.disk.close()
        raise
    return exports


def _check_sectors(export: ImageExport, wanted_bytes: int | None) -> None:
    found_bytes = export.disk.chain.leaf.sector_bytes
    if wanted_bytes not in (None, found_bytes):
        raise errors.InvalidArgument(
            f"has sectors of {found_bytes} bytes, and not of {wanted_bytes} as recorded for it: a guest would not find"
            " its partitions",
            path=export.image_path,
            hint="restore the image that was there; if this is the right one, correct 'sector_bytes' of the export",
        )


def _open(path: str, open_mode: OpenMode) -> Disk:
    if open_mode.follow_leaf:
        return opened_again(lambda: _followed(path, open_mode))
    return _open_this(path, open_mode)


def _followed(path: str, open_mode: OpenMode) -> Disk:
    """The newest descendant of the named image. Raises `Replaced` if it no longer is one when it is open."""
    newest = newest_leaf(path, open_mode.options)
    disk = _open_this(newest, open_mode)
    try:
        with contextlib.suppress(errors.NotFound):  # the image was merged: opening the newest removed it
            if open_mode.keep_overlay is None and real_path(newest_leaf(path, open_mode.options)) != real_path(newest):
                raise errors.Replaced("its children changed while the newest was searched for", path=path)
    except BaseException:
        disk.close()
        raise
    return disk


def _open_this(path: str, open_mode: OpenMode) -> Disk:
    if open_mode.keep_overlay is not None:
        return _open_kept(path, open_mode.keep_overlay, open_mode.options)
    writable = not open_mode.read_only and not open_mode.overlay
    disk = open_disk(path, writable=writable, options=open_mode.options)
    if not open_mode.overlay:
        return disk
    try:
        return Disk(scratch_child(disk.chain, scratch_folder()))
    except BaseException:
        disk.close()
        raise


def _open_kept(path: str, child: str, options: OpenOptions) -> Disk:
    """Create a new child of the image and open it for writing; remove it again if it cannot be opened."""
    refuse_child_name(child, path)
    try:
        create_child(child, path, options=options)
    except errors.AlreadyExists as error:
        error.hint = "choose another name, or serve that file, which holds the kept changes"
        raise
    try:
        # The parent was opened with its own folder allowed; for the child, that folder must be named.
        folders = (*options.parent_dirs, os.path.dirname(real_path(path)))
        trusting = replace(options, parent_dirs=folders, allow_raw_parent=True, format_name=None)
        return open_disk(child, writable=True, options=trusting)
    except BaseException:
        remove_file(child)
        raise


def scratch_folder() -> str | None:
    """The folder for temporary children: $TMPDIR, else the system's for large temporary files; None to use others."""
    return os.environ.get("TMPDIR") or "/var/tmp"


def described(disk: Disk, *, temporary: bool = False) -> str:
    """The description that clients receive for an export: kind, size and the file's bare name."""
    leaf = disk.chain.layers[1] if temporary else disk.chain.leaf
    what = f"{leaf.facts.title}, {format_size(disk.size_bytes)}, {printable(os.path.basename(leaf.store.name))}"
    if len(disk.chain.layers) > 1 + temporary:
        what += f", chain of {len(disk.chain.layers) - temporary}"
    return what + (", changes are discarded" if temporary else "")
