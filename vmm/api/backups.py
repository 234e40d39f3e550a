# SPDX-License-Identifier: Apache-2.0
"""A night of a machine: its disks are frozen at one moment and saved in a repository while the machine goes on.

    the repository is locked, leftovers go                               nothing of the machine has changed
    the machine's lock: space, disks frozen, definition, variables       milliseconds; the frozen layers are kept
    disks, other files, manifest                                         the machine may start, stop, take snapshots
    the tree: this night's layers are kept in place of the last one's    the night exists, whatever happens now
    what the last night had kept is merged, by the delete rule           live, or in the background if it is off

Decides this order, what a night's consistency is called, and what an end at any moment leaves. Before the manifest is
written there is no night, and the layers that were frozen for it are ordinary ones without a snapshot, which are
merged; the reference of the last night is not touched. A process that is killed leaves records that end with it
(`store.snapshots.kept`). The copying is done here, in the caller's process, and never in the machine's worker: Ctrl-C
stops it, and a repository that does not answer holds up no guest. Must not know how a night is written (vhdkit), nor
how disks are frozen and merged.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial

import vhdkit
from vhdkit import backups
from vmm.api import machines, scheduled_backups
from vmm.api.known_repositories import known_to_machine, names_of, repository_for_night
from vmm.api.machine import FrozenMachine, MergeResult
from vmm.api.night_memory import OpenMemory, expected_bytes, freeze_with_memory, remove_left, without_left
from vmm.api.running_machine import RunningMachine
from vmm.api.stopped_machine import StoppedMachine
from vmm.model.counting import TELL_SECONDS
from vmm.model.errors import InUse, InvalidSpec, NotFound, VmmError, store_error
from vmm.model.events import add_event, read_events
from vmm.model.spec import DiskSpec, MachineSpec
from vmm.model.waiting import looks
from vmm.processes import worker_connection
from vmm.processes.rpc import Progress
from vmm.snapshots.freeze import NightToCome, refuse_unfreezable
from vmm.snapshots.steps import options_of
from vmm.store import registry
from vmm.store.copies import refuse_copy
from vmm.store.filling import refuse_while_filled
from vmm.store.night_files import MEMORY, MEMORY_STATE, UEFI_VARIABLES, night_files, snapshot_facts
from vmm.store.registry import Machine
from vmm.store.snapshots.deletion_plan import LayerMerge
from vmm.store.snapshots.kept import Kept
from vmm.store.snapshots.store import Held, holding, load_tree
from vmm.store.snapshots.tree import Tree

_EVENTS = ["backup-begun", "backed-up", "backup-failed"]
RECORD_SECONDS = 60.0  # for another command that changes the snapshots to end


@dataclass(frozen=True, slots=True)
class BackupWishes:
    """What the user asks of a night.

    `consistent`: the guest's file systems must be whole; `compare`: compare all content, trust no mark; `full_every`:
    begin a new chain after so many images; `keep_free_bytes`: space in the repository that must stay free;
    `max_rate_bytes`: the most that is written in a second. `accepts_new`: another repository may be at the path than
    the one that is known there, and is made if the folder is empty. `schedule`: the one for which the night is saved.
    `with_memory`: the memory, too, unless it is off.
    """

    consistent: bool = False
    compare: bool = False
    full_every: int | None = None
    keep_free_bytes: int = 0
    max_rate_bytes: int | None = None
    accepts_new: bool = False
    schedule: str | None = None
    with_memory: bool = False


@dataclass(frozen=True, slots=True)
class MachineNight:
    """A night that was written. `how`: disk id -> full, layers, compared or same; `added_bytes`: what its images take.

    `pause_seconds`: how long requests of the guest waited for the freeze, None if it did not run. `merges`: what was
    merged afterwards while it ran.
    """

    machine: str
    repository: str
    night: int
    consistency: str
    how: Mapping[str, str]
    added_bytes: int
    seconds: float
    warnings: tuple[str, ...] = ()
    pause_seconds: float | None = None
    merges: tuple[MergeResult, ...] = ()


@dataclass(frozen=True, slots=True)
class ForgottenNights:
    """What `forget` ended: the repositories for which layers were kept, and the merges made while the machine runs.

    `is_merged`: each disk is as it was without backups; otherwise the rest is merged when the machine is off.
    """

    repositories: tuple[str, ...]
    merges: tuple[MergeResult, ...]
    is_merged: bool


def save_night(
    name: str, repository: str, wishes: BackupWishes = BackupWishes(), *, progress: Progress | None = None
) -> MachineNight:
    """Save a machine as the next night of a repository, which is made if none is known at its path, whatever the
    machine is doing.

    Raises NotFound, Refused for a disk that cannot be frozen, and for a path with another repository than the known
    one, WrongState and AgentUnavailable for a guest that cannot be consistent, InUse while another process changes the
    machine's nights, NoSpace, StoreFailed; then there is no night, and nothing of it is left in the repository.
    """
    refuse_copy(name)
    machine = worker_connection.look(name)
    begin, show = time.monotonic(), progress or (lambda document: None)
    tell = partial(add_event, machine.paths.events, repository=os.path.abspath(repository))
    with _reporting(name, tell), _store_errors(name):
        refuse_unfreezable(machine.spec)
        refuse_while_filled(machine.paths, name, "a backup")
        tell("backup-begun")
        limit = None if wishes.max_rate_bytes is None else backups.RateLimit(wishes.max_rate_bytes)
        options = backups.Wishes(compare=wishes.compare, full_every=wishes.full_every, limit=limit)
        with (
            _target(machine, repository, wishes) as opened,
            backups.writing(opened, machine.spec.id, name, options) as night,
        ):
            saving = _Saving(machine, night, wishes, show, names_of(repository))
            manifest = saving.write()
            path, repository_id = opened.path, opened.id
        added = sum(one.data_bytes for one in manifest.disks if one.how is not backups.How.SAME)
        tell("backed-up", night=manifest.night, consistency=manifest.consistency.value, added_bytes=added)
    warnings = manifest.warnings + _noted_in_schedule(wishes.schedule, repository, repository_id)
    return MachineNight(
        machine=name,
        repository=path,
        night=manifest.night,
        consistency=manifest.consistency.value,
        how={one.disk_id: one.how.value for one in manifest.disks},
        added_bytes=added,
        seconds=round(time.monotonic() - begin, 3),
        warnings=warnings,
        pause_seconds=saving.pause_seconds,
        merges=saving.merge_older(manifest.night),
    )


def _target(machine: Machine, path: str, wishes: BackupWishes) -> backups.Repository:
    """The repository for the night. Raises Refused."""
    known = known_to_machine(machine.paths, path)
    if wishes.schedule is not None:
        known |= scheduled_backups.known_ids(wishes.schedule, path)
    return repository_for_night(machine.name, path, known, accepts_new=wishes.accepts_new, schedule=wishes.schedule)


def _noted_in_schedule(schedule: str | None, path: str, repository_id: str) -> tuple[str, ...]:
    """Record in the schedule that its repository is at the path; returns what prevents that, in words."""
    try:
        if schedule is not None:
            scheduled_backups.note_repository(schedule, path, repository_id)
    except VmmError as error:
        return (f"the night is saved, but the schedule does not know its repository: {error}",)
    return ()


class _Saving:
    """One night of one machine."""

    def __init__(
        self, machine: Machine, night: backups.Writing, wishes: BackupWishes, progress: Progress, names: Sequence[str]
    ) -> None:
        self._machine = machine
        self._names = names  # of the repository
        self._night = night
        self._wishes = wishes
        self._progress = progress
        repository = night.machine.repository
        self._to_come = NightToCome(repository.id, repository.path, night.id, vhdkit.maker_word() or "unknown")
        self.pause_seconds: float | None = None

    def write(self) -> backups.Manifest:
        """Write the night, and keep its layers. When this returns it exists; if it raises, it does not."""
        free = self._night.free_bytes()  # now: what may hang does not while the machine is locked
        opened = contextlib.ExitStack()
        try:
            with machines.open(self._machine.name) as machine:
                self._night.warnings += without_left(machine)
                self._require_space(machine, free)
                done, memory = self._freeze(machine, opened)
                self.pause_seconds = done.pause_seconds
                present_now = registry.load_for_change(machine.opened.lock)
                tree = load_tree(present_now.paths)
                names = [disk.id for disk in present_now.spec.disks if disk.is_image]
                files = night_files(present_now.paths, present_now.spec, names)
            manifest = self._save(present_now.spec, tree, done, files, memory)
        except BaseException as error:  # Ctrl-C too
            with contextlib.suppress(VmmError):  # then the record ends with this process
                self._give_up(is_stopped=not isinstance(error, Exception))
            raise
        finally:
            opened.close()
        try:
            self._record(exists=True)
        except VmmError as error:  # without the record this night's layers may be merged, and the next one is larger
            self._note_left(manifest.night, error)
        return manifest

    def _require_space(self, machine: StoppedMachine | RunningMachine, free_bytes: int) -> None:
        with contextlib.ExitStack() as stack:
            disks = [_opened(stack, disk, lock=False) for disk in machine.spec.disks if disk.is_image]
            self._night.require_space(
                disks, self._wishes.keep_free_bytes, free_bytes=free_bytes,
                files_bytes=expected_bytes(machine) if self._wishes.with_memory else 0,
            )  # fmt: skip

    def _freeze(
        self, machine: StoppedMachine | RunningMachine, stack: contextlib.ExitStack
    ) -> tuple[FrozenMachine, OpenMemory | None]:
        """Freeze the disks, with the memory if it is wanted and there is one."""
        must = self._wishes.consistent
        if not self._wishes.with_memory:
            return machine.freeze_disks(self._to_come, consistent=must), None
        done, memory = freeze_with_memory(machine, self._to_come, stack, consistent=must, progress=self._progress)
        if memory is None:
            self._night.warnings.append("the machine was off, so the night has no memory")
        return done, memory

    def _save(
        self,
        spec: MachineSpec,
        tree: Tree,
        frozen: FrozenMachine,
        files: dict[str, bytes],
        memory: OpenMemory | None,
    ) -> backups.Manifest:
        images = self._kept_in(tree)
        taken = datetime.now(UTC)
        zone, offset = backups.zone_here(taken)
        facts = backups.Circumstances(
            taken, zone, offset, f"vmm {vhdkit.__version__}", backups.Consistency(frozen.consistency),
            snapshots=snapshot_facts(tree),
        )  # fmt: skip
        with contextlib.ExitStack() as stack:
            disks = [_opened(stack, *_frozen(disk, tree, images)) for disk in spec.disks if disk.is_image]
            if memory is None:
                return self._night.save(disks, facts, files, self._stage)
            files = {**files, MEMORY_STATE: memory.description}
            if memory.variables is not None:
                files[UEFI_VARIABLES] = memory.variables
            return self._night.save(disks, facts, files, self._stage, {MEMORY: memory.file})

    def _stage(self, doing: str) -> vhdkit.Progress:
        """Show the progress of a piece of work, in bytes."""
        told = float("-inf")

        def show(done: int, total: int) -> None:
            nonlocal told
            if (now := time.monotonic()) - told >= TELL_SECONDS:
                told = now
                self._progress({"step": doing, "done": done, "total": total})

        self._progress({"step": doing})
        return show

    def merge_older(self, night: int) -> tuple[MergeResult, ...]:
        """Merge what earlier nights had frozen and this one does not need. What cannot be merged now is reported, and
        merged by the next night.
        """
        try:
            return self._merge(lambda tree, merge: any(one.image == merge.layers[0] for one in tree.kept))
        except KeyboardInterrupt as interrupt:
            interrupt.add_note(f"night {night} of {self._machine.name} is saved; its next backup merges older layers")
            raise
        except NotFound:  # the machine was deleted meanwhile
            return ()
        except VmmError as error:
            self._note_left(night, error)
            return (MergeResult(self._machine.paths.folder, problem=str(error)),)

    def _note_left(self, night: int, error: VmmError) -> None:
        add_event(self._machine.paths.events, "backup-not-merged", night=night, problem=str(error))

    def _give_up(self, *, is_stopped: bool) -> None:
        """There is no night: keep nothing for it, and merge the new leaves into what was frozen; if the user waits for
        the end, only later.
        """
        images = set(self._kept_in(load_tree(self._machine.paths)).values())
        if not images:
            return
        self._record(exists=False)
        if not is_stopped:
            self._merge(lambda tree, merge: merge.target in images)
            return
        with machines.open(self._machine.name) as machine:
            machine.merge_in_background()

    def _kept_in(self, tree: Tree) -> dict[str, str]:
        """Disk id -> the image that reads as the disk does in this night, of the disks that were frozen for it."""
        return {one.disk: one.image for one in tree.kept if one.night_id == self._night.id}

    def _record(self, *, exists: bool) -> None:
        """Record in the tree what became of the night. Raises InUse, VmmError."""
        with _held_patiently(self._machine) as held:
            before = held.tree.kept, held.tree.saved_in
            held.tree.end_night(self._night.id, self._to_come.repository, exists=exists)
            if exists:
                held.tree.note_repository(self._names, self._to_come.repository)
            if (held.tree.kept, held.tree.saved_in) != before:
                held.save()

    def _merge(self, wanted: Callable[[Tree, LayerMerge], bool]) -> tuple[MergeResult, ...]:
        """Merge what is due, those wanted of a machine that runs. Raises InUse, VmmError."""
        with machines.open(self._machine.name) as machine:
            if not machine.is_running:
                machine.merge_in_background()
                return ()
            tree = load_tree(machine.opened.paths)
            return machine.merge_live(wanted=partial(wanted, tree), progress=self._progress)


def note_abandoned(names: Sequence[str], repository: str) -> str:
    """Record that the process that saved these machines was killed, because the repository did not answer; returns
    what to say about it.

    It leaves what any kill leaves: the record of the frozen layers ends with it, and the next night removes what is in
    the repository.
    """
    problem = "the repository did not answer, and the backup was given up"
    for name in names:
        with contextlib.suppress(VmmError):
            path = registry.load(name).paths.events
            if [one.name for one in read_events(path) if one.name in _EVENTS][-1:] == _EVENTS[:1]:
                add_event(path, "backup-failed", repository=os.path.abspath(repository), problem=problem)
    return f"{problem}: there is no night of what was not finished; the next backup removes what is left of it"


# -- forgetting ------------------------------------------------------------------------------------------------------


def forget_nights(name: str, repository: str | None = None, *, progress: Progress | None = None) -> ForgottenNights:
    """Keep no layers of a machine for backups any more, or none for one repository, and merge them: each disk is one
    image again, apart from what snapshots need. The nights stay; the next one compares all content.

    `repository`: its folder, or its id. Raises NotFound if no layer is kept for it, InUse, StoreFailed.
    """
    with machines.open(name) as machine:
        remove_left(machine)
        with machine.held_tree() as held:
            gone = [one for one in held.tree.kept if repository is None or _is_of(one, repository)]
            if repository is not None and not gone:
                known = ", ".join(sorted({one.folder for one in held.tree.kept})) or "no repository"
                raise NotFound(f"no layer is kept for this repository; for: {known}", machine=name, path=repository)
            held.tree.keep_only(lambda one: one not in gone)
            held.save()
        images, merges = {one.image for one in gone}, tuple[MergeResult, ...]()
        if gone and machine.is_running:
            merges = machine.merge_live(
                wanted=lambda merge: bool(images & {merge.target, *merge.layers}), progress=progress
            )
        elif gone:
            machine.merge_in_background()
        folders = tuple(sorted({one.folder for one in gone}))
        if gone:
            add_event(machine.opened.paths.events, "backups-forgotten", repositories=list(folders))
        is_running = machine.is_running
    return ForgottenNights(folders, merges, is_running and all(one.problem is None for one in merges))


def _is_of(kept: Kept, repository: str) -> bool:
    return repository == kept.repository or os.path.realpath(repository) == os.path.realpath(kept.folder)


# -- disks -----------------------------------------------------------------------------------------------------------


def _frozen(disk: DiskSpec, tree: Tree, images: Mapping[str, str]) -> tuple[DiskSpec, bool, bool]:
    """The disk with the image that reads as at the moment of the freeze; it is held; whether that image is kept."""
    if disk.id not in images:
        return disk, True, False
    path = images[disk.id]
    return disk.model_copy(update={"path": path, "format": tree.images[path].format}), True, True


def _opened(
    stack: contextlib.ExitStack, disk: DiskSpec, lock: bool = True, keeps_layer: bool = False
) -> backups.FrozenDisk:
    options = replace(options_of(disk), lock=lock, allow_raw_parent=disk.allow_raw_parent or disk.format == "raw")
    if disk.format is not None:
        options = replace(options, format_name=vhdkit.FormatName(disk.format))
    assert disk.path is not None
    opened = stack.enter_context(vhdkit.open_disk(disk.path, options=options))
    return backups.FrozenDisk(disk.id, opened.chain, disk.place, disk.serial, keeps_layer)


# -- small things ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _held_patiently(machine: Machine) -> Iterator[Held]:
    """The machine's tree, once the command that changes it is done. Raises InUse, NotFound."""
    for is_last in looks(RECORD_SECONDS):
        with contextlib.ExitStack() as stack:
            try:
                held = stack.enter_context(holding(machine.paths, machine.name))
            except InUse:
                if is_last:
                    raise
                continue
            yield held
            return


@contextlib.contextmanager
def _store_errors(name: str) -> Iterator[None]:
    """Errors of vhdkit become those of vmm, and name the machine."""
    try:
        yield
    except vhdkit.InvalidArgument as error:
        raise InvalidSpec(error.problem, machine=name, path=error.path, hint=error.hint) from error
    except vhdkit.VhdkitError as error:
        ours = store_error(error)
        ours.machine = name
        raise ours from error


@contextlib.contextmanager
def _reporting(name: str, tell: Callable[..., None]) -> Iterator[None]:
    """Record an event with the reason if this block fails; a KeyboardInterrupt gets a note of what is left."""
    try:
        yield
    except VmmError as error:
        tell("backup-failed", problem=str(error))
        raise
    except KeyboardInterrupt as interrupt:
        tell("backup-failed", problem="it was interrupted")
        interrupt.add_note(
            f"the backup was stopped: there is no night, and nothing of it is left in the repository; {name} goes on"
        )
        raise
    except BaseException as error:
        tell("backup-failed", problem=f"internal error: {error!r}")
        raise
