# SPDX-License-Identifier: Apache-2.0
"""Runs of a schedule: jobs, hooks, and what is recorded, also of runs that are killed, interrupted or in the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from datetime import timedelta
from pathlib import Path

import pytest

from tests.vmm.schedule.schedules import CREATED, Clock, appended, happened, job, made, shell
from tests.waiting import wait_until
from vmm.host.proc import Lock, is_locked
from vmm.model.errors import InUse, of_os_error
from vmm.schedule import running
from vmm.schedule.places import schedule_paths
from vmm.schedule.record import LastRun, read_last, write_last
from vmm.schedule.running import JobStep, ScheduledJob, run

PLACE = "nightly"


def test_a_good_run(tmp_path: Path) -> None:
    """Steps of a job follow one another, hooks come before and after, and the end is recorded."""
    said = tmp_path / "said"
    names = ("before", "after", "on_failure")
    hooks: dict[str, object] = {name: [shell(appended(said, f"{name}-$VMM_RESULT"))] for name in names}
    work = job("web", appended(said, "one"), appended(said, "two"))
    found = run(made(PLACE, **hooks), [work], now=Clock(step=timedelta(minutes=1)))
    assert found.is_good and found.done == ("web",) and found.reason == ""
    assert said.read_text().split() == ["before-begun", "one", "two", "after-done"]
    assert read_last(schedule_paths(PLACE)) == found
    assert (found.began, found.ended) == (CREATED, CREATED + timedelta(minutes=1))
    assert [name for name, _ in happened()] == ["begun", "done"]


def test_one_failure_does_not_stop_the_others(tmp_path: Path) -> None:
    """A job that fails ends there; the others are done, `on_failure` runs with the reason, and so does `after`."""
    said = tmp_path / "said"
    failing = job("mail", "echo no disk left >&2; exit 7", appended(said, "never"))
    reports: list[tuple[str, str | None]] = []
    found = run(
        made(on_failure=[shell(f'echo "$VMM_SCHEDULE $VMM_RESULT $VMM_REASON" >>{said}')],
             after=[shell(appended(said, "after"))]),
        [failing, job("web", "true")],
        report=lambda name, problem: reports.append((name, problem)),
    )  # fmt: skip
    assert found.done == ("web",) and found.problems == {"mail": "step 1: no disk left"} and not found.is_good
    assert said.read_text().splitlines() == ["nightly failed mail: step 1: no disk left", "after"]
    assert sorted(reports, key=str) == [("mail", "step 1: no disk left"), ("web", None)]  # beside each other
    [begun, failed] = happened()
    assert begun[1]["jobs"] == ["mail", "web"]
    assert failed[0] == "failed" and failed[1]["reason"] == "mail: step 1: no disk left"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("exit 3", "exit code 3"),
        ("kill -9 $$", "it was ended by signal 9"),
        ("echo first >&2; echo last >&2; echo >&2; exit 1", "last"),
        ("printf 'a\\033[31m\\377' >&2; exit 1", "a\\x1b[31m\ufffd"),
        ("echo '{\"error\": 3}' >&2; exit 1", '{"error": 3}'),
    ],
)
def test_reasons(line: str, reason: str) -> None:
    """The reason is the last line of what the command said, on one line and harmless; otherwise how it ended."""
    assert run(made(), [job("web", line)]).problems["web"] == f"step 1: {reason}"


def test_the_message_of_an_error_as_json(tmp_path: Path) -> None:
    """Of an error that a command printed as JSON the message is shown; a code without words has its meaning."""
    error = tmp_path / "error"
    error.write_text(json.dumps({"error": {"kind": "NoSpace", "message": "disk.vhd: is full"}}))
    steps = (JobStep("verify", shell("exit 3"), {3: "a night is damaged"}),)
    found = run(made(), [job("web", f"cat {error} >&2; exit 7"), ScheduledJob("mail", steps)])
    assert found.problems == {"web": "step 1: disk.vhd: is full", "mail": "verify: a night is damaged"}


def test_a_missing_program() -> None:
    """A program that does not exist is a failure like others."""
    found = run(made(after=[("/nowhere/hook",)]), [ScheduledJob("web", (JobStep("backup", ("/nowhere/vmm",)),))])
    assert "/nowhere/vmm could not be started" in found.problems["web"]
    assert found.problem is not None and "the hook /nowhere/hook (after) failed" in found.problem


def test_nothing_is_begun_if_a_hook_before_fails(tmp_path: Path) -> None:
    """What a hook should have prepared is not there, so no job runs; the last hooks run all the same."""
    said = tmp_path / "said"
    found = run(
        made(before=[shell("exit 32"), shell(appended(said, "second"))], after=[shell(appended(said, "after"))]),
        [job("web", appended(said, "job"))],
    )
    assert said.read_text() == "after\n" and found.done == ()
    assert found.problem == "nothing was begun, because the hook sh (before) failed: exit code 32"


def test_hooks_are_no_lines_for_a_shell(tmp_path: Path) -> None:
    """The arguments of a hook reach its program as they are."""
    target = tmp_path / "$HOME; touch x"
    assert run(made(before=[("touch", str(target))]), []).is_good
    assert target.exists()


def test_jobs_run_at_once(tmp_path: Path) -> None:
    """With two at once each of two jobs sees the other; with one they do not run together."""
    meet = [f"touch {tmp_path}/{me}; timeout 20 sh -c 'until [ -e {tmp_path}/{other} ]; do sleep 0.01; done'"
            for me, other in (("a", "b"), ("b", "a"))]  # fmt: skip
    assert run(made(jobs=2), [job("a", meet[0]), job("b", meet[1])]).is_good
    alone = f"mkdir {tmp_path}/c && rmdir {tmp_path}/c"
    assert run(made(jobs=1), [job(str(number), alone) for number in range(4)]).is_good


def test_a_run_is_skipped_while_the_last_one_is_going() -> None:
    """The second run does nothing, says since when the first one is going, and leaves an event."""
    begun = LastRun(CREATED)
    write_last(schedule_paths(PLACE), begun)
    first = Lock(schedule_paths(PLACE).lock)
    assert first.try_take() and running.is_running(PLACE)
    with pytest.raises(InUse, match=r"still going, since 2026-11-01T12:00:00Z \(this one is skipped\)"):
        run(made(), [job("web", "exit 1")], now=Clock(CREATED + timedelta(days=1)))
    first.release()
    [(name, details)] = happened()
    assert name == "skipped" and details["due"] == "2026-11-02T12:00:00Z" and "still going" in str(details["reason"])
    assert read_last(schedule_paths(PLACE)) == begun and not running.is_running(PLACE)


def test_a_status_does_not_make_a_run_skip(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking whether a run is going takes its lock for a moment; a run that begins just then waits for that."""
    monkeypatch.setattr(running, "PATIENCE_SECONDS", 20.0)
    look = Lock(schedule_paths(PLACE).lock)
    assert look.try_take()
    tries = []
    take = Lock.try_take

    def second_time(self: Lock) -> bool:
        tries.append(self)
        if len(tries) == 2:
            look.release()
        return take(self)

    monkeypatch.setattr(Lock, "try_take", second_time)
    assert run(made(), [job("web", "true")]).is_good and len(tries) == 2


def test_times_that_were_due_during_a_run_are_reported() -> None:
    """systemd starts no second service meanwhile, so a long run reports the times that it was in the way of, once."""
    run(made(when="*:00"), [job("web", "true")], now=Clock(step=timedelta(hours=3, minutes=30)))
    skipped = [details["due"] for name, details in happened() if name == "skipped"]
    assert skipped == ["2026-11-01T13:00:00Z", "2026-11-01T14:00:00Z", "2026-11-01T15:00:00Z"]


def test_a_time_that_another_run_has_reported_is_not_repeated() -> None:
    """If a second run was begun by hand or by cron meanwhile, its event is the only one."""
    clock = Clock(CREATED + timedelta(hours=10))

    def second(name: str, problem: str | None) -> None:
        clock.moment = CREATED + timedelta(hours=10, minutes=31)  # 22:31
        with pytest.raises(InUse):
            run(made(), [], now=clock)

    run(made(), [job("web", "true")], now=clock, report=second)
    assert [details["due"] for name, details in happened() if name == "skipped"] == ["2026-11-01T22:31:00Z"]


def test_a_clock_that_is_set_back_during_a_run() -> None:
    """A run that ends before it began is recorded, and nothing is reported as skipped."""
    found = run(made(when="*:00"), [job("web", "true")], now=Clock(step=timedelta(days=-1)))
    assert found.is_good and [name for name, _ in happened()] == ["begun", "done"]


def test_a_run_that_was_killed_is_reported_by_the_next() -> None:
    """The record of a killed run has no end; the next run leaves an event about it, and takes its place."""
    write_last(schedule_paths(PLACE), LastRun(CREATED))
    run(made(), [])
    names = [name for name, _ in happened()]
    assert names == ["lost", "begun", "done"]


def test_a_damaged_record_is_no_hindrance() -> None:
    """A record that cannot be read counts as none."""
    for content in (b"", b"{", b"[]", b'{"began": "yesterday"}', b'{"began": "2026-11-01T12:00:00"}'):
        Path(schedule_paths(PLACE).last).write_bytes(content)
        assert read_last(schedule_paths(PLACE)) is None
        assert run(made(), []).is_good


def test_the_lock_outlives_a_killed_run(tmp_path: Path) -> None:
    """While a command of a killed run still works, no other run begins; a process that a hook left does not count."""
    program = f"""
from tests.vmm.schedule.schedules import job, made, shell
from vmm.schedule.running import run
run(made(before=[shell("sleep 60 & echo $! >{tmp_path}/hook")]),
    [job("web", "echo $$ >{tmp_path}/job.part; mv {tmp_path}/job.part {tmp_path}/job; exec sleep 60")])
"""
    child = subprocess.Popen([sys.executable, "-c", program])
    pids = []
    try:
        wait_until((tmp_path / "job").exists, "the job begins")
        pids = [int((tmp_path / name).read_text()) for name in ("job", "hook")]
        child.kill()
        child.wait()
        assert is_locked(schedule_paths(PLACE).lock)
        with pytest.raises(InUse):
            run(made(), [])
        os.kill(pids[0], signal.SIGKILL)
        wait_until(lambda: not is_locked(schedule_paths(PLACE).lock), "the job ends")
        assert run(made(), []).is_good
    finally:
        child.kill()
        child.wait()
        for pid in pids[1:]:
            os.kill(pid, signal.SIGKILL)


def test_an_interrupted_run(tmp_path: Path) -> None:
    """Ctrl-C reaches the commands that run, no other is begun, the last hooks run, and the record says why."""
    program = f"""
from tests.vmm.schedule.schedules import appended, job, made, shell
from vmm.schedule.running import run
said = "{tmp_path}/said"
waits = "trap 'echo interrupted >>" + said + "; exit 1' INT; touch {tmp_path}/begun; while :; do sleep 0.01; done"
run(made(on_failure=[shell(appended(said, "failed"))], after=[shell(appended(said, "after"))]),
    [job("web", waits, appended(said, "never")), job("mail", appended(said, "never"))])
"""
    child = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)
    try:
        wait_until((tmp_path / "begun").exists, "the job begins")
        child.send_signal(signal.SIGINT)
        _, said = child.communicate(timeout=30)
    finally:
        child.kill()
    assert "KeyboardInterrupt" in said
    assert (tmp_path / "said").read_text().split() == ["interrupted", "failed", "after"]
    last = read_last(schedule_paths(PLACE))
    assert last is not None and last.ended is not None and last.problem == "it was interrupted"
    assert [name for name, _ in happened()] == ["begun", "failed"]


def test_an_interrupted_hook_that_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A hook that Ctrl-C does not end is killed soon after, and the run ends."""
    monkeypatch.setattr(running, "_GRACE_SECONDS", 0.05)
    waits = f"trap '' INT TERM; touch {tmp_path}/begun; while :; do sleep 0.01; done"

    def interrupt() -> None:
        wait_until((tmp_path / "begun").exists, "the hook begins")
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        run(made(before=[shell(waits)]), [])
    assert [name for name, _ in happened()] == ["begun", "failed"]


def test_a_hook_that_hangs_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hook has a time limit, or it would stop every later run; its whole group of processes ends."""
    monkeypatch.setattr(running, "HOOK_SECONDS", 0.01)
    monkeypatch.setattr(running, "_GRACE_SECONDS", 0.01)
    found = run(made(before=[shell("trap '' TERM; sleep 60 & wait; sleep 60")]), [])
    assert found.problem is not None and "was killed" in found.problem


def test_a_full_disk_is_no_hindrance(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the record cannot be written, the work is done all the same, and the result says so."""

    def full(path: str, content: bytes) -> None:
        raise of_os_error(OSError(28, "No space left on device"), "write the file", path=path)

    monkeypatch.setattr("vmm.schedule.record.write_whole", full)
    found = run(made(), [job("web", "true")])
    assert found.done == ("web",) and found.problem is not None and "No space left" in found.problem


def test_a_report_that_fails(tmp_path: Path) -> None:
    """The commands that still run are interrupted and have ended when the last hooks run; the record has an end."""
    said = tmp_path / "said"
    waits = f"trap 'echo interrupted >>{said}; exit 1' INT; touch {tmp_path}/begun; while :; do sleep 0.01; done"
    quick = f"until [ -e {tmp_path}/begun ]; do sleep 0.01; done"

    def closed(name: str, problem: str | None) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        run(made(jobs=2, after=[shell(appended(said, "after"))]), [job("a", waits), job("b", quick)], report=closed)
    assert said.read_text().split() == ["interrupted", "after"]
    last = read_last(schedule_paths(PLACE))
    assert last is not None and last.ended is not None and not last.is_good and not running.is_running(PLACE)


def test_reports_come_in_the_callers_thread() -> None:
    """A report may print: it is never called by two threads at once."""
    threads: set[threading.Thread] = set()
    run(
        made(jobs=4), [job(str(number), "true") for number in range(4)],
        report=lambda name, problem: threads.add(threading.current_thread()),
    )  # fmt: skip
    assert threads == {threading.current_thread()}
