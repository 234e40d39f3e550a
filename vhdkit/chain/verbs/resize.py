# SPDX-License-Identifier: Apache-2.0
"""Changes the virtual size of an image.

Decides what may be resized and what prevents it. A disk becomes smaller only if the caller allows it (`shrink`),
and even then nothing of value is cut off (`INV-SHRINK-KEEPS`): a disk does not become smaller than a partition or a
file system on it, or than its last nonzero byte, as seen through the whole chain; nothing overrides that.
What becomes visible when a disk grows is zeros. How a format changes its size is decided by the format
(`Resizable`), how far a file system extends in `formats.filesystems`.

An image that has children keeps its size: otherwise they would show other bytes past its end. A child does not
become smaller than its parent; XenServer's tools refuse such a chain.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vhdkit import formats
from vhdkit.arguments import AnyPath, NewSize, byte_size, checked
from vhdkit.chain.engine.chain import Chain, Progress
from vhdkit.chain.names.opening import open_layers
from vhdkit.chain.names.options import OpenOptions
from vhdkit.chain.records import pending
from vhdkit.chain.verbs.merge_recovery import open_settled
from vhdkit.chain.verbs.report import Report
from vhdkit.chain.verbs.zeros import data_of_disk, first_data_in_store
from vhdkit.errors import InvalidArgument, ReadOnly, VhdkitError, printable
from vhdkit.formats.filesystems import end_of, identify, shrink_hint
from vhdkit.formats.format import Resizable, ResizePlan, check_size_unit
from vhdkit.formats.partitions import Partition, PartitionTable, read_partitions
from vhdkit.image import Layer
from vhdkit.store import FileStore
from vhdkit.units import SECTOR_SIZE, format_size, round_down, round_up

_MAX_NAMED = 3  # partitions in one message
_NOTE_GPT = (
    "the second copy of the GPT is no longer at the end of the disk: move it with `sgdisk -e` on the disk, or with the"
    " guest's own tool"
)


@dataclass(frozen=True, slots=True)
class ResizeResult:
    """What resizing did, or would do. Sizes in bytes; `notes` are sentences about what remains for the user to do."""

    path: str
    virtual_size_before_bytes: int
    virtual_size_after_bytes: int
    file_size_before_bytes: int
    file_size_after_bytes: int | None  # None: unknown until it is done
    moved_block_count: int
    dropped_block_count: int
    notes: tuple[str, ...]


@checked
def resize(
    path: AnyPath,
    size_bytes: NewSize,
    *,
    shrink: bool = False,
    options: OpenOptions | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> ResizeResult:
    """Change the virtual size of an image; new space reads as zeros. `dry_run` checks everything and changes nothing.

    A smaller size is refused unless `shrink`. After a power cut or Ctrl-C the disk has its old
    size or the new one. Raises InvalidArgument for that, for an impossible size, for data, a partition or a file
    system past the new end, and for a device; HasChildren, ImageInUse, NoSpace, IoFailed, SyncFailed, and what
    opening the chain raises.
    """
    report = Report(progress)
    with _prepare(path, options or OpenOptions(), dry_run=dry_run) as layers:
        plan = _plan(layers, byte_size("size_bytes", size_bytes), report, shrink=shrink)
        if not dry_run:
            _run(plan, report)
        report.finish()
        return _result(plan, dry_run=dry_run)


@contextlib.contextmanager
def _prepare(path: AnyPath, options: OpenOptions, *, dry_run: bool) -> Iterator[list[Layer]]:
    """The open chain, leaf first, held; the leaf for writing and with every merge of it finished, unless `dry_run`."""
    if dry_run:
        layers = open_layers(path, options=options)
    else:
        layers = open_settled(path, options, "resizing it would change what that image shows")
    try:
        yield layers
    finally:
        for layer in layers:
            layer.close()


def resize_open(chain: Chain, size_bytes: int, *, shrink: bool = False) -> tuple[Chain, ResizeResult | VhdkitError]:
    """Resize the leaf of an open chain that is not used meanwhile; its files stay open and locked.

    Refuses what `resize` refuses.

    The files belong to the new chain from now on, even if the second value is the error that left the disk as it
    was. Raises ReadOnly, and what flushing the leaf and reopening it raises.
    """
    if not chain.writable:
        raise ReadOnly("was opened for reading only", path=chain.leaf.store.name)
    chain.leaf.seal()
    report = Report(None)
    outcome: ResizeResult | VhdkitError
    try:
        layers = [formats.reopened(chain.leaf, writable=True), *chain.layers[1:]]
        plan = _plan(layers, size_bytes, report, shrink=shrink)
        _run(plan, report)
        outcome = _result(plan)
    except VhdkitError as error:
        outcome = error
    return Chain([formats.reopened(chain.leaf, writable=True), *chain.layers[1:]]), outcome


@dataclass(frozen=True, slots=True, eq=False)
class _PlannedResize:
    """A resize that passed all checks. `table` are the partitions now; `change` is None if the size stays."""

    image: Layer
    resizable: Resizable
    size_before_bytes: int
    size_bytes: int
    file_size_before_bytes: int
    table: PartitionTable | None
    change: ResizePlan | None


def _plan(layers: Sequence[Layer], size_bytes: int, report: Report, *, shrink: bool) -> _PlannedResize:
    """Check everything, and plan the change of the first of the open layers. Reads the disk, and changes nothing.

    Raises InvalidArgument, NoSpace.
    """
    image = layers[0]
    parents = Chain(layers[1:]) if len(layers) > 1 else None
    checks = _Checks(image, _resizable_of(image), Chain(layers), parents, size_bytes, report)
    file_size = image.store.size()
    checks.check_size()
    table = read_partitions(checks.read, image.size_bytes, image.sector_bytes)
    if size_bytes < image.size_bytes:
        if not shrink:
            raise _not_meant(image, size_bytes)
        checks.check_cut(table)
    elif size_bytes > image.size_bytes:
        checks.check_appearing()
    change = checks.resizable.plan(size_bytes) if size_bytes != image.size_bytes else None
    report.expect(change.moved_bytes if change is not None else 0)
    return _PlannedResize(image, checks.resizable, image.size_bytes, size_bytes, file_size, table, change)


def _run(plan: _PlannedResize, report: Report) -> None:
    """Apply the new size, durably. Raises NoSpace, IoFailed, SyncFailed."""
    change, store = plan.change, plan.image.store
    if change is None:
        return
    if change.writes is None:
        plan.resizable.run(change, report.did)
        return
    assert isinstance(store, FileStore)
    writes = list(change.writes)
    # A smaller file loses the backup GPT: the undo log restores it, too, if the change is not completed.
    taken = [(offset, len(data)) for offset, data in writes]
    is_cut = plan.table is not None and plan.size_bytes < plan.size_before_bytes
    for offset, count in plan.table.backup_ranges if plan.table is not None and is_cut else ():
        pieces = _without(max(offset, plan.size_bytes), offset + count, taken)
        writes += [(start, bytes(stop - start)) for start, stop in pieces]
    pending.change(store, writes, change.file_size_bytes)


def _result(plan: _PlannedResize, *, dry_run: bool = False) -> ResizeResult:
    image, change = plan.image, plan.change
    has_gpt = change is not None and plan.table is not None and plan.table.scheme == "gpt"
    return ResizeResult(
        path=image.store.name,
        virtual_size_before_bytes=plan.size_before_bytes,
        virtual_size_after_bytes=plan.size_bytes,
        file_size_before_bytes=plan.file_size_before_bytes,
        file_size_after_bytes=None if dry_run else image.store.size(),
        moved_block_count=change.moved_block_count if change is not None else 0,
        dropped_block_count=change.dropped_block_count if change is not None else 0,
        notes=(_NOTE_GPT,) if has_gpt else (),
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Checks:
    """What prevents a new size for `image`, the leaf of `chain`."""

    image: Layer
    resizable: Resizable
    chain: Chain
    parents: Chain | None
    size_bytes: int
    report: Report

    @property
    def path(self) -> str:
        """The image's path, for errors."""
        return self.image.store.name

    def check_size(self) -> None:
        """Refuse a size that the image cannot have, and one smaller than its parent's."""
        store = pending.file_of(self.image.store)
        if store is not None and store.is_device:
            raise InvalidArgument("is a device: its size cannot be changed", path=self.path)
        self.resizable.check_size(self.size_bytes)
        if self.size_bytes != self.image.size_bytes:
            check_size_unit(formats.of(self.image), self.size_bytes, self.path)
        if self.parents is not None and self.size_bytes < self.parents.size_bytes:
            raise InvalidArgument(
                f"a child of {self.size_bytes} bytes would be smaller than its parent of"
                f" {self.parents.size_bytes} bytes, which other tools refuse",
                path=self.path,
                hint="convert the chain to one image and resize that",
            )

    def check_cut(self, table: PartitionTable | None) -> None:
        """Refuse to cut off a partition, or anything nonzero except the backup of an intact GPT."""
        lost = [one for one in table.partitions if one.end_bytes > self.size_bytes] if table is not None else []
        if lost:
            names = ", ".join(_partition_name(one) for one in lost[:_MAX_NAMED])
            more = f" and {len(lost) - _MAX_NAMED} more" if len(lost) > _MAX_NAMED else ""
            end = max(one.end_bytes for one in lost)
            raise InvalidArgument(
                f"a disk of {self.size_bytes} bytes would cut off {names}{more}",
                path=self.path,
                hint=f"shrink it in the guest first, or choose at least {end} bytes",
            )
        self._check_file_system(table)
        end = self.image.size_bytes
        self.report.expect(end - self.size_bytes)
        for offset, size in data_of_disk(self.chain, self.size_bytes, end - self.size_bytes, self.report.did):
            for start, stop in _without(offset, offset + size, table.backup_ranges if table is not None else ()):
                if self._first_data(start, stop) is not None:
                    raise InvalidArgument(
                        f"a disk of {self.size_bytes} bytes would cut off data at byte"
                        f" {self._first_data(start, stop)} ({format_size(start)})",
                        path=self.path,
                        hint="move or delete it in the guest and let it write zeros there, or choose a larger size",
                    )
        self._check_gap()

    def _check_file_system(self, table: PartitionTable | None) -> None:
        """Refuse to cut a file system, or a container of one, that lies on the disk without a partition table."""
        found = identify(self.read)
        if found is None or (table is not None and table.partitions and not found.in_first_sector):
            return
        name = f"{found.kind} {printable(found.label)!r}" if found.label else found.kind
        end = end_of(self.read, found.kind)
        if end is None:
            raise InvalidArgument(
                f"the disk holds {name}, which may extend to its end",
                path=self.path,
                hint=shrink_hint(found.kind),
            )
        if end > self.size_bytes:
            raise InvalidArgument(
                f"a disk of {self.size_bytes} bytes would cut off the end of {name}, which extends to byte {end}",
                path=self.path,
                hint=f"{shrink_hint(found.kind)}; or choose at least {round_up(end, SECTOR_SIZE)} bytes",
            )

    def _first_data(self, start: int, stop: int) -> int | None:
        raw = self.read(start, stop - start)
        return start + len(raw) - len(raw.lstrip(b"\0")) if raw.strip(b"\0") else None

    def _check_gap(self) -> None:
        """Refuse data between the end of a fixed disk and its footer: it would appear, or be lost."""
        start, end = self.resizable.spare_range()
        if start == end:
            return
        found = first_data_in_store(self.image.store, start, end - start)
        if found is not None:
            raise InvalidArgument(
                f"there are {end - start} bytes between the end of the disk and the footer, and not all are zeros",
                path=self.path,
                offset_bytes=found,
                structure="data",
                hint="convert it to a new image and resize that",
            )

    def check_appearing(self) -> None:
        """Refuse to expose what a larger parent has past the end of the disk."""
        self._check_gap()
        if self.parents is None or self.parents.size_bytes <= self.image.size_bytes:
            return
        start = self.image.size_bytes
        stop = min(self.parents.size_bytes, self.size_bytes)
        found = next(data_of_disk(self.parents, start, stop - start), None)
        if found is not None:
            raise InvalidArgument(
                f"its parent is larger and has data past the end of this disk, at byte {found[0]}: it would appear",
                path=self.path,
                hint="convert the chain to one image and resize that",
            )

    def read(self, offset: int, size: int) -> bytes:
        """Bytes of the disk, fewer at its end."""
        start, stop = round_down(offset, SECTOR_SIZE), min(round_up(offset + size, SECTOR_SIZE), self.chain.size_bytes)
        if stop <= start:
            return b""
        buffer = bytearray(stop - start)
        self.chain.read_into(start // SECTOR_SIZE, memoryview(buffer))
        return bytes(buffer[offset - start : offset - start + size])


def _not_meant(image: Layer, size_bytes: int) -> InvalidArgument:
    """The error for a smaller size that was not explicitly allowed."""
    return InvalidArgument(
        f"{size_bytes} bytes are fewer than the {image.size_bytes} bytes that the disk has now",
        path=image.store.name,
        hint="choose a larger size, or add --shrink (shrink=True in the library) to make it smaller",
    )


def _resizable_of(image: Layer) -> Resizable:
    """The format's way to resize. Raises InvalidArgument if it has none."""
    found = formats.of(image).resizable(image)
    if found is None:
        raise InvalidArgument(
            f"is a {image.facts.title}, whose size cannot be changed",
            path=image.store.name,
            hint="a copy made by `vhdkit convert` can be resized",
        )
    return found


def _partition_name(one: Partition) -> str:
    name = f" {printable(one.name)!r}" if one.name else ""
    return f"partition {one.number}{name} (type {one.kind}, bytes {one.offset_bytes} to {one.end_bytes})"


def _without(start: int, stop: int, ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The parts of [start, stop) outside `ranges`, which are (offset, size)."""
    parts = []
    for offset, size in sorted(ranges):
        if offset > start:
            parts.append((start, min(offset, stop)))
        start = max(start, offset + size)
    parts.append((start, stop))
    return [(low, high) for low, high in parts if low < high]
