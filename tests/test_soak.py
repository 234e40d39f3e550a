# SPDX-License-Identifier: Apache-2.0
"""A short run of each scene of `script/soak`: real processes, killed with SIGKILL."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests import soak, soak_interrupted, soak_running, soak_snapshots
from tests.soak import SCENES, Scene, Work
from tests.support import require_boot_sector_guest
from vmm.snapshots import door


@pytest.mark.parametrize("name", SCENES)
def test_kills_at_random_moments(name: str) -> None:
    """INV-MERGE-PRESERVES and its like with real files: after each kill everything reads as it must, and recovery,
    killed as well now and then, finishes the work."""
    tally = soak.soak(SCENES[name], 2, kills=8)
    assert tally.recoveries > 0, tally


@pytest.mark.kvm
def test_kills_under_a_running_machine() -> None:
    """Worker, disks' server, QEMU or the command killed in snapshots of a machine that runs: all states stay."""
    require_boot_sector_guest()
    assert soak_running.run(0, kills=2).total() >= 2


@pytest.mark.kvm
def test_any_command_after_an_interrupted_snapshot() -> None:
    """INV-READ-UNDER-LOCK: a snapshot's command is interrupted, its worker goes on, and another command follows."""
    require_boot_sector_guest()
    assert soak_interrupted.run(0, rounds=2).total() >= 2


def test_commands_cut_short_on_a_machine() -> None:
    """INV-DELETE-RULE: what is killed or interrupted, and whatever comes next, each state reads as it did."""
    tally = soak_snapshots.run(25, seed=3)
    assert sum(count for what, count in tally.items() if what.endswith((": killed", ": interrupted"))) > 3, tally


def test_the_driver_finds_an_apply_that_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Self-test: a command that says it went back and did not is found by the look after it."""
    monkeypatch.setattr(door, "apply", lambda machine, snapshot_id: None)
    with pytest.raises(AssertionError, match="not what they were"):
        soak_snapshots.run(60, seed=1)


def test_what_is_wrong_is_found() -> None:
    """Self-test: a scene whose command leaves less than it should fails, and its folder is kept."""

    def prepare() -> None:
        soak._make_chain()

    def look(done: bool) -> None:
        assert not done or os.path.exists("leaf.avhd"), "the leaf is gone"

    def recover() -> Work | None:
        return SCENES["merge"].recover()

    scene = Scene("spoiled", prepare, SCENES["merge"].command, look, recover)
    with pytest.raises(AssertionError, match="the leaf is gone") as failure:
        soak.soak(scene, 30)
    (note,) = failure.value.__notes__
    folder = Path(note.rsplit(" ", 1)[1])
    assert (folder / "work").is_dir()
