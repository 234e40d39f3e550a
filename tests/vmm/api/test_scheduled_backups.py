# SPDX-License-Identifier: Apache-2.0
"""Backups on a schedule: which commands are run, and whether the nights are there that should be."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.vhdkit.backup.repositories import MACHINE, Nights
from vhdkit import backups
from vmm.api import scheduled_backups
from vmm.api.scheduled_backups import ScheduleStatus, jobs_of, make_backup_schedule, status
from vmm.host.proc import Lock
from vmm.model.errors import InvalidSpec, NotFound
from vmm.model.spec import make_spec
from vmm.schedule import store
from vmm.schedule.definition import Schedule
from vmm.schedule.places import schedule_paths
from vmm.schedule.record import LastRun, write_last
from vmm.store import registry

CREATED = datetime(2026, 11, 1, 12, tzinfo=UTC)
MORNING = datetime(2026, 11, 10, 8, tzinfo=UTC)
LAST_NIGHT = datetime(2026, 11, 9, 22, 31, tzinfo=UTC)


@pytest.fixture(autouse=True)
def home(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A home with the machines "web" and "mail", of which the repository `repo` may have nights."""
    monkeypatch.setenv("VMM_HOME", str(short_path / "home"))
    monkeypatch.setenv("VMM_RUNTIME", str(short_path / "run"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(short_path / "config"))
    for name in ("mail", "web"):
        registry.add(make_spec(name=name))
    yield short_path


def schedule(home: Path, **changes: object) -> Schedule:
    """A schedule of "web" for 22:30, which is stored."""
    fields: dict[str, object] = {"name": "nightly", "when": "22:30", "created": CREATED}
    work: dict[str, object] = {"machines": ["web"], "repository": str(home / "repo")}
    for name, value in changes.items():
        (fields if name in Schedule.model_fields else work)[name] = value
    made = make_backup_schedule(work, **fields)
    store.add(made, replace=True)
    return made


def night(home: Path, taken: datetime) -> Nights:
    """A night of "web" in the repository, taken then."""
    nights = Nights(home / "repo")
    nights.add({"disk-0": {0: b"x"}}, taken=taken)
    return nights


def only(now: datetime = MORNING) -> ScheduleStatus:
    """The status of the only schedule."""
    [found] = status(now)
    return found


def state(now: datetime = MORNING) -> tuple[str, str]:
    """The state of its only machine, and why."""
    [machine] = only(now).machines
    return machine.state, machine.words


def test_the_commands(home: Path) -> None:
    """Each machine is saved, pruned by its id, and verified; a word that looks like an option is a name."""
    made = schedule(
        home, machines=["web", "mail", "web"], keep={"daily": 7, "weekly": 4}, zone="Europe/Berlin", sample_percent=5,
        consistent=True, with_memory=True, compare=True, full_every=30, keep_free_bytes=1 << 30,
        max_rate_bytes=1 << 20,
    )  # fmt: skip
    jobs, repo = jobs_of(made, ["/bin/vmm"]), str(home / "repo")
    assert [one.name for one in jobs] == ["web", "mail"]
    save, prune, verify = jobs[0].steps
    options = [
        "--schedule",
        "nightly",
        "--json",
        "--consistent",
        "--with-memory",
        "--compare",
        "--full-every",
        "30",
        "--keep-free",
        str(1 << 30),
        "--limit",
        str(1 << 20),
    ]
    assert list(save.words) == ["/bin/vmm", "backup", "run", *options, "--", "web", repo]
    machine_id = registry.load("web").spec.id
    rules = ["--keep-daily", "7", "--keep-weekly", "4", "--zone", "Europe/Berlin"]
    assert list(prune.words) == ["/bin/vmm", "backup", "prune", "--json", *rules, "--", repo, machine_id]
    assert list(verify.words) == ["/bin/vmm", "backup", "verify", "--json", "--sample", "5", "--", repo, machine_id]
    assert [len(one.steps) for one in jobs_of(schedule(home), ["vmm"])] == [1]


def test_all_machines(home: Path) -> None:
    """A schedule of all machines saves those that there are when it runs; one that is gone is still saved by name, so
    that its absence is reported."""
    made = schedule(home, machines=[])
    assert [one.name for one in jobs_of(made, ["vmm"])] == ["mail", "web"]
    registry.add(make_spec(name="prune"))
    assert [one.name for one in jobs_of(made, ["vmm"])] == ["mail", "prune", "web"]


def test_a_machine_that_was_renamed(home: Path) -> None:
    """It is saved and judged under its new name, also if another machine gets its old one."""
    made = schedule(home, machines=["web", "mail"])
    with registry.changing("web") as web:
        registry.rename(web, web.spec.changed(name="shop"))
    assert [one.name for one in jobs_of(made, ["vmm"])] == ["shop", "mail"]
    assert [one.machine for one in only().machines] == ["shop", "mail"]
    registry.add(make_spec(name="web"))
    assert [one.name for one in jobs_of(made, ["vmm"])] == ["shop", "mail"]


@pytest.mark.parametrize(
    "work", [{"machines": ["nobody"], "repository": "r"}, {}, {"repository": "r", "keep": {"nightly": 3}},
             {"repository": "r", "sample_percent": 101}, {"repository": "r", "full_every": 0}],
)  # fmt: skip
def test_impossible_work(work: dict[str, object]) -> None:
    """A machine that does not exist and impossible settings are refused when the schedule is made."""
    with pytest.raises((InvalidSpec, NotFound)):
        make_backup_schedule(work, name="nightly", when="22:30", created=CREATED)


def test_it_worked_last_night(home: Path) -> None:
    """With a whole night since the schedule was due, all is good; the day after that it no longer is."""
    schedule(home)
    night(home, LAST_NIGHT)
    assert state()[0] == "good" and only().is_good
    assert "newest whole night 1, 9 h old" in state()[1]
    assert state(MORNING + timedelta(hours=20, minutes=29))[0] == "good"  # 04:29: the next one may still come
    assert state(MORNING + timedelta(hours=20, minutes=30))[0] == "late"


def test_a_timer_that_never_ran(home: Path) -> None:
    """A schedule that is not due yet is new; once it should have run and nothing is there, it is late."""
    schedule(home)
    assert state(CREATED)[0] == "new" and only(CREATED).is_good and only().timer is None
    assert state() == ("late", f"no night, and no repository at {home}/repo; the schedule has never run")
    Nights(home / "repo")
    assert state() == ("late", "no night; the schedule has never run") and not only().is_good
    assert state(CREATED)[0] == "new"


def test_a_failed_run_says_why(home: Path) -> None:
    """The reason of the last run is shown for the machine that has no night."""
    schedule(home, machines=["web", "mail"])
    night(home, LAST_NIGHT - timedelta(days=1))
    place = schedule_paths("nightly")
    write_last(place, LastRun(LAST_NIGHT, LAST_NIGHT, (), {"web": "backup: no space left"}))
    assert "the run at 2026-11-09 22:31 UTC failed: backup: no space left" in only().machines[0].words
    assert only().last_problem == "web: backup: no space left"
    write_last(place, LastRun(LAST_NIGHT, LAST_NIGHT, (), {}, "nothing was begun, because of a hook"))
    assert all("because of a hook" in one.words for one in only().machines)
    write_last(place, LastRun(LAST_NIGHT))
    assert "did not end" in (only().last_problem or "")
    lock = Lock(place.lock)
    assert lock.try_take() and only().is_running and only().last_problem is None
    lock.release()


def test_a_night_saved_by_hand_counts(home: Path) -> None:
    """Only the nights count: a failed run does not matter when there is a whole night since."""
    schedule(home)
    night(home, LAST_NIGHT)
    write_last(schedule_paths("nightly"), LastRun(LAST_NIGHT, LAST_NIGHT, (), {"web": "x"}))
    assert state()[0] == "good"


@pytest.mark.parametrize("ahead", [timedelta(days=1), timedelta(days=365)])
def test_a_night_in_the_future_does_not_count(home: Path, ahead: timedelta) -> None:
    """A clock that was ahead for a while must not make missing nights look good."""
    schedule(home)
    night(home, MORNING + ahead)
    assert state()[0] == "late" and "in the future: a clock was wrong" in state()[1]


def test_clocks_are_changed(home: Path) -> None:
    """In the night without 02:30 none is due, and in the one that has it twice one is enough."""
    berlin: dict[str, object] = {"when": "02:30", "zone": "Europe/Berlin", "created": datetime(2026, 3, 1, tzinfo=UTC)}
    schedule(home, **berlin)
    nights = night(home, datetime(2026, 3, 28, 1, 31, tzinfo=UTC))
    assert state(datetime(2026, 3, 29, 12, tzinfo=UTC))[0] == "good"
    assert state(datetime(2026, 3, 30, 12, tzinfo=UTC))[0] == "late"
    nights.add({"disk-0": {0: b"y"}}, taken=datetime(2026, 10, 25, 0, 31, tzinfo=UTC))
    assert state(datetime(2026, 10, 25, 12, tzinfo=UTC))[0] == "good"


def test_a_changed_zone_judges_by_the_new_one(home: Path) -> None:
    """After the zone of a schedule was changed its times are those of the new zone; nights are moments, and stay."""
    schedule(home)
    night(home, LAST_NIGHT)
    schedule(home, zone="Asia/Tokyo")  # 13:30 UTC
    assert state()[0] == "good"
    schedule(home, zone="America/Los_Angeles")  # 06:30 UTC
    assert state(datetime(2026, 11, 10, 12, 29, tzinfo=UTC))[0] == "good"
    assert state(datetime(2026, 11, 10, 12, 31, tzinfo=UTC))[0] == "late"


def test_damage_is_seen(home: Path) -> None:
    """A night with a missing image is damaged, even if another one is recent."""
    schedule(home)
    nights = night(home, LAST_NIGHT - timedelta(days=1))
    nights.add({"disk-0": {0: b"y"}}, taken=LAST_NIGHT)
    nights.image(2, "disk-0").unlink()
    assert state()[0] == "damaged" and only().is_damaged and "night 2 is damaged" in state()[1]


def test_a_machine_is_found_by_its_id_or_its_name(home: Path) -> None:
    """The machine's id decides; a machine that was deleted on the host is judged by its name in the repository."""
    schedule(home)
    night(home, LAST_NIGHT)  # of another id, under the name "web"
    assert registry.load("web").spec.id != MACHINE and state()[0] == "good"
    nights = Nights(home / "repo")
    with nights.machine() as machine:
        own = registry.load("web").spec.id
        with machine.repository.made_machine(own, "web"):
            pass
    assert state() == ("late", "no whole night; the schedule has never run")


def test_what_cannot_be_judged(home: Path) -> None:
    """A schedule that cannot be read and a repository that is damaged are not good, and do not hide the others."""
    schedule(home)
    night(home, LAST_NIGHT)
    schedule(home, name="broken")
    Path(schedule_paths("broken").document).write_text("{}")
    schedule(home, name="other")
    broken, nightly, _ = status(MORNING)
    assert not broken.is_good and "is not a schedule" in (broken.problem or "") and nightly.is_good
    (home / "repo" / "repository.json").write_text("{}")
    assert not status(MORNING, ["nightly"])[0].is_good
    with pytest.raises(NotFound):
        status(MORNING, ["nobody"])


def test_a_repository_that_does_not_answer(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file server that is away is reported in time, and the other schedules are judged."""
    schedule(home)
    schedule(home, name="other", repository=str(home / "away"))
    night(home, LAST_NIGHT)
    back, opened = threading.Event(), backups.open_repository

    def hanging(path: str) -> backups.Repository:
        if path.endswith("away"):
            back.wait(60)
        return opened(path)

    monkeypatch.setattr(backups, "open_repository", hanging)
    try:
        monkeypatch.setattr(scheduled_backups, "ANSWER_SECONDS", 20.0)
        assert status(MORNING, ["nightly"])[0].is_good
        monkeypatch.setattr(scheduled_backups, "ANSWER_SECONDS", 0.05)
        [away] = status(MORNING, ["other"])
    finally:
        back.set()
    assert not away.is_good and "away: does not answer within" in (away.problem or "")


def test_a_repository_that_is_mounted_for_the_run_alone(home: Path) -> None:
    """Where the repository is gone, but the last run has saved the machine in time, the words say so."""
    schedule(home)
    write_last(schedule_paths("nightly"), LastRun(LAST_NIGHT, LAST_NIGHT, ("web",)))
    assert state() == (
        "late",
        f"no night, and no repository at {home}/repo; the run at 2026-11-09 22:31 UTC saved it: is the repository"
        " mounted?",
    )


def test_a_repository_that_is_not_mounted(home: Path) -> None:
    """INV-TARGET-KNOWN: a schedule knows the repository that it found when it was added, also after it was replaced.
    While an empty folder, another repository, or nothing is in its place, its machine is not good, due or not."""
    night(home, LAST_NIGHT)
    schedule(home)
    assert only().is_good
    (home / "repo").rename(home / "away")
    assert state()[0] == state(CREATED)[0] == "missing"
    (home / "repo").mkdir()
    problem, words = state()
    assert problem == "missing" and f"{home}/repo should have the repository " in words and "mounted?" in words
    before = store.load("nightly")
    replaced = make_backup_schedule({"repository": str(home / "repo")}, before, name="nightly", when="20:00",
                                    created=CREATED)  # fmt: skip
    assert scheduled_backups.work_of(replaced).repository_ids == scheduled_backups.work_of(before).repository_ids
    elsewhere = make_backup_schedule({"repository": str(home / "new")}, before, name="nightly", when="20:00",
                                     created=CREATED)  # fmt: skip
    assert scheduled_backups.work_of(elsewhere).repository_ids == ()
    with backups.create_repository(home / "repo") as other:
        assert f"another repository is there, with the id {other.id}" in state()[1]
        scheduled_backups.note_repository("nightly", str(home / "repo"), other.id)
    assert state() == ("late", "no night; the schedule has never run")
    assert not only().is_damaged


def test_a_repository_is_noted_where_the_schedule_has_it(home: Path) -> None:
    """What is noted is about the stored schedule as it is then: not about one that has another path now; the newest id
    is the last one, and they do not become more and more."""
    schedule(home)
    (home / "link").symlink_to("repo")
    for number in range(20):
        scheduled_backups.note_repository("nightly", str(home / "link"), f"{number:032x}")
    scheduled_backups.note_repository("nightly", str(home / "repo"), f"{18:032x}")
    scheduled_backups.note_repository("nightly", str(home / "other"), f"{99:032x}")
    ids = scheduled_backups.work_of(store.load("nightly")).repository_ids
    assert len(ids) == 16 and ids[-2:] == (f"{19:032x}", f"{18:032x}")
    assert scheduled_backups.known_ids("nightly", str(home / "repo")) == set(ids)
    assert scheduled_backups.known_ids("nightly", str(home / "other")) == set()


def test_schedules_of_other_kinds_are_left_alone(home: Path) -> None:
    """The room of schedules has others, too; they are not judged here, and do not run as backups."""
    made = schedule(home)
    other = made.model_copy(update={"kind": "snapshot"})
    store.add(other, replace=True)
    assert status(MORNING) == []
    with pytest.raises(InvalidSpec, match="something else"):
        scheduled_backups.work_of(other)
