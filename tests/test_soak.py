# SPDX-License-Identifier: Apache-2.0
"""A short run of each scene of `script/soak`: real processes, killed with SIGKILL."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

import vhdkit
from tests import soak, soak_cut, soak_interrupted, soak_remember, soak_running, soak_snapshots
from tests.harness.plain_reader import read_chain
from tests.soak import SCENES, Scene, Work
from tests.support import daily_or_nightly, require_boot_sector_guest
from vhdkit.chain.names import opening
from vmm.api import machine_snapshots as door

# Every day tests that kill at chosen calls have these formats: test_a_lost_answered_write_is_found below, and in
# tests/vhdkit/chain/verbs test_merge_cuts.py and test_resize.py.
SELDOM = ("remember-vhdx", "live-merge-vhdx", "resize-fixed")


@pytest.mark.parametrize(
    "name", [pytest.param(one, marks=pytest.mark.nightly) if one in SELDOM else one for one in SCENES]
)
def test_kills_at_random_moments(name: str) -> None:
    """INV-MERGE-PRESERVES and similar ones with real files: after each kill everything reads correctly, and recovery,
    sometimes killed as well, finishes the work."""
    tally = soak.soak(SCENES[name], daily_or_nightly(1, 10), kills=daily_or_nightly(3, 20))
    assert tally.recoveries > 0, tally


@pytest.mark.parametrize("written", [True, False])
@pytest.mark.parametrize("prepare", [soak_remember.prepare, soak_remember.prepare_vhdx])
def test_a_lost_answered_write_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prepare: Callable[[], None], written: bool
) -> None:
    """INV-ANSWERED-SURVIVES: the `remember` scene fails, naming the sector, if a frozen layer's notes are not
    written."""
    monkeypatch.chdir(tmp_path)
    prepare()
    assert soak.run_killed(soak_remember.prepare_and_die, None)
    if written:
        soak_remember.look(True)
        return
    monkeypatch.setattr(opening, "write_noted", lambda store, options, child_path: None)
    with pytest.raises(AssertionError, match="sector 8 is lost"):
        soak_remember.look(True)


@pytest.mark.parametrize("prepare", [soak_remember.prepare, soak_remember.prepare_vhdx])
def test_notes_of_the_target_of_a_merge_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prepare: Callable[[], None]
) -> None:
    """INV-ANSWERED-SURVIVES: a child with sectors that is being merged into its parent hides what is noted of it."""
    monkeypatch.chdir(tmp_path)
    prepare()
    assert soak.run_killed(soak_remember.merge_and_die, None)
    assert list(Path("notes").iterdir()) and len(list(Path().glob("base.a*"))) == 1
    soak_remember.look(True)


@pytest.mark.kvm
def test_kills_under_a_running_machine() -> None:
    """If the worker, the disk server, QEMU or the command is killed in snapshots of a running machine, all states
    stay."""
    require_boot_sector_guest()
    assert soak_running.run(0, kills=2).total() >= 2


@pytest.mark.kvm
def test_any_command_after_an_interrupted_snapshot() -> None:
    """INV-READ-UNDER-LOCK: a snapshot's command is interrupted, its worker continues, and another command follows."""
    require_boot_sector_guest()
    rounds = daily_or_nightly(1, 2)
    assert soak_interrupted.run(0, rounds=rounds).total() >= rounds


@pytest.mark.kvm
@pytest.mark.parametrize(
    "scene",  # every day the worker is killed at steps of a backup in tests/vmm/worker/test_backup.py
    [pytest.param(one, marks=pytest.mark.nightly) if one == "cut-backup" else one for one in soak_cut.SCENES],
)
def test_killed_operations_followed_by_any_verb(scene: str) -> None:
    """INV-ONE-JOURNAL: processes are killed in a live operation, then any verb follows: a second reader finds every
    disk."""
    require_boot_sector_guest()
    assert soak_cut.run(scene, 0, kills=1).total() == 1


def test_both_readers_agree(tmp_path: Path) -> None:
    """A chain with scattered blocks, and an image in between that grew, reads the same with both."""
    rng = random.Random("second")
    paths = [tmp_path / "base.vhd", tmp_path / "middle.avhd", tmp_path / "leaf.avhd"]
    vhdkit.create_image(paths[0], 4 << 20, block_size_bytes=512 << 10)
    for number, path in enumerate(paths):
        if number:
            vhdkit.create_child(path, paths[number - 1])
        with vhdkit.open_disk(path, writable=True) as disk:
            for _ in range(9):
                disk.write(rng.randrange(0, 4 << 20, 512), rng.randbytes(512))
    for path in paths:
        with vhdkit.open_disk(path) as disk:
            assert read_chain(path) == disk.read(0, disk.size_bytes)


def test_killed_and_interrupted_commands_on_a_machine() -> None:
    """INV-DELETE-RULE: whatever is killed or interrupted, and whatever comes next, each state reads as before."""
    tally = soak_snapshots.run(25, seed=3)
    assert sum(count for what, count in tally.items() if what.endswith((": killed", ": interrupted"))) > 3, tally


def test_the_driver_finds_an_apply_without_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    """Self-test: a command that reports success without applying is found by the check after it."""

    def write_or_go_back(driver: soak_snapshots.Driver) -> list[Callable[[], soak_snapshots.Step]]:
        return [driver._write, driver._apply] if driver.snapshots else [driver._create]

    monkeypatch.setattr(soak_snapshots.Driver, "_possible", write_or_go_back)
    monkeypatch.setattr(door, "apply", lambda machine, snapshot_id: None)
    with pytest.raises(AssertionError, match="not what they were"):
        soak_snapshots.run(60, seed=1)


def test_lost_data_is_found() -> None:
    """Self-test: a scene whose command loses data fails, and its folder is kept."""

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
