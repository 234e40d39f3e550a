# SPDX-License-Identifier: Apache-2.0
"""What a repository holds and what was done with it, as values that programs and people read.

Decides which facts about machines, nights, a prune and a verification are reported, and when a machine counts as saved
recently enough. Must not know terminals. `dataclasses.asdict` of a report is its JSON document: times are the words of
documents, and names of images are places in the machine's folder.

A night is whole if all of its images are there with the right size, and no verification has found damage in them. The
newest whole night counts only if it was not taken in the future: a wrong clock says nothing about its age.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from vhdkit import errors
from vhdkit.backup.choosing import chosen
from vhdkit.backup.documents import time_word
from vhdkit.backup.graph import Images
from vhdkit.backup.half_merged import images_now
from vhdkit.backup.keep import out_of_order
from vhdkit.backup.leases import leased_nights, leases
from vhdkit.backup.manifest import DiskRecord, How, Manifest
from vhdkit.backup.pruning import Pruned, dated_nights
from vhdkit.backup.repository import PRUNE_FILE, MachineFolder, Night, Repository
from vhdkit.backup.verified import read_verified
from vhdkit.backup.verify import NightResult, Verification, known_results
from vhdkit.units import format_size

CLOCKS_DIFFER = timedelta(minutes=5)  # of two hosts; a night that is more in the future says nothing about its age


@dataclass(frozen=True, slots=True)
class MachineReport:
    """A machine of a repository; `problem` says why nothing more is known about it. `newest` is the local time."""

    id: str
    name: str | None
    nights: int = 0
    newest: str | None = None
    data_bytes: int = 0
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class LeaseReport:
    """Something that reads a night."""

    id: str
    night: int
    purpose: str
    since: str


@dataclass(frozen=True, slots=True)
class NightReport:
    """A night. What only its manifest says is None if that cannot be read; `data_bytes` is what its images added."""

    night: int
    taken: str | None
    problems: tuple[str, ...]
    local_time: str | None = None
    consistency: str | None = None
    data_bytes: int | None = None
    disks: int | None = None
    protected: bool | None = None
    leased: LeaseReport | None = None

    @property
    def notes(self) -> str:
        """What is special about it, in few words: `problems` say what is damaged."""
        words = ["protected"] if self.protected else []
        words += [f"being read by {self.leased.purpose}"] if self.leased else []
        words += ["damaged"] if self.problems else []
        return ", ".join(words)


@dataclass(frozen=True, slots=True)
class DiskReport:
    """A disk of a night: the path of its image, and how many images its chain has; None if it cannot be followed."""

    id: str
    path: str
    chain: int | None
    virtual_size_bytes: int
    added_bytes: int
    how: str
    slot: str
    serial: str


@dataclass(frozen=True, slots=True)
class NightDetails:
    """A night with everything that it has; `manifest` is its document as text."""

    night: NightReport
    zone: str
    finished: str
    id: str
    tool: str
    files: dict[str, int]
    warnings: tuple[str, ...]
    disks: tuple[DiskReport, ...]
    manifest: str


@dataclass(frozen=True, slots=True)
class SavedStatus:
    """Whether a machine has a recent whole night, and what else needs attention.

    `age_seconds` is that of the newest whole night, negative for one that was taken in the future. `verified` is when
    the last verification ended. `problem`: why nothing else is known about the machine.
    """

    id: str
    name: str
    is_good: bool
    newest_whole: int | None
    taken: str | None
    age_seconds: int | None
    damaged_nights: dict[int, tuple[str, ...]]
    verified: str | None
    leases: tuple[LeaseReport, ...]
    unfinished_prune: bool
    problem: str | None = None

    @property
    def is_damaged(self) -> bool:
        """True if a night, or what is recorded about the machine, is damaged."""
        return bool(self.damaged_nights) or self.problem is not None

    @property
    def words(self) -> str:
        """One sentence about the newest whole night."""
        if self.problem is not None:
            return self.problem
        if self.newest_whole is None or self.age_seconds is None:
            return "no whole night"
        text = f"newest whole night {self.newest_whole}"
        if self.age_seconds < -CLOCKS_DIFFER.total_seconds():
            text += f", taken at {self.taken}, which is in the future: a clock was wrong"
        elif self.age_seconds >= 3600:
            text += f", {self.age_seconds / 3600:.0f} h old"
        else:
            text += f", {max(self.age_seconds, 0) // 60} min old"
        return text + ("" if self.verified else ", never verified")

    @property
    def notes(self) -> tuple[str, ...]:
        """Damage, leases, and a prune that was interrupted, in words."""
        return (
            *(f"night {night} is damaged: {'; '.join(problems)}" for night, problems in self.damaged_nights.items()),
            *(f"night {one.night} is read by {one.purpose} (lease {one.id})" for one in self.leases),
            *(
                ("a prune is under way, or was interrupted: the next one finishes it",)
                if self.unfinished_prune
                else ()
            ),
        )


@dataclass(frozen=True, slots=True)
class NightPair:
    """A night, and the one before it."""

    night: int
    previous: int


@dataclass(frozen=True, slots=True)
class ImagesMerged:
    """Images of dropped nights that are merged into one that stays."""

    into: str
    images: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PruneReport:
    """What a prune or a deletion did, or with a dry run would do; `machine` is an id, `kept` says why. `bases` are
    paths of shared bases that were removed. `times`: when a night was taken, in words, where that is known.
    """

    machine: str
    name: str
    dry_run: bool
    dropped: tuple[int, ...]
    kept: dict[int, tuple[str, ...]]
    finished: tuple[int, ...]
    removed: tuple[str, ...]
    merged: tuple[ImagesMerged, ...]
    hidden: tuple[str, ...]
    deferred: tuple[str, ...]
    copied_bytes: int
    freed_bytes: int
    bases: tuple[str, ...] = ()
    times: dict[int, str] = field(default_factory=dict)

    @property
    def rows(self) -> list[list[str]]:
        """Four columns, a row for each night: "keep" or "drop", its number, its time, why it stays."""
        rows = {number: ["keep", ", ".join(why)] for number, why in self.kept.items()}
        rows |= {number: ["drop", ""] for number in self.dropped}
        return [[rows[one][0], str(one), self.times.get(one, ""), rows[one][1]] for one in sorted(rows)]

    @property
    def words(self) -> str:
        """What was done, or would be."""
        if not self.dropped:
            return "nothing to drop"
        doing = ("would drop", "copying", "freeing") if self.dry_run else ("dropped", "copied", "freed")
        words = [f"{doing[0]} {len(self.dropped)} night{'s' if len(self.dropped) != 1 else ''}"]
        words += [f"{doing[1]} at most {format_size(self.copied_bytes)}"] if self.merged else []
        words += [f"{doing[2]} {format_size(self.freed_bytes)}"] if self.freed_bytes else []
        return ", ".join(words)


@dataclass(frozen=True, slots=True)
class DamageReport:
    """A damaged file, and what is wrong with it."""

    path: str
    problem: str


@dataclass(frozen=True, slots=True)
class NightFound:
    """What a verification found about a night; it is whole without problems."""

    night: int
    taken: str | None
    problems: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """The result of a verification of one machine. `in_use` are images that could not be read; `went_on` says that it
    continued one that was interrupted; `unfinished_prune` are nights that an interrupted prune has dropped.
    `problem`: why its nights could not be verified.
    """

    id: str
    name: str
    nights: tuple[NightFound, ...]
    damaged: tuple[DamageReport, ...]
    in_use: tuple[str, ...]
    read_bytes: int
    went_on: bool
    unfinished_prune: tuple[int, ...]
    problem: str | None = None

    @property
    def is_damaged(self) -> bool:
        """True if a night cannot be relied on, none could be verified, or a record is damaged."""
        return bool(self.bad or self.damaged) or self.problem is not None

    @property
    def bad(self) -> tuple[NightFound, ...]:
        """The nights that cannot be relied on."""
        return tuple(one for one in self.nights if one.problems)

    @property
    def whole(self) -> str:
        """The numbers of the nights that are whole: "1-4, 6"."""
        return _ranges([one.night for one in self.nights if not one.problems])


def report_machines(repository: Repository) -> list[MachineReport]:
    """Every machine, also those that cannot be read."""
    found = []
    for machine_id in repository.machine_ids():
        try:
            with repository.machine(machine_id) as machine:
                found.append(_machine_report(machine))
        except errors.VhdkitError as error:
            found.append(MachineReport(machine_id, None, problem=str(error)))
    return found


def _machine_report(machine: MachineFolder) -> MachineReport:
    manifests = [one.manifest for one in machine.nights() if one.manifest is not None]
    live = [one for one in manifests if not one.dropped]
    sizes = {disk.image: disk.data_bytes for one in manifests for disk in one.disks}
    newest = shown_time(live[-1]) if live else None
    return MachineReport(machine.id, machine.name, len(live), newest, sum(sizes.values()))


def shown_time(manifest: Manifest) -> str:
    """When a night was taken, as the clocks showed it there."""
    return f"{manifest.local_time:%Y-%m-%d %H:%M %z}"


def report_nights(machine: MachineFolder) -> list[NightReport]:
    """The nights of a machine, oldest first, without those that were dropped."""
    nights = machine.nights()
    results = {one.number: one for one in known_results(machine, nights)}
    leased = _leases_of(machine)
    shown = [one for one in nights if one.manifest is None or not one.manifest.dropped]
    return [_night_report(one, results[one.number], leased.get(one.number)) for one in shown]


def _leases_of(machine: MachineFolder) -> dict[int, LeaseReport]:
    found = leased_nights(leases(machine.repository.root), machine.id)
    return {night: LeaseReport(one.id, one.night, one.purpose, time_word(one.since)) for night, one in found.items()}


def _night_report(night: Night, result: NightResult, lease: LeaseReport | None) -> NightReport:
    manifest = night.manifest
    if manifest is None:
        return NightReport(night.number, None, result.problems)
    return NightReport(
        night.number,
        time_word(manifest.taken),
        result.problems,
        local_time=shown_time(manifest),
        consistency=manifest.consistency.value,
        data_bytes=sum(_added(disk) for disk in manifest.disks),
        disks=len(manifest.disks),
        protected=manifest.protected,
        leased=lease,
    )


def _added(disk: DiskRecord) -> int:
    return 0 if disk.how is How.SAME else disk.data_bytes


def find_night(machine: MachineFolder, at: str | None) -> Manifest:
    """The night that a number or a time means, by default the newest. Raises NotFound, InvalidArgument."""
    nights = machine.nights()
    live = [one.manifest for one in nights if one.manifest is not None and not one.manifest.dropped]
    return chosen(live, at, machine.name)


def nights_out_of_order(machine: MachineFolder) -> list[NightPair]:
    """The nights with an earlier time than the night before them: a clock was wrong."""
    return [NightPair(late, early) for late, early in out_of_order(dated_nights(machine, machine.nights(), ()))]


def report_night(machine: MachineFolder, at: str | None = None) -> NightDetails:
    """Everything about one night, by default the newest. Raises NotFound, InvalidArgument."""
    nights = machine.nights()
    manifest = find_night(machine, at)
    images = images_now(machine, nights)
    night = Night(manifest.night, manifest)
    result = next(
        (one for one in known_results(machine, nights) if one.number == manifest.night),
        NightResult(manifest.night, manifest.taken, ()),  # it appeared just now
    )
    return NightDetails(
        _night_report(night, result, _leases_of(machine).get(manifest.night)),
        manifest.zone,
        f"{manifest.finished:%Y-%m-%d %H:%M:%S} UTC",
        manifest.id,
        manifest.tool,
        {one.name: one.size_bytes for one in manifest.files},
        manifest.warnings,
        tuple(_disk_report(machine, disk, images) for disk in manifest.disks),
        manifest.encoded().decode(),
    )


def _disk_report(machine: MachineFolder, disk: DiskRecord, images: Images) -> DiskReport:
    try:
        depth = len(images.chain(disk.image))
    except errors.VhdkitError:
        depth = None
    path = f"{machine.path}/{disk.image.text}"
    return DiskReport(
        disk.disk_id, path, depth, disk.virtual_size_bytes, _added(disk), disk.how.value, disk.slot, disk.serial
    )


def report_status(machine: MachineFolder, *, since: datetime, now: datetime | None = None) -> SavedStatus:
    """Whether the newest whole night of a machine was taken at `since` or later, and not in the future."""
    now = datetime.now(UTC) if now is None else now
    results = known_results(machine, machine.nights())
    taken = [(one.number, one.taken) for one in results if one.is_whole and one.taken is not None]
    number, newest = taken[-1] if taken else (None, None)
    state = read_verified(machine.folder)
    return SavedStatus(
        machine.id,
        machine.name,
        is_good=newest is not None and since <= newest <= now + CLOCKS_DIFFER,
        newest_whole=number,
        taken=None if newest is None else time_word(newest),
        age_seconds=None if newest is None else int((now - newest).total_seconds()),
        damaged_nights={one.number: one.problems for one in results if one.problems},
        verified=None if state is None or state.finished is None else time_word(state.finished),
        leases=tuple(
            LeaseReport(one.id, one.night, one.purpose, time_word(one.since))
            for one in leases(machine.repository.root)
            if one.machine_id == machine.id and not one.is_dead
        ),
        unfinished_prune=machine.folder.exists(PRUNE_FILE),
    )


def report_prune(machine: MachineFolder, done: Pruned) -> PruneReport:
    """What a prune or a deletion did."""
    plan = done.plan
    return PruneReport(
        machine.id,
        machine.name,
        done.dry_run,
        tuple(plan.dropped),
        {number: tuple(why) for number, why in plan.kept.items()},
        tuple(done.finished),
        removed=tuple(one.place.text for one in plan.removals),
        merged=tuple(ImagesMerged(one.target.text, tuple(place.text for place in one.gone)) for one in plan.mergings),
        hidden=tuple(one.text for one in plan.hidden),
        deferred=tuple(one.text for one in plan.deferred),
        copied_bytes=plan.copied_bytes,
        freed_bytes=plan.freed_bytes,
        bases=done.bases,
        times={one.night: shown_time(one) for one in done.nights if one.night in {*plan.dropped, *plan.kept}},
    )


def report_verification(machine: MachineFolder, result: Verification) -> VerifyReport:
    """What a verification found."""
    return VerifyReport(
        machine.id,
        machine.name,
        tuple(
            NightFound(one.number, None if one.taken is None else time_word(one.taken), one.problems)
            for one in result.nights
        ),
        tuple(DamageReport(path, problem) for path, problem in result.damaged),
        result.busy,
        result.read_bytes,
        result.went_on,
        result.unfinished_prune,
    )


def _ranges(numbers: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for one in numbers:
        if runs and runs[-1][-1] == one - 1:
            runs[-1].append(one)
        else:
            runs.append([one])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs) or "none"
