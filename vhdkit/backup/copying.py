# SPDX-License-Identifier: Apache-2.0
"""Copies a repository into another folder, and repeats there what has changed since the last copy.

Decides in which order a machine's files are copied, what is held meanwhile, and what one damaged night stops. What is
missing is decided in `copy_plan`, what makes the other folder a copy in `copies`, how existing images change in
`copy_switch`, how content is copied in `carrying`.

    for each machine: an interrupted prune of the source, and an interrupted switch of the copy, are finished
        for each step: leases on the nights that are read; the plan is made again: it must be the same
            new images: content, compared with its sums, on the device   ->   their tables   ->   other files
            only nights to add: their manifests, the lowest image's first   ->   now the nights exist
            images or nights to change: what changes, in `copying/`   ->   the switch

A killed run leaves images without a manifest, which the next one completes: an image whose table is there is whole, in
any other only ranges with wrong sums are copied. Marks beside images, leases and records of verifications are not
copied. An image of the copy that is missing, or was found damaged by a verification, gets its content again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from vhdkit import errors
from vhdkit.arguments import AnyPath, checked
from vhdkit.backup import sums
from vhdkit.backup.bases import bases_held, remove_unused_bases
from vhdkit.backup.carrying import bring, changed_between, copy_data, digest_of_file
from vhdkit.backup.copies import copy_of, ending_copy, give_state, knows_state
from vhdkit.backup.copy_plan import CopyStep, plan_step, require_same_line
from vhdkit.backup.copy_switch import (
    COPYING,
    Switch,
    begin_switch,
    data_name,
    finish_switch,
    forget_staged,
    manifest_name,
    replace_table,
    table_name,
)
from vhdkit.backup.documents import DamagedRepository
from vhdkit.backup.graph import ImageRecord, Images
from vhdkit.backup.leases import leased
from vhdkit.backup.leftovers import remove_leftovers
from vhdkit.backup.manifest import FileRecord, Manifest
from vhdkit.backup.names import ImagePlace
from vhdkit.backup.night import Stages, no_stages
from vhdkit.backup.pruning import finish_interrupted
from vhdkit.backup.repository import MachineFolder, Repository, open_repository
from vhdkit.backup.verified import read_verified, write_verified
from vhdkit.held_folder import HeldFolder
from vhdkit.rate import RateLimit
from vhdkit.store import ReadStore


@dataclass(slots=True)
class CopiedMachine:
    """What was done for a machine: nights that were added, changed (a prune was repeated) and dropped, images that got
    their content again, and bytes of data that were copied. `problems` are the nights that could not be copied.
    """

    id: str
    name: str
    added: list[int] = field(default_factory=list)
    changed: list[int] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)
    mended: list[str] = field(default_factory=list)
    copied_bytes: int = 0
    problems: list[errors.VhdkitError] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Copied:
    """The result: the real paths of both repositories, what was done, and machines that only the copy has."""

    source: str
    other: str
    machines: tuple[CopiedMachine, ...]
    only_there: tuple[str, ...]


@checked
def copy_repository(
    source: AnyPath,
    other: AnyPath,
    *,
    machine: str | None = None,
    limit: RateLimit | None = None,
    stage: Stages | None = None,
) -> Copied:
    """Make the folder `other` a copy of a repository, or of one machine in it, by its name or id.

    `other` is missing or empty, or an earlier copy. Raises InvalidArgument for anything else, and for a copy that has
    nights which may exist nowhere else; ImageInUse; NoSpace, IoFailed. What stops a single machine or night is in the
    result.
    """
    with open_repository(source) as ours:
        wanted = ours.machine_ids() if machine is None else [ours.find_machine(machine)]
        with copy_of(ours, other) as (theirs, mark):
            knows = knows_state(ours, mark)
            _require_same_lines(ours, theirs, knows=knows)
            give_state(ours, theirs, mark)
            done = [
                _copied_machine(ours, theirs, one, knows=knows, limit=limit, stage=stage or no_stages)
                for one in wanted
            ]
            with contextlib.suppress(DamagedRepository):  # what is damaged needs some of them, perhaps
                remove_unused_bases(theirs)
            only = set(theirs.machine_ids()) - set(ours.machine_ids()) if machine is None else set()
            return Copied(ours.path, theirs.path, tuple(done), tuple(sorted(only)))


@checked
def promote_copy(repository: AnyPath) -> str:
    """Make a copy a repository of its own, which backups and prunes may change; returns its real path.

    Raises InvalidArgument for a repository that is no copy, ImageInUse while something is copied into it.
    """
    with open_repository(repository) as opened, ending_copy(opened):
        for machine_id in opened.machine_ids():
            with opened.machine(machine_id) as machine, machine.held("the end of a copy", copying=True):
                finish_switch(machine)
                forget_staged(machine)
                remove_leftovers(machine, machine.nights())
        return opened.path


def _require_same_lines(ours: Repository, theirs: Repository, *, knows: bool) -> None:
    """Raise InvalidArgument if any machine of the copy has nights that must not be lost, before anything changes."""
    for machine_id in set(ours.machine_ids()) & set(theirs.machine_ids()):
        with (
            contextlib.suppress(DamagedRepository, errors.NotFound),
            ours.machine(machine_id) as one,
            theirs.machine(machine_id) as other,
        ):
            require_same_line(one.nights(), other.nights(), highest=one.last_night, knows=knows)


def _copied_machine(
    ours: Repository, theirs: Repository, machine_id: str, *, knows: bool, limit: RateLimit | None, stage: Stages
) -> CopiedMachine:
    done = CopiedMachine(machine_id, machine_id)
    try:
        with ours.machine(machine_id) as source, theirs.made_machine(machine_id, source.name, copying=True) as other:
            done.name = source.name
            finish_interrupted(source)
            with other.held("a copy", copying=True):
                finish_switch(other)
                _Machine(source, other, done, knows, limit, stage).run()
    except errors.NoSpace:  # the next machine would have none either
        raise
    except (
        DamagedRepository,
        errors.ImageInUse,
        errors.UnsupportedFormat,
        errors.NotFound,
        errors.IoFailed,
    ) as error:
        done.problems.append(error)
    return done


@dataclass(slots=True)
class _Machine:
    """The copying of one machine; both folders are open, and the copy's is locked."""

    source: MachineFolder
    other: MachineFolder
    done: CopiedMachine
    knows: bool
    limit: RateLimit | None
    stage: Stages
    skip: set[int] = field(default_factory=set)  # nights that cannot be copied

    def run(self) -> None:
        """Everything that the copy lacks."""
        self._note_unread()
        self._sweep()
        while step := self._step():
            with self._leased(step):
                if self._step() != step:
                    continue  # the source has changed meanwhile
                try:
                    self._carry_out(step)
                except DamagedRepository as error:
                    self.done.problems.append(error)
                    if not step.adds_only:
                        return
                    self.skip.update(step.nights)
        self._mend()
        forget_staged(self.other)
        if not self.done.problems:  # of nights that were dropped before a killed run could finish them
            remove_leftovers(self.other, self.other.nights())
        last = max(self.source.last_night, self.other.last_night)
        if (self.other.name, self.other.last_night) != (self.source.name, last):
            self.other.record(name=self.source.name, last_night=last)

    def _step(self) -> CopyStep | None:
        source, other = self.source.nights(), self.other.nights()
        return plan_step(source, other, highest=self.source.last_night, knows=self.knows, skip=self.skip)

    def _note_unread(self) -> None:
        """Nights of the source whose manifests cannot be read are not copied, and stay as they are in the copy."""
        self.done.problems += [one.problem for one in self.source.nights() if one.problem is not None]

    def _sweep(self) -> None:
        """Remove the files under construction that dead runs left."""
        self.other.sweep()
        for disk_id in self.other.disk_ids():
            with self.other.images(disk_id) as folder:
                folder.sweep()

    @contextlib.contextmanager
    def _leased(self, step: CopyStep) -> Iterator[None]:
        """Keep a prune of the source away from what the step reads. Raises ImageInUse while one is under way."""
        manifests = [one.manifest for one in self.source.nights() if one.manifest is not None]
        images = Images(manifests)
        read = {one.place for one in (*step.new, *(new for _, new in step.rewritten))}
        with contextlib.ExitStack() as held:
            for manifest in reversed(manifests):
                if manifest.dropped or not (read or manifest.night in step.nights):
                    continue
                needed = {one.place for one in images.needed([manifest])}
                if manifest.night in step.nights or needed & read:
                    held.enter_context(
                        leased(self.source.repository.root, self.source.id, manifest.night, "a copy of the repository")
                    )
                    read -= needed
                    with contextlib.suppress(errors.NotFound):  # dropped meanwhile: then the step is another one
                        self.source.require_night(manifest.night)
            yield

    def _carry_out(self, step: CopyStep) -> None:
        before = self._live()
        for record in step.new:
            self._bring_image(record)
        for manifest in step.write:
            self._bring_files(manifest)
        if step.adds_only:
            for manifest in step.write:
                self.other.write_manifest(manifest)
        else:
            self._switch(step)
        after = self._live()
        self.done.added += sorted(after - before)
        self.done.dropped += sorted(before - after)
        self.done.changed += sorted(before & after & {*step.nights})

    def _live(self) -> set[int]:
        """The nights of the copy."""
        return {one.number for one in self.other.nights() if one.manifest is not None and not one.manifest.dropped}

    # -- images ---------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _folder(self, place: ImagePlace) -> Iterator[HeldFolder]:
        """The folder of the copy in which an image lies, made if it does not exist."""
        if place.disk_id is not None:
            with self.other.images(place.disk_id, make=True) as folder:
                yield folder
            return
        repository = self.other.repository
        with bases_held(repository, "a copy of a base"), repository.bases(make=True) as folder:
            yield folder

    def _bring_image(self, record: ImageRecord, *, again: bool = False) -> None:
        """Copy an image that the copy has not, or not whole, and then its table."""
        place = record.place
        with self._folder(place) as folder:
            if not again and _is_complete(folder, record):
                return
            with _opened_source(self.source, record) as (source, table):
                is_new = not folder.exists(place.name)
                with folder.own_file(place.name) as image:
                    try:
                        self.done.copied_bytes += bring(
                            source, image, table, limit=self.limit, progress=self.stage(f"copying {place.text}")
                        )
                    except errors.NoSpace:
                        if is_new:  # the space is worth more than the part that was copied
                            folder.remove(place.name)
                        raise
                folder.sync()
                replace_table(self.other, place, table)

    def _mend(self) -> None:
        """Give images of the copy that are missing or known to be damaged their content again."""
        manifests = [one.manifest for one in self.other.nights() if one.manifest is not None]
        theirs = Images(manifests)
        ours = Images(one.manifest for one in self.source.nights() if one.manifest is not None).records
        state = read_verified(self.other.folder)
        damaged = {} if state is None else state.damaged_now(theirs)
        live = [one for one in manifests if not one.dropped]
        for record in theirs.needed(live):
            if ours.get(record.place) != record or (record.place not in damaged and self._has(record)):
                continue
            step, before, had = CopyStep(new=(record,)), self.done.copied_bytes, self._has(record)
            with self._leased(step):
                try:
                    self._bring_image(record, again=True)
                except DamagedRepository as error:
                    self.done.problems.append(error)
                    continue
            if not had or self.done.copied_bytes > before:  # else what it stands on was damaged
                self.done.mended.append(record.place.text)
            if state is not None and state.damaged.pop((record.place.text, record.sums_root), None) is not None:
                write_verified(self.other.folder, state)

    def _has(self, record: ImageRecord) -> bool:
        """Whether the image and its table are there, with the right sizes."""
        try:
            with (
                self.other.folder_of(record.place) as folder,
                folder.file(record.place.name) as image,
                folder.file(record.place.sums_name) as table,
            ):
                size = record.file_size_bytes
                return image.size() == size and table.size() == sums.table_bytes(size)
        except (errors.NotFound, errors.InvalidArgument):
            return False

    # -- other files ----------------------------------------------------------------------------------------------

    def _bring_files(self, manifest: Manifest) -> None:
        """Copy the other files of a night."""
        if not manifest.files:
            return
        with self.source.meta(manifest.night) as ours, self.other.meta(manifest.night, make=True) as theirs:
            for record in manifest.files:
                with ours.file(record.name) as source:
                    if not _is_same_file(theirs, record):
                        if self.limit is not None:
                            self.limit.take(record.size_bytes)
                        with theirs.new_file(record.name, replace=True) as new:
                            copy_data(source, new)
                            if digest_of_file(new) != record.sha256:
                                raise DamagedRepository(
                                    "was changed or damaged since it was written", path=source.name
                                )

    # -- what changes ---------------------------------------------------------------------------------------------

    def _switch(self, step: CopyStep) -> None:
        """Bring what changes, and change it."""
        damaged = self._damaged()
        with self.other.folder.made_folder(COPYING) as staged:
            for number, (old, new) in enumerate(step.rewritten):
                self._stage_image(staged, number, old, new, is_damaged=old.place in damaged)
            for manifest in step.write:
                staged.write(manifest_name(manifest.night), manifest.encoded(), replace=True)
            staged.sync()
        places = tuple(new.place for _, new in step.rewritten)
        for place in places:  # what is open now would stop the switch in its middle
            with self.other.folder_of(place) as folder:
                folder.own_file(place.name).close()
        begin_switch(self.other, Switch(tuple(one.night for one in step.write), step.remove, places, step.gone))
        finish_switch(self.other)
        self.done.mended += [place.text for place in places if place in damaged]

    def _damaged(self) -> dict[ImagePlace, str]:
        """The images of the copy in which a verification has found damage."""
        state = read_verified(self.other.folder)
        manifests = [one.manifest for one in self.other.nights() if one.manifest is not None]
        return {} if state is None else state.damaged_now(Images(manifests))

    def _stage_image(
        self, staged: HeldFolder, number: int, old: ImageRecord, new: ImageRecord, *, is_damaged: bool
    ) -> None:
        """Copy the ranges of an image that change, all of one that is damaged, and its table."""
        place = new.place
        with _opened_source(self.source, new) as (source, table):
            with self.other.folder_of(place) as folder:
                if not is_damaged and _is_complete(folder, old):
                    with folder.file(place.sums_name) as before:
                        changed = changed_between(before, table)
                else:  # without a table all of it is written: see `copy_switch`
                    changed = None
                    folder.remove(place.sums_name)
                    folder.sync()
            with staged.own_file(data_name(number)) as data:
                show = self.stage(f"copying what changed in {place.text}")
                self.done.copied_bytes += bring(source, data, table, changed, limit=self.limit, progress=show)
            with staged.new_file(table_name(number), replace=True) as copy:
                copy_data(table, copy)


@contextlib.contextmanager
def _opened_source(machine: MachineFolder, record: ImageRecord) -> Iterator[tuple[ReadStore, ReadStore]]:
    """An image of the source, held as by a reader, and its table. Raises DamagedRepository, ImageInUse."""
    with contextlib.ExitStack() as opened:
        try:
            folder = opened.enter_context(machine.folder_of(record.place))
            store = opened.enter_context(folder.file(record.place.name))
            table = opened.enter_context(folder.file(record.place.sums_name))
        except errors.NotFound as error:
            raise DamagedRepository(f"is missing: {error.problem}", path=error.path) from error
        store.lock(writer=False)
        sums.require_same_size(store, record.file_size_bytes)
        sums.check_table(table, record.sums_root, record.file_size_bytes)
        yield store, table


def _is_complete(folder: HeldFolder, record: ImageRecord) -> bool:
    """Whether the copy has this image: its table is written when its content is on the device."""
    try:
        with folder.file(record.place.name) as image, folder.file(record.place.sums_name) as table:
            sums.check_table(table, record.sums_root, record.file_size_bytes)
            return image.size() == record.file_size_bytes
    except (errors.NotFound, errors.InvalidArgument, DamagedRepository):
        return False


def _is_same_file(folder: HeldFolder, record: FileRecord) -> bool:
    try:
        with folder.file(record.name) as store:
            return store.size() == record.size_bytes and digest_of_file(store) == record.sha256
    except (errors.NotFound, errors.InvalidArgument):
        return False
