# SPDX-License-Identifier: Apache-2.0
"""Verifying a machine's nights: every sum, every chain, every other file; and which nights damage reaches.

Decides what is compared with what, and how an interrupted run goes on. Must not know how a table of sums is computed
(`sums`), nor repair anything.

An image is reached through its folder's descriptor and held as a reader, so no prune changes it meanwhile. Its file
must have the recorded size and sums, it must be the image with the recorded id, and it must stand on the image that is
recorded as its parent, by id and by name. The chain of each night is followed through the records (`graph`).

The record of the run (`verified`) names the images whose sums were right, by the roots of their tables: a run that
goes on does not read them again, and reads what a prune has rewritten since then.
"""

from __future__ import annotations

import hashlib
import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

from vhdkit import errors, formats
from vhdkit.backup import sums
from vhdkit.backup.copy_switch import images_in_switch
from vhdkit.backup.documents import DamagedRepository
from vhdkit.backup.graph import ImageRecord, Images
from vhdkit.backup.half_merged import images_now
from vhdkit.backup.journal import images_in_merge, journal_problem
from vhdkit.backup.manifest import FileRecord, Manifest
from vhdkit.backup.names import ImagePlace
from vhdkit.backup.repository import PRUNE_FILE, MachineFolder, Night
from vhdkit.backup.verified import Verified, mark_of, read_verified, write_verified
from vhdkit.chain.engine.chain import Progress
from vhdkit.chain.names.parents import names_lead_to
from vhdkit.chain.records import pending
from vhdkit.image import NULL_ID
from vhdkit.store import FileStore
from vhdkit.units import MIB, format_size

_RECORD_EVERY_SECONDS = 10.0  # how much work a killed run may repeat
_SAMPLE_BYTES = MIB  # of each place that a sample reads
_MAX_RANGES_SHOWN = 3


@dataclass(frozen=True, slots=True)
class NightResult:
    """What was found about a night: nothing wrong (`problems` is empty), or which of its parts are damaged."""

    number: int
    taken: datetime | None
    problems: tuple[str, ...]

    @property
    def is_whole(self) -> bool:
        """True if nothing is wrong with it."""
        return not self.problems


@dataclass(frozen=True, slots=True)
class Verification:
    """The result. `damaged` are problems of files, by path; `busy` are paths of images that another process changes.

    `read_bytes` counts what this run has compared, holes included; `went_on` says that it continued an earlier one.
    `unfinished_prune` are nights that an interrupted prune has dropped.
    """

    nights: tuple[NightResult, ...]
    damaged: tuple[tuple[str, str], ...]
    busy: tuple[str, ...]
    read_bytes: int
    went_on: bool
    unfinished_prune: tuple[int, ...]

    @property
    def is_good(self) -> bool:
        """True if every night is whole, and everything could be read and is as it was written."""
        return not self.busy and not self.damaged and all(one.is_whole for one in self.nights)


def verify(
    machine: MachineFolder, *, sample_percent: int | None = None, again: bool = False, progress: Progress | None = None
) -> Verification:
    """Verify every night of a machine, or, with `sample_percent`, all but the sums and a random part of those.

    Goes on where an earlier run was interrupted, unless `again`. Changes nothing but the record of the run. Raises
    InvalidArgument, IoFailed, and what listing the nights raises; damage is reported, not raised.
    """
    if sample_percent is not None and not 1 <= sample_percent <= 100:
        raise errors.InvalidArgument("a sample is between 1 and 100 percent")
    nights = machine.nights()
    images = images_now(machine, nights)
    live = [one.manifest for one in nights if one.manifest is not None and not one.manifest.dropped]
    state, went_on = _begun(machine, sample_percent, again)
    run = _Run(machine, state, images.needed(live), sample_percent, progress)
    for manifest in live:
        run.check_files(manifest)
    for record in run.records:
        run.check_image(record)
    run.leave_changing()
    state.finished = None if run.busy else datetime.now(UTC)
    write_verified(machine.folder, state)
    damaged, journal = state.damaged_now(images), journal_problem(machine)
    dropped = tuple(one.number for one in nights if one.manifest is not None and one.manifest.dropped)
    return Verification(
        nights=tuple(results_of(nights, images, damaged, state)),
        damaged=(
            *((os.path.join(machine.path, place.text), problem) for place, problem in damaged.items()),
            *(
                (os.path.join(machine.path, f"night {night}: {name}"), one)
                for (night, name), one in state.files.items()
            ),
            *(() if journal is None else ((os.path.join(machine.path, PRUNE_FILE), journal),)),
        ),
        busy=tuple(run.busy),
        read_bytes=run.read_bytes,
        went_on=went_on,
        unfinished_prune=dropped if machine.folder.exists(PRUNE_FILE) else (),
    )


def results_of(
    nights: list[Night], images: Images, damaged: dict[ImagePlace, str], state: Verified | None
) -> Iterator[NightResult]:
    """Each night that was not dropped, and what is known to be wrong with it. Reads nothing."""
    files = {} if state is None else state.files
    for night in nights:
        manifest = night.manifest
        if manifest is None:
            problem = "cannot be read" if night.problem is None else night.problem.problem
            yield NightResult(night.number, None, (f"its manifest: {problem}",))
        elif not manifest.dropped:
            problems = [*images.reached(manifest, damaged)]
            problems += [f"file {name}: {one}" for (number, name), one in files.items() if number == night.number]
            yield NightResult(night.number, manifest.taken, tuple(dict.fromkeys(problems)))


def known_results(machine: MachineFolder, nights: list[Night]) -> list[NightResult]:
    """The same from what the last verification has recorded, and whether every image exists with the right size."""
    images = images_now(machine, nights)
    state = read_verified(machine.folder)
    damaged = {} if state is None else state.damaged_now(images)
    live = [one.manifest for one in nights if one.manifest is not None and not one.manifest.dropped]
    changing = images_in_merge(machine) | images_in_switch(machine) | images.changing
    for record in images.needed(live):
        if record.place not in damaged:
            try:
                with machine.folder_of(record.place) as folder, folder.file(record.place.name) as store:
                    if record.place not in changing:
                        sums.require_same_size(store, record.file_size_bytes)
            except errors.VhdkitError as error:
                damaged[record.place] = error.problem
    return list(results_of(nights, images, damaged, state))


def _begun(machine: MachineFolder, sample_percent: int | None, again: bool) -> tuple[Verified, bool]:
    """The record to go on with, and whether an earlier run had begun it."""
    before = read_verified(machine.folder)
    fresh = Verified(datetime.now(UTC), sample_percent=sample_percent)
    if before is None:
        return fresh, False
    fresh.damaged, fresh.files = before.damaged, before.files  # until found in order
    if again or before.finished is not None or before.sample_percent != sample_percent:
        return fresh, False
    return before, bool(before.marks)


class _Run:
    """One verification under way."""

    def __init__(
        self,
        machine: MachineFolder,
        state: Verified,
        records: list[ImageRecord],
        sample_percent: int | None,
        progress: Progress | None,
    ) -> None:
        self.machine, self.state, self.records, self._progress = machine, state, records, progress
        self._by_place = {one.place: one for one in records}
        self._sample_percent = sample_percent
        self._total = sum(one.file_size_bytes for one in records)
        self._before = 0
        self.read_bytes = 0
        self.busy: list[str] = []
        self._recorded = time.monotonic()

    def check_image(self, record: ImageRecord) -> None:
        """Everything about one image."""
        mark, key = mark_of(record.place, record.sums_root), (record.place.text, record.sums_root)
        if mark not in self.state.marks:
            try:
                problem = self._problem_of(record)
            except errors.ImageInUse as error:
                self.busy.append(error.path or record.place.text)
            else:
                self.state.damaged.pop(key, None)
                if problem is None:
                    self.state.marks.add(mark)
                else:
                    self.state.damaged[key] = problem
            if time.monotonic() - self._recorded > _RECORD_EVERY_SECONDS:
                write_verified(self.machine.folder, self.state)
                self._recorded = time.monotonic()
        self._before += record.file_size_bytes
        self._did(0)

    def leave_changing(self) -> None:
        """Take back what was found wrong with images that a prune is changing, or has changed since the nights were
        read: they count as in use.
        """
        ours = {(one.place.text, one.sums_root): one for one in self.records}
        if not self.state.files and not ours.keys() & self.state.damaged.keys():
            return
        nights, merging = self.machine.nights(), images_in_merge(self.machine) | images_in_switch(self.machine)
        now = images_now(self.machine, nights).records
        for key in ours.keys() & self.state.damaged.keys():
            record = ours[key]
            if now.get(record.place) != record or not merging.isdisjoint({record.place, record.parent}):
                del self.state.damaged[key]
                self.busy.append(os.path.join(self.machine.path, record.place.text))
        there = {one.number for one in nights}
        self.state.files = {key: one for key, one in self.state.files.items() if key[0] in there}

    def check_files(self, manifest: Manifest) -> None:
        """The other files of a night."""
        for one in manifest.files:
            self.state.files.pop((manifest.night, one.name), None)
            try:
                with self.machine.meta(manifest.night) as folder, folder.file(one.name) as store:
                    _require_file(store, one)
                    self.read_bytes += one.size_bytes
            except (errors.NotFound, errors.InvalidArgument, DamagedRepository) as error:
                self.state.files[manifest.night, one.name] = error.problem

    def _problem_of(self, record: ImageRecord) -> str | None:
        """What is wrong with an image. Raises ImageInUse, IoFailed."""
        try:
            with self.machine.folder_of(record.place) as folder, folder.file(record.place.name) as store:
                store.lock(writer=False)
                sums.require_same_size(store, record.file_size_bytes)
                with folder.file(record.place.sums_name) as table:
                    sums.check_table(table, record.sums_root, record.file_size_bytes)
                    sample = self._sample(store.size()) if self._is_good_so_far(record) else None
                    wrong = _ranges(sums.differing(store, table, sample, self._did))
                self.read_bytes += record.file_size_bytes
                if wrong:
                    return f"has other bytes than when it was written, at {wrong}"
                self._require_chain(store, record)
        except errors.ImageInUse:
            raise
        except errors.NotFound as error:
            return f"is missing: {error.problem}"
        except errors.IoFailed as error:
            return f"cannot be read: {error.problem}"
        except (errors.InvalidArgument, errors.CorruptImage, errors.UnsupportedFormat, DamagedRepository) as error:
            return _sentence(error)
        return None

    def _is_good_so_far(self, record: ImageRecord) -> bool:
        """False if it was found damaged: a sample that misses the damage must not take that back."""
        return (record.place.text, record.sums_root) not in self.state.damaged

    def _sample(self, size: int) -> list[tuple[int, int]] | None:
        if self._sample_percent is None:
            return None
        places = -(-size // _SAMPLE_BYTES)
        count = max(places * self._sample_percent // 100, 1)
        chosen = random.SystemRandom().sample(range(places), min(count, places))
        return [(one * _SAMPLE_BYTES, min(_SAMPLE_BYTES, size - one * _SAMPLE_BYTES)) for one in sorted(chosen)]

    def _require_chain(self, store: FileStore, record: ImageRecord) -> None:
        """The image has the recorded id, and stands on the recorded parent."""
        if not int(record.image_id, 16):
            return  # a raw image has neither, whatever its guest has written into it
        view = pending.view(store)
        facts = formats.probed(view).facts(view)
        if (facts.linkage_id or NULL_ID).hex() != record.image_id:
            raise DamagedRepository("is another image than the one that was recorded", path=store.name)
        parent = None if record.parent is None else self._by_place.get(record.parent)
        if (facts.parent is None) != (record.parent is None):
            raise DamagedRepository("has a parent, or none, unlike what was recorded", path=store.name)
        if facts.parent is None or parent is None or record.parent is None:
            return  # an unknown parent is a problem of the night's chain
        expected = bytes.fromhex(parent.image_id)
        if expected not in (facts.parent.linkage_ids or (NULL_ID,)):
            raise DamagedRepository(f"stands on another image than {record.parent.text}", path=store.name)
        with self.machine.folder_of(record.parent) as folder:
            if not names_lead_to(facts, os.path.join(folder.path, record.parent.name)):
                raise DamagedRepository(f"has no name that leads to its parent {record.parent.text}", path=store.name)

    def _did(self, done_bytes: int, total_bytes: int = 0) -> None:
        if self._progress is not None:
            self._progress(self._before + done_bytes, self._total)


def _require_file(store: FileStore, record: FileRecord) -> None:
    sums.require_same_size(store, record.size_bytes)
    found = hashlib.sha256()
    for at in range(0, record.size_bytes, MIB):
        found.update(store.pread(at, MIB))
    if found.hexdigest() != record.sha256:
        raise DamagedRepository("has other bytes than when it was written", path=store.name)


def _ranges(found: Iterator[sums.Differing]) -> str:
    """The damaged ranges for people; empty if there are none."""
    ranges = list(found)
    words = [f"byte {one.offset_bytes} ({format_size(one.size_bytes)})" for one in ranges[:_MAX_RANGES_SHOWN]]
    more = len(ranges) - len(words)
    return ", ".join(words) + (f" and {more} more ranges" if more > 0 else "")


def _sentence(error: errors.VhdkitError) -> str:
    return error.problem + errors.difference(error.expected, error.found)
