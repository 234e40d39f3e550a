# SPDX-License-Identifier: Apache-2.0
"""Nights of machines that run while processes are killed: of the machine, and the one that writes the night."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

import vhdkit
from tests.vmm import nights
from tests.vmm.small_guests import both_kinds_nightly, kill_together, processes, wait_counting, wait_whole
from tests.waiting import wait_until
from vmm.api import night_memory
from vmm.api.backups import BackupWishes, MachineNight
from vmm.api.manager import Manager
from vmm.model.errors import VmmError

pytestmark = pytest.mark.kvm


@pytest.fixture
def writing(manager: Manager, tmp_path: Path) -> Path:
    """A running machine whose guest writes to its disk all the time; its image."""
    return nights.make_writing(manager, tmp_path)


def night_elsewhere(manager: Manager, repo: Path, beside: Callable[[], object] = lambda: None) -> int:
    """A night in a process of its own, whose number is returned; it ends with the night, however that ends."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException), nights.recorded(beside):
            manager.save_night("small", str(repo))
        os._exit(0)
    return child


def check_goes_on(manager: Manager, leaf: Path, before: list[str]) -> MachineNight:
    """The next night is right, and once it is forgotten, the guest runs on its own image alone, which is sound."""
    repo = leaf.parent / "repo"
    with nights.recorded(lambda: wait_counting(manager)) as expected:
        night = manager.save_night("small", str(repo))
    assert nights.all_restored(repo, "small")[-1] == expected[0]
    assert len(nights.files_of(leaf.parent)) == len(before) + 1 and nights.tree().journal is None
    manager.forget_nights("small")
    assert nights.files_of(leaf.parent) == before
    wait_counting(manager)
    manager.stop("small")
    shown = manager.show("small").spec
    assert shown is not None and shown.disks[0].path == str(leaf) and vhdkit.check(leaf) == []
    return night


ALL = ("keeper", "worker", "server", "qemu")


@pytest.mark.parametrize(
    ("victims", "with_writer"),
    [
        (("worker",), False),
        (ALL, True),
        pytest.param(("worker",), True, marks=pytest.mark.nightly),
        pytest.param(("server",), True, marks=pytest.mark.nightly),
        pytest.param(("server",), False, marks=pytest.mark.nightly),
        pytest.param(ALL, False, marks=pytest.mark.nightly),
    ],
)
def test_processes_that_are_killed_while_it_is_copied(
    manager: Manager, writing: Path, victims: tuple[str, ...], with_writer: bool
) -> None:
    """The night needs no process of the machine: it is complete whichever of them dies. If its own process is killed,
    there is no night, and the next one is right all the same."""
    before, gate, repo = nights.files_of(writing.parent), writing.parent / "gate", writing.parent / "repo"
    manager.save_night("small", str(repo))
    gate.touch()
    begun = writing.parent / "begun"

    def beside() -> None:
        begun.touch()
        wait_until(lambda: not gate.exists(), "the copy may go on")

    child = night_elsewhere(manager, repo, beside)
    wait_until(begun.exists, "the disks are frozen")
    assert any(one.maker for one in nights.tree().kept)
    living = processes()
    if with_writer:
        os.kill(child, 9)
        os.waitpid(child, 0)
    kill_together(living[part] for part in victims)
    if "qemu" in victims:
        manager.state("small")
        manager.start("small")
    wait_whole(but={part: living[part] for part in victims})
    wait_counting(manager)
    gate.unlink()
    if not with_writer:
        os.waitpid(child, 0)
    assert check_goes_on(manager, writing, before).night == (2 if with_writer else 3)


# A worker that kills itself before or after it writes its journal the nth time: sitecustomize for its interpreter.
KILLER = """
import os, sys
if "vmm.worker.worker" in sys.orig_argv and os.path.exists({plan!r}):
    from vmm.store.snapshots.store import Held
    when, number = open({plan!r}).read().split()
    save, saved = Held.save, 0

    def killing(held):
        global saved
        saved += 1
        if saved == int(number) and when == "before":
            end()
        save(held)
        if saved == int(number):
            end()

    def end():
        os.unlink({plan!r})
        os.kill(os.getpid(), 9)

    Held.save = killing
"""
STEPS = {"begun": 1, "new leaves": 2, "done": 3}
EVERY_DAY = {("after", "begun"), ("before", "new leaves"), ("after", "new leaves")}
MOMENTS = [
    pytest.param(when, step, marks=[] if (when, step) in EVERY_DAY else [pytest.mark.nightly])
    for step in STEPS for when in ("before", "after")
]  # fmt: skip


@both_kinds_nightly
@pytest.mark.parametrize(("when", "step"), MOMENTS)
def test_a_worker_killed_at_each_step(
    manager: Manager, tmp_path: Path, when: str, step: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever step of its journal the worker dies at, the guest goes on, there is no night, and the next one is
    right."""
    plan, code = tmp_path / "plan", tmp_path / "code"
    code.mkdir()
    (code / "sitecustomize.py").write_text(KILLER.format(plan=str(plan)))
    plan.write_text(f"{when} {STEPS[step]}")
    monkeypatch.setenv("PYTHONPATH", str(code))
    leaf = nights.make_writing(manager, tmp_path, kind=kind)
    before, worker = nights.files_of(tmp_path), processes()["worker"]
    with pytest.raises(VmmError):
        manager.save_night("small", str(tmp_path / "repo"))
    wait_until(lambda: not worker.is_alive(), "the worker has killed itself")
    assert not plan.exists()
    wait_whole(but={"worker": worker})
    assert check_goes_on(manager, leaf, before).night == 1


@pytest.mark.nightly
def test_killed_while_memory_is_saved(manager: Manager, writing: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backup that is killed when it has the memory leaves no night; what it leaves goes with the next one."""
    before, repo, begun = nights.files_of(writing.parent), writing.parent / "repo", writing.parent / "begun"

    def wait_forever(*words: object) -> None:
        begun.touch()
        wait_until(lambda: False, "this process is killed")

    for name in ("_keep", "_opened"):  # before and after the images are kept
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                monkeypatch.setattr(night_memory, name, wait_forever)
                manager.save_night("small", str(repo), BackupWishes(with_memory=True))
            os._exit(0)
        wait_until(begun.exists, "the memory is captured")
        os.kill(child, 9)
        os.waitpid(child, 0)
        begun.unlink()
        assert nights.all_restored(repo, "small") == [] and nights.tree().snapshots
        wait_counting(manager)
    assert check_goes_on(manager, writing, before).night == 1
    assert not nights.tree().snapshots
