# SPDX-License-Identifier: Apache-2.0
"""The order of jobs: turns, slices, holds, locks, shares of the time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, cast

import pytest

from tests.vhdkit.serve.disks import empty, export_of
from vhdkit.serve.nbd.export import Export
from vhdkit.serve.nbd.jobs import Job, Jobs
from vhdkit.serve.nbd.loop import Lane, Loop
from vhdkit.serve.nbd.share import REST
from vhdkit.serve.nbd.stats import Stats


class ByHand:
    """A loop whose workers work when the test says so."""

    def __init__(self) -> None:
        self.submitted: deque[tuple[Lane, Callable[[], Any], Callable[[Any], None]]] = deque()
        self.posted: list[Callable[[], None]] = []
        self.timers: list[tuple[float, Callable[[], None]]] = []

    def submit(self, work: Callable[[], Any], done: Callable[[Any], None], lane: Lane) -> None:
        """A worker has taken it."""
        self.submitted.append((lane, work, done))

    def post(self, callback: Callable[[], None]) -> None:
        """For the loop."""
        self.posted.append(callback)

    def call_later(self, seconds: float, callback: Callable[[], None]) -> None:
        """When the test says so."""
        self.timers.append((seconds, callback))

    def step(self) -> None:
        """The worker that has waited longest runs its slice, and reports."""
        _, work, done = self.submitted.popleft()
        result: object
        try:
            result = work()
        except Exception as error:
            result = error
        done(result)

    def run(self) -> None:
        """Until nothing is left."""
        while self.submitted:
            self.step()


class Owner:
    """A client."""

    def __init__(self, export: Export) -> None:
        self.export = export
        self.queues: dict[Lane, deque[Job]] = {}
        self.gone = False

    def is_gone(self) -> bool:
        """As the test says."""
        return self.gone


class Scene:
    """Jobs by hand, and a record of what ran."""

    def __init__(self) -> None:
        self.loop, self.stats, self.ran, self.drained = ByHand(), Stats(), list[str](), list[Export]()
        self.jobs = Jobs(cast(Loop, self.loop), self.stats, self.drained.append)

    def add(self, owner: Owner, name: str, lane: Lane = Lane.LISTING, *, slices: int = 1, **how: Any) -> None:
        """A job of that many slices, each of which is recorded, and so is its end."""
        left = [slices]

        def work() -> str | None:
            self.ran.append(name)
            left[0] -= 1
            return None if left[0] else name

        self.jobs.add(owner, work, lambda result: self.ran.append(f"{name} -> {result!r}"), lane, **how)


@pytest.fixture
def export() -> Export:
    """An export that is never read."""
    return export_of(empty())


def test_clients_take_turns(export: Export) -> None:
    """A client with many jobs does not delay another one's by more than the job that runs."""
    scene, greedy, other = Scene(), Owner(export), Owner(export)
    for number in range(5):
        scene.add(greedy, f"g{number}")
    scene.add(other, "o")
    scene.loop.run()
    assert [name for name in scene.ran if "->" not in name] == ["g0", "g1", "o", "g2", "g3", "g4"]
    assert not export.jobs


def test_slices_take_turns(export: Export) -> None:
    """Between two slices of a job others have their turn; a client's own jobs are finished one after the other."""
    scene, greedy, other = Scene(), Owner(export), Owner(export)
    scene.add(greedy, "a", slices=3)
    scene.add(greedy, "b", slices=2)
    scene.add(other, "o", slices=2)
    scene.loop.run()
    assert scene.ran == ["a", "a", "o", "a", "a -> 'a'", "o", "o -> 'o'", "b", "b", "b -> 'b'"]


def test_as_many_slices_run_as_the_lane_has_threads(export: Export) -> None:
    """The rest waits in the queues of the clients, where a hold need not wait for it."""
    scene, owner = Scene(), Owner(export)
    for number in range(100):
        scene.add(owner, str(number), Lane.WORK)
        scene.add(owner, str(number), Lane.PARTS)
    assert len(scene.loop.submitted) == export.jobs == Lane.WORK.value + Lane.PARTS.value
    scene.loop.run()
    assert len(scene.ran) == 400


def test_a_hold_waits_for_running_slices_only(export: Export) -> None:
    """While an export is held no slice of it begins, one of another export does; afterwards all are finished."""
    scene, held, other = Scene(), Owner(export), Owner(export_of(empty()))
    for number in range(3):
        scene.add(held, f"h{number}", slices=2)
    export.held = True
    scene.add(other, "o")
    scene.loop.step()
    assert (scene.ran, export.jobs, scene.drained) == (["h0"], 0, [export])
    scene.loop.run()
    assert scene.ran == ["h0", "o", "o -> 'o'"] and len(export.parked) == 1
    export.held, parked, export.parked = False, export.parked, []
    for go_on in parked:
        go_on()
    scene.loop.run()
    assert scene.ran[3:] == ["h0", "h0 -> 'h0'", "h1", "h1", "h1 -> 'h1'", "h2", "h2", "h2 -> 'h2'"]


def test_a_hold_waits_for_what_an_ended_job_begins(export: Export) -> None:
    """A job whose end begins a flush does not leave the export drained in between."""
    scene, owner = Scene(), Owner(export)

    def begin_flush(result: object) -> None:
        export.jobs += 1

    scene.jobs.add(owner, lambda: "done", begin_flush)
    export.held = True
    scene.loop.run()
    assert export.jobs == 1 and not scene.drained


def test_jobs_of_clients_that_have_gone(export: Export) -> None:
    """What was written is written; all else is dropped, also in the middle of a job."""
    scene, owner = Scene(), Owner(export)
    scene.add(owner, "half", slices=5, must_run=False)
    scene.add(owner, "read", must_run=False)
    scene.add(owner, "write", must_run=True)
    owner.gone = True
    scene.loop.run()
    assert scene.ran == ["half", "half -> b''", "read -> b''", "write", "write -> 'write'"]


def test_one_slice_has_the_disks_lock(export: Export) -> None:
    """Slices that take the lock follow one another; writers that wait for one come before the next."""
    scene, owners, other = Scene(), [Owner(export), Owner(export)], Owner(export_of(empty()))
    for owner in owners:
        scene.add(owner, "zero", Lane.BULK, slices=2, takes_lock=True)
    scene.add(other, "elsewhere", Lane.BULK, takes_lock=True)
    assert export.bulk == 1 and len(scene.loop.submitted) == 2
    export.after_bulk.append(lambda: scene.ran.append(f"write, {len(scene.loop.submitted)} running"))
    scene.loop.step()
    assert scene.ran == ["zero", "write, 1 running"] and export.bulk == 1 and len(scene.loop.submitted) == 2
    scene.loop.run()
    assert scene.ran.count("zero") == 4 and scene.ran.count("zero -> 'zero'") == 2 and not export.bulk


class Others:
    """Decides whether others are being served, and what time it is."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.present = 1, True
        monkeypatch.setattr(Stats, "others_since", lambda stats, client, ns: self.present)
        monkeypatch.setattr("vhdkit.serve.nbd.jobs.time", self)

    def perf_counter_ns(self) -> int:
        """As `time`'s."""
        return self.now

    def thread_time_ns(self) -> int:
        """As `time`'s."""
        return self.now


UNCOMMON = [Lane.LISTING, Lane.PARTS, Lane.BULK]


@pytest.mark.parametrize("clients", [1, 7])
def test_uncommon_work_has_a_share_of_the_time(export: Export, monkeypatch: pytest.MonkeyPatch, clients: int) -> None:
    """While others are served, one uncommon slice runs at a time, of whichever lane and client, and all of them
    together take no more than their share; common work does not wait for them."""
    scene = Scene()
    others = Others(monkeypatch)
    for _ in range(clients):
        owner = Owner(export)
        for lane in UNCOMMON:
            scene.add(owner, lane.name, lane, slices=5)
    spent = 0
    while scene.loop.submitted or scene.loop.timers:
        if not scene.loop.submitted:
            seconds, callback = scene.loop.timers.pop()
            others.now += round(seconds * 1e9) + 1
            callback()
        (_, work, done) = scene.loop.submitted.popleft()
        assert not scene.loop.submitted, "one at a time"
        result = work()
        others.now += 10**6
        spent += 10**6
        done((result[0], 10**6))
    assert len([name for name in scene.ran if "->" not in name]) == 15 * clients
    assert spent * (REST + 1) <= others.now + REST * 10**6
    assert scene.ran[:3] == [lane.name for lane in UNCOMMON], "the lanes take turns"


def test_a_client_that_is_alone_has_all_the_time(export: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no others are served, every lane runs as many slices as it has threads, and no slice is charged."""
    scene = Scene()
    others = Others(monkeypatch)
    others.present = False
    owner = Owner(export)
    for lane in UNCOMMON:
        for _ in range(5):
            scene.add(owner, lane.name, lane, slices=2)
    assert len(scene.loop.submitted) == sum(lane.value for lane in UNCOMMON)
    scene.loop.run()
    others.present = True
    scene.add(owner, "next")
    assert len(scene.loop.submitted) == 1 and not scene.loop.timers


def test_work_that_needs_no_waiting_is_done_on_the_loop(export: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    """An attempt that succeeds takes no worker, but its turn and its share; one that does not is left to a worker."""
    scene = Scene()
    others = Others(monkeypatch)
    owner = Owner(export)

    def add(name: str, answer: str | None) -> None:
        def attempt() -> str | None:
            others.now += 10**6
            scene.ran.append(f"try {name}")
            return answer

        def work() -> str:
            scene.ran.append(f"work {name}")
            return name

        scene.jobs.add(owner, work, scene.ran.append, Lane.PARTS, attempt=attempt)

    add("a", "A")
    assert scene.ran == ["try a", "A"]
    add("b", None)
    add("c", "C")
    assert scene.ran == ["try a", "A"] and len(scene.loop.timers) == 1, "its share is used up"
    seconds, callback = scene.loop.timers.pop()
    assert seconds >= REST * 1e-3
    others.now += round(seconds * 1e9) + 1
    callback()
    assert scene.ran == ["try a", "A", "try b"] and len(scene.loop.submitted) == 1
    others.present = False
    scene.loop.run()
    assert scene.ran[3:] == ["work b", "b", "try c", "C"]


@pytest.mark.parametrize("comes", [True, False])
@pytest.mark.parametrize("is_there", [True, False])
def test_an_attempt_is_repeated_when_word_comes(export: Export, comes: bool, is_there: bool) -> None:
    """What an attempt lacked is waited for once, without a worker, and a hold waits for that; then, or where no word
    can be had, a worker does it."""
    scene, owner, told = Scene(), Owner(export), list[Callable[[], None]]()
    tries = [None, "answer" if is_there else None]

    def ask(callback: Callable[[], None]) -> bool:
        told.append(callback)
        return comes

    def work() -> str:
        scene.ran.append("work")
        return "answer"

    scene.jobs.add(owner, work, scene.ran.append, Lane.PARTS, attempt=lambda: tries.pop(0), ask=ask)
    assert len(told) == 1 and export.jobs == 1 and len(scene.loop.submitted) == (not comes)
    if comes:
        export.held = True
        told[0]()
        assert scene.drained == [export] and export.jobs == 0 and not scene.ran
        export.held, parked, export.parked = False, export.parked, []
        for go_on in parked:
            go_on()
    scene.loop.run()
    assert scene.ran == (["answer"] if comes and is_there else ["work", "answer"])
    assert len(told) == 1 and export.jobs == 0


def test_attempts_leave_descriptors_their_turn(export: Export) -> None:
    """A queue of attempts is not worked off without a look at anything else, nor inside one another."""
    scene, owner, depth, deepest = Scene(), Owner(export), 0, 0
    left = 5000

    def attempt() -> str:
        nonlocal depth, deepest
        depth += 1
        deepest = max(deepest, depth)
        return "done"

    def done(result: object) -> None:
        nonlocal depth, left
        left -= 1
        if left > 0:
            scene.jobs.add(owner, bool, done, Lane.PARTS, attempt=attempt)
        depth -= 1

    scene.jobs.add(owner, bool, done, Lane.PARTS, attempt=attempt)
    assert left > 0 and deepest == 1 and len(scene.loop.posted) == 1
    while scene.loop.posted:
        scene.loop.posted.pop()()
    assert left == 0


def test_failures_are_results(export: Export) -> None:
    """What a slice raises reaches `done`, with and without a rest."""
    scene, owner, seen = Scene(), Owner(export), list[object]()
    for lane in (Lane.WORK, Lane.LISTING):
        scene.jobs.add(owner, lambda: 1 // 0, seen.append, lane)
    scene.loop.run()
    assert [type(one) for one in seen] == [ZeroDivisionError] * 2 and not export.jobs
