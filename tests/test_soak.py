# SPDX-License-Identifier: Apache-2.0
"""A short run of each scene of `script/soak`: real processes, killed with SIGKILL."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests import soak, soak_running
from tests.soak import SCENES, Scene, Work
from tests.support import require_boot_sector_guest


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
