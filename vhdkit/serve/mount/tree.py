# SPDX-License-Identifier: Apache-2.0
"""The content of a mount: its folders, files, links and attributes. Pure: knows no FUSE.

Decides names and modes, which part of which disk each file shows, the content of `info.json`, and the errno of refused
requests. Partition names come from the guest: they are escaped so that they can only be file names.

    disk.raw                    the chain's content
    partitions/N.raw            each partition, under the number that Linux assigns
    partitions/by-label/NAME    links: the name in the GPT, and the label of the file system
    partitions/by-uuid/ID       links: PARTUUID in Linux
    partitions/by-type/TYPE-N   links: the name of the type
    layers/K-NAME.raw           the disk as of each layer, read-only, leaf first
    info.json                   all of the above in one document

With `root_view` the mount is one file instead of a folder.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, TypeAlias

from vhdkit.chain.records.pending import file_of
from vhdkit.disk import Disk
from vhdkit.errors import InvalidArgument, VhdkitError
from vhdkit.formats.filesystems import FileSystem, identify
from vhdkit.formats.partitions import Partition, PartitionTable, read_partitions
from vhdkit.image import Layer
from vhdkit.serve.mount.view import Handle, LayerDisks, LayerSource, LiveSource, View
from vhdkit.serve.opening import ImageExport
from vhdkit.units import PAGE_SIZE, round_up

DISK_NAME, PARTITIONS, LAYERS, INFO_NAME = "disk.raw", "partitions", "layers", "info.json"
_MAX_NAME_BYTES = 255  # NAME_MAX of Linux
_LINK_BITS = stat.S_IRWXU | stat.S_IRWXG | stat.S_IRWXO
_READ_BITS, _WRITE_BITS, _FOLDER_BITS = 0o444, 0o200, 0o555


@dataclass(slots=True)
class Folder:
    """A folder: names and their nodes."""

    entries: dict[str, Node] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Link:
    """A symbolic link."""

    target: str


@dataclass(frozen=True, slots=True)
class Text:
    """A small text file."""

    content: bytes

    settled: ClassVar[bool] = True  # see `View`

    @property
    def node(self) -> Text:
        """The open node: this object itself."""
        return self

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """See `Handle.read_into`."""
        piece = self.content[offset : offset + len(buffer)]
        buffer[: len(piece)] = piece
        return len(piece)


Node: TypeAlias = Folder | Link | Text | View


@dataclass(frozen=True, slots=True)
class Attributes:
    """The attributes that stat(2) reports. Times in nanoseconds since 1970."""

    mode: int
    size_bytes: int
    allocated_bytes: int
    link_count: int
    modified_ns: int


@dataclass(frozen=True, slots=True)
class FoundPartition:
    """The part of a partition that lies on the disk, and the file system found in it."""

    partition: Partition
    size_bytes: int
    file_system: FileSystem | None

    @property
    def file_name(self) -> str:
        """The partition's name in its folder."""
        return f"{self.partition.number}.raw"


class MountTree:
    """The mount of one disk. Usable from any thread; only the content of files changes."""

    def __init__(self, root: Node, made_ns: int, disk: Disk) -> None:
        self.root = root
        self.size_bytes = disk.size_bytes
        self.is_writable = disk.writable
        self._made_ns = made_ns

    def find(self, path: str) -> Node:
        """The node at an absolute path. Raises OSError (ENOENT, ENOTDIR)."""
        node = self.root
        for name in path.split("/"):
            if not name:
                continue
            if not isinstance(node, Folder):
                raise NotADirectoryError(errno.ENOTDIR, "no folder", path)
            found = node.entries.get(name)
            if found is None:
                raise FileNotFoundError(errno.ENOENT, "no such name", path)
            node = found
        return node

    def attributes(self, node: Node) -> Attributes:
        """See `Attributes`. Raises IoFailed if the holes of a file of the chain cannot be determined."""
        if isinstance(node, Folder):
            folders = sum(isinstance(one, Folder) for one in node.entries.values())
            return Attributes(stat.S_IFDIR | _FOLDER_BITS, 0, 0, 2 + folders, self._made_ns)
        if isinstance(node, Link):
            size = len(os.fsencode(node.target))
            return Attributes(stat.S_IFLNK | _LINK_BITS, size, 0, 1, self._made_ns)
        if isinstance(node, Text):
            size = len(node.content)
            return Attributes(stat.S_IFREG | _READ_BITS, size, round_up(size, PAGE_SIZE), 1, self._made_ns)
        bits = _READ_BITS | (_WRITE_BITS if node.writable else 0)
        return Attributes(stat.S_IFREG | bits, node.size_bytes, node.allocated_bytes(), 1, node.source.written_ns)

    def open(self, path: str, *, write: bool) -> Handle | Text:
        """Open a file. Raises OSError (ENOENT, EISDIR, EACCES), and what opening a layer raises."""
        node = self.find(path)
        if isinstance(node, View):
            return node.open(write=write)
        if isinstance(node, Text):
            if write:
                raise PermissionError(errno.EACCES, "is read-only", path)
            return node
        raise IsADirectoryError(errno.EISDIR, "is a folder", path)

    def folder(self, path: str) -> Folder:
        """A folder. Raises OSError (ENOENT, ENOTDIR)."""
        node = self.find(path)
        if not isinstance(node, Folder):
            raise NotADirectoryError(errno.ENOTDIR, "no folder", path)
        return node

    def names(self, folder: Folder) -> list[tuple[str, int]]:
        """The entries of a folder: (name, file type as in st_mode)."""
        kinds = {Folder: stat.S_IFDIR, Link: stat.S_IFLNK}
        return [(name, kinds.get(type(one), stat.S_IFREG)) for name, one in folder.entries.items()]

    def target(self, path: str) -> str:
        """The target of a link. Raises OSError (ENOENT, EINVAL)."""
        node = self.find(path)
        if not isinstance(node, Link):
            raise OSError(errno.EINVAL, "no link", path)
        return node.target

    def truncate(self, path: str, size_bytes: int) -> None:
        """Raise OSError unless the file has this size already."""
        node = self.find(path)
        if not isinstance(node, View) or not node.writable:
            raise PermissionError(errno.EACCES, "is read-only", path)
        node.truncate(size_bytes)

    def count(self) -> int:
        """How many files, folders and links there are."""
        return sum(1 for _ in _walk(self.root))


def _walk(node: Node) -> Iterator[Node]:
    yield node
    if isinstance(node, Folder):
        for one in node.entries.values():
            yield from _walk(one)


@dataclass(frozen=True, slots=True)
class DiskContents:
    """What lies on a disk: its partition table and those partitions of it that lie on the disk; or, without a table,
    what fills the whole disk.
    """

    table: PartitionTable | None
    partitions: tuple[FoundPartition, ...]
    whole: FileSystem | None


def contents_of(disk: Disk) -> DiskContents:
    """Find what lies on the disk. Raises IoFailed if the partition table cannot be read."""
    table = read_partitions(partial(_read_within, disk), disk.size_bytes, disk.chain.leaf.sector_bytes)
    partitions = tuple(_partitions_on(disk, table)) if table else ()
    return DiskContents(table, partitions, None if table else _identified(disk, 0, disk.size_bytes))


def _read_within(disk: Disk, offset_bytes: int, size_bytes: int) -> bytes:
    """Bytes of the disk, fewer at its end."""
    size = min(size_bytes, disk.size_bytes - offset_bytes)
    return disk.read(offset_bytes, size) if size > 0 else b""


def _identified(disk: Disk, offset_bytes: int, size_bytes: int) -> FileSystem | None:
    def read(place: int, size: int) -> bytes:
        return _read_within(disk, offset_bytes + place, min(size, max(size_bytes - place, 0)))

    try:
        return identify(read)
    except VhdkitError:  # a damaged part of the disk must not keep the rest from being shown
        return None


def _partitions_on(disk: Disk, table: PartitionTable) -> Iterator[FoundPartition]:
    """Those that lie on the disk at least partly, each number once."""
    seen: set[int] = set()
    for one in table.partitions:
        size = min(one.size_bytes, disk.size_bytes - one.offset_bytes)
        if size > 0 and one.number not in seen:
            seen.add(one.number)
            yield FoundPartition(one, size, None if one.is_extended else _identified(disk, one.offset_bytes, size))


class Model:
    """What an open image offers to show: the live disk, its partitions, its layers."""

    def __init__(self, export: ImageExport, contents: DiskContents, made_ns: int, modified_at_ns: int) -> None:
        """Use `model_of`. `made_ns` is the present time, `modified_at_ns` when the leaf was last modified."""
        self.export = export
        self.disk: Disk = export.disk
        self.writable = self.disk.writable
        self.made_ns = made_ns
        self._live = LiveSource(self.disk, modified_at_ns)
        self.skipped = 1 if export.is_temporary else 0  # the nameless layer is not worth showing
        self.table, self.partitions, self.whole = contents.table, contents.partitions, contents.whole

    def disk_view(self) -> View:
        """The whole disk."""
        return View(self._live, self.disk.size_bytes, writable=self.writable, settled=not self.writable)

    def partition(self, number: int) -> FoundPartition:
        """The partition of this number. Raises InvalidArgument, listing those that exist."""
        for one in self.partitions:
            if one.partition.number == number:
                return one
        there = ", ".join(str(one.partition.number) for one in self.partitions)
        raise InvalidArgument(
            f"has no partition {number}",
            path=self.export.image_path,
            hint=f"it has {there}" if there else "it is not partitioned: leave out --partition",
        )

    def partition_view(self, found: FoundPartition) -> View:
        """One partition."""
        return View(
            self._live, found.size_bytes, offset_bytes=found.partition.offset_bytes,
            writable=self.writable, settled=not self.writable,
        )  # fmt: skip

    def layers(self) -> list[tuple[str, Layer, View]]:
        """(file name, layer, the disk as of it), leaf first."""
        chain = self.disk.chain
        disks = LayerDisks(chain)
        found = []
        for number, layer in enumerate(chain.layers[self.skipped :]):
            index = number + self.skipped
            if index == 0:
                view = View(self._live, layer.size_bytes, settled=not self.writable)
            else:
                source = LayerSource(disks, index, modified_ns(layer, self.made_ns))
                view = View(source, layer.size_bytes, settled=True)
            stem = os.path.splitext(os.path.basename(layer.store.name))[0]
            found.append((safe_name(f"{number}-{stem}", ".raw"), layer, view))
        return found


def model_of(export: ImageExport, made_ns: int) -> Model:
    """The model of an export; `made_ns` is the present time. Raises IoFailed if the partition table cannot be read."""
    return Model(export, contents_of(export.disk), made_ns, modified_ns(export.disk.chain.leaf, made_ns))


def modified_ns(layer: Layer, otherwise_ns: int) -> int:
    """When the layer's file was last modified."""
    file = file_of(layer.store)
    return otherwise_ns if file is None else file.modified_ns()


def build_folder(model: Model, facts: dict[str, Any]) -> MountTree:
    """The mount as a folder; `facts` are added to info.json."""
    partitions = Folder()
    for one in model.partitions:
        partitions.entries[one.file_name] = model.partition_view(one)
    for name, links in _links(model.partitions).items():
        partitions.entries[name] = Folder(dict(links))
    layers = model.layers()
    root = Folder({DISK_NAME: model.disk_view(), PARTITIONS: partitions})
    root.entries[LAYERS] = Folder({name: view for name, _, view in layers})
    text = json.dumps({**describe(model, layers), **facts}, indent=2) + "\n"
    root.entries[INFO_NAME] = Text(text.encode("utf-8", "surrogateescape"))
    return MountTree(root, model.made_ns, model.disk)


def build_file(model: Model, partition: int | None) -> MountTree:
    """The mount as one file: the disk, or a partition of it. Raises InvalidArgument."""
    view = model.disk_view() if partition is None else model.partition_view(model.partition(partition))
    return MountTree(view, model.made_ns, model.disk)


def _links(partitions: Sequence[FoundPartition]) -> dict[str, dict[str, Node]]:
    folders: dict[str, dict[str, Node]] = {"by-label": {}, "by-uuid": {}, "by-type": {}}
    for one in partitions:
        link = Link(f"../{one.file_name}")
        labels = (one.partition.name, one.file_system.label if one.file_system else "")
        for label in dict.fromkeys(label for label in labels if label):
            name = safe_name(label)
            if name in folders["by-label"]:
                name = safe_name(label, f"-{one.partition.number}")
            folders["by-label"][name] = link
        if one.partition.unique_id:
            folders["by-uuid"].setdefault(one.partition.unique_id, link)
        kind = one.partition.kind_name.lower().replace(" ", "-")
        folders["by-type"][safe_name(f"{kind}-{one.partition.number}")] = link
    return {name: links for name, links in folders.items() if links}


def safe_name(text: str, ending: str = "") -> str:
    """`text` as a file name: characters that a name cannot contain, or that lead elsewhere, are escaped as in udev."""
    safe = "".join(c if c.isprintable() and c not in "/\\" else _escaped(c) for c in text)
    if safe in ("", ".", ".."):
        safe = "".join(_escaped(c) for c in safe) or "_"
    raw = os.fsencode(safe)[: _MAX_NAME_BYTES - len(os.fsencode(ending))]
    return raw.decode("utf-8", "ignore") + ending


def _escaped(letter: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in letter.encode("utf-8", "surrogatepass"))


def describe(model: Model, layers: list[tuple[str, Layer, View]]) -> dict[str, Any]:
    """The part of info.json that describes the image."""
    return {
        "image": os.path.abspath(model.export.image_path),
        "description": model.export.description,
        "size_bytes": model.disk.size_bytes,
        "writable": model.writable,
        "changes_are_thrown_away": model.export.is_temporary,
        "file_system": _words_of(model.whole),
        "partition_table": model.table.scheme if model.table else None,
        "partitions": [
            {
                "number": one.partition.number,
                "file": f"{PARTITIONS}/{one.file_name}",
                "offset_bytes": one.partition.offset_bytes,
                "size_bytes": one.size_bytes,
                "cut_off": one.size_bytes < one.partition.size_bytes,
                "type": one.partition.kind,
                "type_name": one.partition.kind_name,
                "name": one.partition.name,
                "uuid": one.partition.unique_id,
                "file_system": _words_of(one.file_system),
            }
            for one in model.partitions
        ],
        "layers": [
            {
                "index": number,
                "file": f"{LAYERS}/{name}",
                "image": os.path.abspath(layer.store.name),
                "kind": layer.facts.title,
                "size_bytes": layer.size_bytes,
                "id": model.disk.layer_ids[number + model.skipped],
            }
            for number, (name, layer, _) in enumerate(layers)
        ],
    }


def _words_of(found: FileSystem | None) -> dict[str, object] | None:
    return None if found is None else {"type": found.kind, "label": found.label}
