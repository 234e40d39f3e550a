# SPDX-License-Identifier: Apache-2.0
"""Writes a night: the disks of a machine as they were at one moment, as images in a repository.

Decides the order in which files appear, and what is removed when a night fails. Must not know how a machine, or a
served disk, is frozen: the caller does that between `writing` and `save`, and merges afterwards.

    1  the machine's folder is locked, what unfinished nights left is removed, free space is checked     `writing`
    2                                        the caller freezes all disks at one moment
    3  each frozen layer gets its mark, which names this night's id and means nothing until step 6        `save`
    4  each disk: the table of sums, then the image, each durable before it has its name
    5  other files, durable
    6  the manifest: only now does the night exist
    7                                        the caller merges what it froze

A frozen layer must read the same after step 5 as before; otherwise there is no night. Anything raised before step 6,
Ctrl-C and a full disk included, removes what was written (`INV-NIGHT-WHOLE`); what a killed process leaves is removed
by step 1 of the next night. No file that belongs to a night is ever changed here.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from io import SEEK_END
from typing import Any, BinaryIO, TypeAlias

from vhdkit import errors, formats
from vhdkit.backup import sums
from vhdkit.backup.basis import MAX_DEPTH, Basis, differing_sample, find_basis, newest_basis
from vhdkit.backup.contents import kind_of_full, write_differences, write_full, write_layers
from vhdkit.backup.documents import DamagedRepository
from vhdkit.backup.graph import ImageRecord, Images
from vhdkit.backup.layers import link_to, opened_layers
from vhdkit.backup.leftovers import remove_leftovers, remove_whole
from vhdkit.backup.manifest import Consistency, DiskRecord, FileRecord, Frozen, How, Manifest
from vhdkit.backup.names import ImagePlace, new_unique_id, night_of_file, night_word
from vhdkit.backup.pruning import finish_interrupted
from vhdkit.backup.repository import MAX_FILES, META, MachineFolder, Night, Repository
from vhdkit.backup.summing import SummedFile
from vhdkit.chain.engine.chain import Chain, Progress
from vhdkit.chain.records import references
from vhdkit.chain.verbs.merge_ahead import sharing_stores
from vhdkit.chain.verbs.merge_parts import file_of_layer
from vhdkit.errors import printable
from vhdkit.held_folder import HeldFolder
from vhdkit.image import NULL_ID, Layer
from vhdkit.rate import RateLimit
from vhdkit.store import FileStore, Store
from vhdkit.units import format_size

# Called when a piece of work begins, with its name; returns where its progress goes.
Stages: TypeAlias = Callable[[str], Progress | None]
_log = logging.getLogger(__name__)
_PIECE_BYTES = 1 << 20  # of a file that is streamed


@dataclass(frozen=True, slots=True, eq=False)
class FrozenDisk:
    """A disk to save: an open chain, held, whose files nothing writes to until `save` returns.

    With `keeps_layer` its leaf stays as a layer when writes go on in a child of it, so it gets a mark. `child` is the
    id of that child if the backup made it to freeze the disk, and the mark is what tells the next one so.
    """

    disk_id: str
    chain: Chain
    slot: str = ""
    serial: str = ""
    keeps_layer: bool = False
    child: str | None = None


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the user asks of a night: to compare every disk whole, to begin a new chain after a number of
    images, to write no more than that in a second.
    """

    compare: bool = False
    full_every: int | None = None
    limit: RateLimit | None = None


@dataclass(frozen=True, slots=True)
class Circumstances:
    """What the manifest says about the moment: when it was, how clocks showed it there, what it is worth."""

    taken: datetime
    zone: str
    utc_offset: timedelta
    tool: str
    consistency: Consistency
    snapshots: tuple[dict[str, Any], ...] = ()
    others: dict[str, Any] = field(default_factory=dict)


def no_stages(doing: str) -> None:
    """Shows nothing."""


@contextlib.contextmanager
def writing(repository: Repository, machine_id: str, name: str, wishes: Wishes) -> Iterator[Writing]:
    """A night of a machine: its folder is locked, and free of what unfinished nights left, while the block runs.

    Raises ImageInUse while another process changes the machine's nights, DamagedRepository, AccessDenied, NoSpace.
    """
    with repository.made_machine(machine_id, name) as machine, machine.held("a backup"):
        finish_interrupted(machine, is_held=True)
        nights = machine.nights()
        remove_leftovers(machine, nights)
        yield Writing(machine, tuple(nights), wishes, machine.next_number(nights), new_unique_id(), name)


@dataclass(slots=True, eq=False)
class Writing:
    """A night that can be written; see `writing`. `name` is what the machine is called now, `warnings` are what the
    manifest will say about the night.
    """

    machine: MachineFolder
    nights: tuple[Night, ...]
    wishes: Wishes
    number: int
    id: str
    name: str
    warnings: list[str] = field(default_factory=list)

    def save(
        self,
        disks: Sequence[FrozenDisk],
        facts: Circumstances,
        files: Mapping[str, bytes] | None = None,
        stage: Stages = no_stages,
        streams: Mapping[str, BinaryIO] | None = None,
    ) -> Manifest:
        """Write the night; it exists when this returns. `files` are other files of it, by name; `streams` are such
        files of any size, each open, and read from its beginning.

        Raises NoSpace, IoFailed, SyncFailed, CorruptImage for a disk that cannot be read, Replaced for one that was
        written to meanwhile; then no file of the night is left.
        """
        states = {one.disk_id: self._marked(one) for one in disks}
        try:
            records = [self._saved(one, states[one.disk_id], stage) for one in disks]
            meta = [self._write_file(name, raw) for name, raw in (files or {}).items()]
            meta += [self._write_stream(name, stream, stage) for name, stream in (streams or {}).items()]
            for one in disks:
                if references.state_of(file_of_layer(one.chain.leaf)) != states[one.disk_id]:
                    raise errors.Replaced("was written to while it was saved", path=one.chain.leaf.store.name)
            manifest = self._manifest(facts, records, meta)
            self.machine.write_manifest(manifest)
        except BaseException:  # Ctrl-C too
            self._drop(disks)
            raise
        return manifest

    def free_bytes(self) -> int:
        """The free space of the repository's file system now."""
        return self.machine.folder.free_bytes()

    def require_space(
        self,
        disks: Sequence[FrozenDisk],
        keep_free_bytes: int = 0,
        *,
        free_bytes: int | None = None,
        files_bytes: int = 0,
    ) -> int:
        """Raise NoSpace unless the disks, as they are now, will probably fit, with so much space left; the estimate.

        They need not be frozen. What a comparison will find is not known before: then it is the size of the leaf.
        `free_bytes`: what `free_bytes()` returned; with it nothing is asked of the repository's file system.
        `files_bytes`: about the size of other files.
        """
        estimate = sum(self._estimate(one) for one in disks) + files_bytes
        free = self.free_bytes() if free_bytes is None else free_bytes
        if free < estimate + keep_free_bytes:
            raise errors.NoSpace(
                f"has {format_size(free)} free, and the night needs about {format_size(estimate)}"
                + (f", with {format_size(keep_free_bytes)} to be kept free" if keep_free_bytes else ""),
                path=self.machine.repository.path,
                hint="drop old nights: vhdkit backup prune",
            )
        return estimate

    def _estimate(self, disk: FrozenDisk) -> int:
        """About how many bytes the image of a disk will take."""
        basis = next(self._bases_for(disk))
        layers = disk.chain.layers[: {How.FULL: None, How.LAYERS: basis.index}.get(basis.how, 1)]
        used = sum(file_of_layer(one).allocated_bytes() for one in layers)
        return min(used, disk.chain.size_bytes)

    def _marked(self, disk: FrozenDisk) -> references.FileState:
        """Mark the frozen layer as this night, if it stays; the state in which it is."""
        file = file_of_layer(disk.chain.leaf)
        if disk.keeps_layer:
            night = references.SavedNight(
                self.machine.repository.id, self.machine.id, disk.disk_id, self.number, self.id, disk.child
            )
            state = references.mark(file, night)
            if state is not None:
                return state
        return references.state_of(file)

    def _manifest(self, facts: Circumstances, disks: Sequence[DiskRecord], files: Sequence[FileRecord]) -> Manifest:
        previous = max((one.number for one in self.nights), default=None)
        return Manifest(
            repository=self.machine.repository.id,
            machine_id=self.machine.id,
            machine_name=self.name,
            night=self.number,
            id=self.id,
            previous=previous,
            taken=facts.taken,
            zone=facts.zone,
            utc_offset=facts.utc_offset,
            finished=datetime.now(UTC),
            tool=facts.tool,
            consistency=facts.consistency,
            disks=tuple(disks),
            files=tuple(files),
            snapshots=facts.snapshots,
            warnings=tuple(self.warnings),
            others=facts.others,
        )

    # -- disks ----------------------------------------------------------------------------------------------------

    def _saved(self, disk: FrozenDisk, state: references.FileState, stage: Stages) -> DiskRecord:
        """Write the image of a disk, if it has changed; returns its record."""
        tried: list[Basis] = []
        record = None
        for basis in self._bases_for(disk):
            if record is None and basis not in tried:
                tried.append(basis)
                record = self._on_night(disk, basis, stage)
        if record is None:
            record = self._written(disk, Basis(How.FULL), (), (), stage)
        return replace(record, frozen=Frozen(state.image_id.hex(), state.size_bytes, state.modified_ns))

    def _bases_for(self, disk: FrozenDisk) -> Iterator[Basis]:
        """What the disk may be saved against, the best first."""
        if not self.wishes.compare:
            yield find_basis(disk.chain, self.place_of(disk.disk_id), self.nights, disk.serial)
        yield newest_basis(disk.disk_id, self.nights, disk.serial)

    def place_of(self, disk_id: str) -> tuple[str, str, str]:
        """How marks call a disk of the machine."""
        return self.machine.repository.id, self.machine.id, disk_id

    def _on_night(self, disk: FrozenDisk, basis: Basis, stage: Stages) -> DiskRecord | None:
        """The record of a disk that is saved against an earlier night; None if there is none, or it cannot be used."""
        if basis.night is None:
            return None
        earlier = basis.night.disk(disk.disk_id)
        assert earlier is not None
        if disk.chain.size_bytes < earlier.virtual_size_bytes:
            return None  # other programs refuse a child that is smaller than its parent
        images = Images(one.manifest for one in self.nights if one.manifest is not None)
        with contextlib.ExitStack() as opened:
            try:
                chain = images.chain(earlier.image)
                if len(chain) >= min(MAX_DEPTH, self.wishes.full_every or MAX_DEPTH):
                    return None
                below = opened.enter_context(opened_layers(self.machine, chain))
            except (DamagedRepository, errors.CorruptImage, errors.NotFound) as error:
                self._warn(disk, f"the image of night {basis.night.night} cannot be read, so all was saved: {error}")
                return None
            if basis.index is not None and not self._is_right(disk, basis.night.night, basis.index, below):
                return None
            return self._written(disk, basis, chain, below, stage)

    def _is_right(self, disk: FrozenDisk, night: int, index: int, below: Sequence[Layer]) -> bool:
        """Whether the marked layer reads like the night at some places; the mark is removed if not."""
        marked = disk.chain.layers[index:]
        wrong = differing_sample(Chain(marked), Chain(below))
        if wrong is not None:
            file = file_of_layer(marked[0])
            self._warn(
                disk,
                f"{printable(file.name)} does not read as in night {night}, as the mark beside it says (byte"
                f" {wrong:#x} of the disk differs), so the whole disk was compared: another program has written to it",
            )
            with contextlib.suppress(errors.VhdkitError):
                references.unmark(file, *self.place_of(disk.disk_id))
        return wrong is None

    def _written(
        self, disk: FrozenDisk, basis: Basis, chain: Sequence[ImageRecord], below: Sequence[Layer], stage: Stages
    ) -> DiskRecord:
        """Write the image in the file that the repository will have, and its sums; the record that describes it."""
        made = formats.for_children_of(below[0]) if below else formats.making(kind_of_full(disk.chain))
        suffix = made.child_suffix if below else made.suffixes[0]
        place = ImagePlace(disk.disk_id, f"{night_word(self.number)}{suffix}")
        with self.machine.images(disk.disk_id, make=True) as folder:
            try:
                with folder.new_file(place.name) as store:
                    with folder.new_file(place.sums_name) as table:
                        root = self._filled(store, table, disk, basis, chain, below, stage)
                    return DiskRecord(
                        disk_id=disk.disk_id,
                        image=place,
                        image_id=(formats.linkage_id(store) or NULL_ID).hex(),
                        parent_image=chain[0].place if chain else None,
                        virtual_size_bytes=disk.chain.size_bytes,
                        file_size_bytes=store.size(),
                        data_bytes=store.allocated_bytes(),
                        sums_root=root,
                        how=basis.how,
                        slot=disk.slot,
                        serial=disk.serial,
                        reference_night=None if basis.night is None else basis.night.night,
                        raw_size_bytes=_raw_size(disk.chain),
                    )
            except _Unchanged:
                assert basis.night is not None
                earlier = basis.night.disk(disk.disk_id)
                assert earlier is not None
                night = basis.night.night
                same = replace(earlier, how=How.SAME, reference_night=night, slot=disk.slot, serial=disk.serial)
                return replace(same, raw_size_bytes=_raw_size(disk.chain))

    def _filled(
        self,
        store: FileStore,
        table: FileStore,
        disk: FrozenDisk,
        basis: Basis,
        chain: Sequence[ImageRecord],
        below: Sequence[Layer],
        stage: Stages,
    ) -> str:
        """Write the content of the image and its table of sums; the root of that. Raises as `_fill`."""
        doing = f"sums of {disk.disk_id}"
        shown, stage = stage, self._limited(stage, store)
        if store.is_remote() or sharing_stores(disk.chain.layers, store):  # bytes may get there without being seen
            self._fill(store, disk, basis, chain, below, stage)
            return sums.make_table(store, table, shown(doing))
        with SummedFile(store, table) as summed:
            self._fill(summed, disk, basis, chain, below, stage)
            return summed.finish(shown(doing))

    def _limited(self, stage: Stages, store: FileStore) -> Stages:
        """Stages whose work writes no more in a second than the user wants."""
        limit = self.wishes.limit
        if limit is None:
            return stage
        return lambda doing: limit.follow(stage(doing), lambda _: store.allocated_bytes())

    def _fill(
        self,
        store: Store,
        disk: FrozenDisk,
        basis: Basis,
        chain: Sequence[ImageRecord],
        below: Sequence[Layer],
        stage: Stages,
    ) -> None:
        """Write the content of the image. Raises `_Unchanged` if the disk reads as its parent."""
        show = stage(f"saving {disk.disk_id}")
        if basis.how is How.FULL:
            write_full(store, disk.chain, show)
            return
        link = link_to(below[0], chain[0].place)
        if basis.index is None:
            has_changed = write_differences(store, link, disk.chain, below, show)
        else:
            sources = disk.chain.layers[: basis.index]
            has_changed = bool(sources) and write_layers(store, link, sources, below, show)
        if not has_changed:
            raise _Unchanged

    def _warn(self, disk: FrozenDisk, text: str) -> None:
        self.warnings.append(f"{disk.disk_id}: {text}")
        _log.warning("%s: %s", printable(disk.disk_id), text)

    # -- files ----------------------------------------------------------------------------------------------------

    def _write_file(self, name: str, raw: bytes) -> FileRecord:
        with self.machine.meta(self.number, make=True) as folder:
            folder.write(name, raw)
        return FileRecord(name, len(raw), hashlib.sha256(raw).hexdigest())

    def _write_stream(self, name: str, stream: BinaryIO, stage: Stages) -> FileRecord:
        """Copy an open file, piece by piece."""
        show, found = stage(f"saving {name}"), hashlib.sha256()
        size = stream.seek(0, SEEK_END)
        stream.seek(0)
        with self.machine.meta(self.number, make=True) as folder, folder.new_file(name) as store:
            for offset in range(0, size, _PIECE_BYTES):
                piece = stream.read(min(_PIECE_BYTES, size - offset))
                if len(piece) < min(_PIECE_BYTES, size - offset):
                    raise errors.IoFailed(f"the {name} became shorter while it was saved", path=store.name)
                found.update(piece)
                store.pwrite(offset, piece)
                if self.wishes.limit is not None:
                    self.wishes.limit.take(len(piece))
                if show is not None:
                    show(offset + len(piece), size)
        return FileRecord(name, size, found.hexdigest())

    def _drop(self, disks: Sequence[FrozenDisk]) -> None:
        """Remove what was written of a night that failed; what cannot be removed is left to the next one.

        The manifest goes first: it may have its name already, and no night may lack its images.
        """
        with contextlib.suppress(errors.VhdkitError):
            if self.machine.night(self.number) is not None:
                self.machine.remove_manifest(self.number)
            for disk in disks:
                with contextlib.suppress(errors.NotFound), self.machine.images(disk.disk_id) as folder:
                    self._remove_images(folder)
            with contextlib.suppress(errors.NotFound), self.machine.folder.folder(META) as meta:
                remove_whole(meta, night_word(self.number))

    def _remove_images(self, folder: HeldFolder) -> None:
        """Remove this night's files in the folder of a disk."""
        removed = [folder.remove(one) for one in folder.names(MAX_FILES) if night_of_file(one) == self.number]
        if any(removed):
            folder.sync()


def _raw_size(chain: Chain) -> int | None:
    """The length of a raw disk's file, whose last sector may end early; None for other disks."""
    leaf = chain.leaf
    return file_of_layer(leaf).size() if formats.named(leaf.format_name).is_plain else None


class _Unchanged(Exception):
    """The disk reads as in the night that it is compared with."""
