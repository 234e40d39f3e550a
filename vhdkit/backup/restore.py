# SPDX-License-Identifier: Apache-2.0
"""Makes new images of a night's disks, and copies of its other files.

Decides what is checked before anything is written, what the new files are called, and that all of them appear or none.
The night is leased meanwhile, so no prune takes what is read. Must not know machines: a definition is a file like
others here.

    a prune that was interrupted is finished, if it can be
    lease, manifest, chains opened   ->   every sum of every file that is read      unless the user leaves it out
                                     ->   each disk a new image, each other file    removed again if one fails
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vhdkit import errors, formats
from vhdkit.arguments import AnyPath, Several, checked
from vhdkit.backup import sums
from vhdkit.backup.carrying import DataBefore
from vhdkit.backup.choosing import Wanted, chosen
from vhdkit.backup.contents import block_size_in, kind_of_full
from vhdkit.backup.documents import DamagedRepository
from vhdkit.backup.graph import ImageRecord, Images
from vhdkit.backup.half_merged import images_now
from vhdkit.backup.layers import opened_layers
from vhdkit.backup.manifest import DiskRecord, FileRecord, Manifest
from vhdkit.backup.names import ImagePlace
from vhdkit.backup.night import Stages, no_stages
from vhdkit.backup.pruning import finish_interrupted
from vhdkit.backup.repository import MachineFolder, open_repository
from vhdkit.chain.engine.chain import Chain, Progress
from vhdkit.chain.verbs.convert import convert_chain
from vhdkit.chain.verbs.create import DiskFormat
from vhdkit.folder import NewFile, is_folder, remove_file
from vhdkit.rate import RateLimit
from vhdkit.units import MIB


@dataclass(frozen=True, slots=True)
class Restored:
    """What was restored, or would be: the new images by the id of their disk, and the other files' new paths.

    `unchecked` are images whose sums could not be compared: an unfinished prune, which could not be finished here, is
    changing them.
    """

    manifest: Manifest
    disks: dict[str, str]
    files: tuple[str, ...]
    unchecked: tuple[str, ...] = ()


@checked
def restore(
    repository: AnyPath,
    word: str,
    destination: AnyPath,
    *,
    disks: Several[str] = (),
    kind: DiskFormat | str | None = None,
    check: bool = True,
    dry_run: bool = False,
    limit: RateLimit | None = None,
    stage: Stages | None = None,
) -> Restored:
    """Make new images of the disks of a night: `word` is NAME, NAME@NIGHT or NAME@TIME.

    `destination` is an existing folder, or the path of the new image if there is one disk. `disks` are the ids of
    those wanted, none for all; `kind` is what the images become, None for that of the disk. With `check` everything
    that is read is compared with its sums first. `limit` is how much is compared, and then written, in a second.

    Raises NotFound, InvalidArgument, AlreadyExists, DamagedRepository, CorruptImage, NoSpace, IoFailed; then nothing
    is left.
    """
    stage, wanted, place = stage or no_stages, Wanted.of_word(word), os.fsdecode(destination)
    with open_repository(repository) as opened, opened.machine(opened.find_machine(wanted.machine)) as machine:
        live = [one.manifest for one in machine.nights() if one.manifest is not None and not one.manifest.dropped]
        number = chosen(live, wanted.at, machine.name).night
        if not dry_run:
            finish_interrupted(machine, wanted=number)
        with machine.reading(number, "a restore") as manifest:
            images = images_now(machine, machine.nights())
            plan = _plan(machine, manifest, images, place, list(disks), kind)
            unchecked = () if dry_run else _run(plan, stage, check=check, limit=limit)
    return Restored(manifest, {one.record.disk_id: one.path for one in plan.disks}, tuple(plan.files), unchecked)


def read_file(machine: MachineFolder, night: Manifest, name: str, limit_bytes: int) -> bytes:
    """Another file of a night, compared with its sum.

    Raises NotFound, InvalidArgument if it has more than `limit_bytes`, DamagedRepository.
    """
    record = next((one for one in night.files if one.name == name), None)
    if record is None:
        raise errors.NotFound(f"night {night.night} of {machine.name} has no file {errors.printable(name)!r}")
    with machine.meta(night.night) as folder:
        raw = folder.read(name, limit_bytes)
        if len(raw) != record.size_bytes or hashlib.sha256(raw).hexdigest() != record.sha256:
            raise DamagedRepository(
                "was changed or damaged since it was written", path=os.path.join(folder.path, name)
            )
    return raw


def check_disk(
    machine: MachineFolder, night: Manifest, disk_id: str, *, limit: RateLimit | None = None
) -> tuple[str, ...]:
    """Compare every file from which a disk of a night is read with its sums, `limit` at most in a second.

    Returns the paths of those that cannot be compared, as an unfinished prune has changed them. The caller has a lease
    on the night. Raises NotFound, DamagedRepository, IoFailed.
    """
    record = night.disk(disk_id)
    if record is None:
        raise errors.NotFound(f"night {night.night} of {machine.name} has no disk {errors.printable(disk_id)!r}")
    images = images_now(machine, machine.nights())
    return tuple(_check(machine, images.chain(record.image), images.changing, no_stages, limit))


def copy_file(
    machine: MachineFolder, night: int, record: FileRecord, path: str, progress: Progress | None = None
) -> None:
    """Copy another file of a night, of any size, to a new file that is private to its owner.

    Raises NoSpace, DamagedRepository for one that was changed; no file is left then.
    """
    with machine.meta(night) as folder, folder.file(record.name) as store, NewFile(path) as new:
        sums.require_same_size(store, record.size_bytes)
        found = hashlib.sha256()
        for offset in range(0, record.size_bytes, MIB):
            piece = store.pread(offset, MIB)
            found.update(piece)
            new.store.pwrite(offset, piece)
            if progress is not None:
                progress(offset + len(piece), record.size_bytes)
        if found.hexdigest() != record.sha256:
            raise DamagedRepository("was changed or damaged since it was written", path=store.name)
        new.store.truncate(record.size_bytes)
        new.commit()


@dataclass(frozen=True, slots=True)
class _NewDisk:
    """A disk to restore: its record, the chain that holds it, the new image's path and kind (None: the disk's own)."""

    record: DiskRecord
    chain: tuple[ImageRecord, ...]
    path: str
    kind: DiskFormat | None


@dataclass(frozen=True, slots=True)
class _RestorePlan:
    """What a restore makes; `files` are the records by the path of the new file. `changing`: see `images_now`."""

    machine: MachineFolder
    night: int
    disks: tuple[_NewDisk, ...]
    files: dict[str, FileRecord]
    changing: frozenset[ImagePlace]


def _plan(
    machine: MachineFolder,
    manifest: Manifest,
    images: Images,
    place: str,
    wanted: Sequence[str],
    kind: DiskFormat | str | None,
) -> _RestorePlan:
    """Which files a restore makes; nothing is written. Raises NotFound, InvalidArgument, AlreadyExists."""
    for disk_id in wanted:
        if manifest.disk(disk_id) is None:
            raise errors.NotFound(
                f"night {manifest.night} of {machine.name} has no disk {errors.printable(disk_id)!r}",
                hint=f"it has {', '.join(one.disk_id for one in manifest.disks)}",
            )
    records = [one for one in manifest.disks if not wanted or one.disk_id in wanted]
    chosen_kind = None if kind is None else DiskFormat(kind)
    in_folder = is_folder(place)
    if not in_folder and (len(records) != 1 or (manifest.files and not wanted)):
        raise errors.InvalidArgument(
            f"is no folder, and the night has {len(records)} disks and {len(manifest.files)} other files",
            path=place,
            hint="name a folder that exists; or one disk with --disk",
        )
    disks = []
    for record in records:
        suffix = _suffix(record, chosen_kind)
        stem = machine.name if len(manifest.disks) == 1 else f"{machine.name}-{record.disk_id}"
        path = os.path.join(place, stem + suffix) if in_folder else place
        disks.append(_NewDisk(record, images.chain(record.image), path, chosen_kind))
    files = {} if wanted else {os.path.join(place, one.name): one for one in manifest.files}
    for path in [*(one.path for one in disks), *files]:
        NewFile.check(path)
    if len({*(one.path for one in disks), *files}) < len(disks) + len(files):
        raise errors.InvalidArgument("two files of the night would have the same name", path=place)
    return _RestorePlan(machine, manifest.night, tuple(disks), files, images.changing)


def _suffix(record: DiskRecord, kind: DiskFormat | None) -> str:
    """The usual suffix of the new image."""
    if kind is DiskFormat.RAW:
        return ".raw"
    if kind is not None:
        return formats.making(kind).suffixes[0]
    return ".vhdx" if record.image.name.endswith("vhdx") else ".vhd"


def _run(plan: _RestorePlan, stage: Stages, *, check: bool, limit: RateLimit | None) -> tuple[str, ...]:
    """Make the files; the paths of images whose sums could not be compared."""
    made: list[str] = []
    unchecked: list[str] = []
    try:
        for disk in plan.disks:
            with opened_layers(plan.machine, disk.chain) as layers:
                if check:
                    unchecked += _check(plan.machine, disk.chain, plan.changing, stage, limit)
                chain = Chain(layers)
                if chain.size_bytes < disk.record.virtual_size_bytes:
                    raise DamagedRepository("is smaller than the manifest says", path=layers[0].store.name)
                kind = disk.kind or kind_of_full(chain)
                block_size = block_size_in(layers, formats.making(kind).name)
                show = stage(f"restoring {disk.record.disk_id}")
                convert_chain(
                    chain,
                    disk.path,
                    kind,
                    block_size_bytes=block_size,
                    raw_size_bytes=disk.record.raw_size_bytes or disk.record.virtual_size_bytes,
                    limit=limit,
                    progress=show,
                )
                made.append(disk.path)
        for path, record in plan.files.items():
            copy_file(plan.machine, plan.night, record, path)
            made.append(path)
    except BaseException:  # Ctrl-C too
        for path in made:
            with contextlib.suppress(errors.VhdkitError):
                remove_file(path)
        raise
    return tuple(dict.fromkeys(unchecked))


def _check(
    machine: MachineFolder,
    chain: Sequence[ImageRecord],
    changing: frozenset[ImagePlace],
    stage: Stages,
    limit: RateLimit | None,
) -> Iterator[str]:
    """Raise DamagedRepository if a file that will be read differs from its sums. Yields the paths of those that differ
    because a prune is changing them, or that are damaged meanwhile: which of the two, nothing can tell.
    """
    for record in chain:
        try:
            _check_image(machine, record, stage, limit)
        except (DamagedRepository, errors.NotFound):
            if record.place not in changing:
                raise
            yield os.path.join(machine.path, record.place.text)


def _check_image(machine: MachineFolder, record: ImageRecord, stage: Stages, limit: RateLimit | None) -> None:
    with machine.folder_of(record.place) as folder, folder.file(record.place.name) as store:
        sums.require_same_size(store, record.file_size_bytes)
        with folder.file(record.place.sums_name) as table:
            sums.check_table(table, record.sums_root, record.file_size_bytes)
            show = stage(f"checking {record.place.name}")
            if limit is not None:
                show = limit.follow(show, DataBefore(store))
            wrong = next(sums.differing(store, table, progress=show), None)
        if wrong is not None:
            raise DamagedRepository(
                "was changed or damaged since it was written: its sums differ",
                path=store.name,
                offset_bytes=wrong.offset_bytes,
                hint="`vhdkit backup verify` names the nights that are whole;"
                " `vhdkit restore --no-check` restores it as it is",
            )
