# SPDX-License-Identifier: Apache-2.0
"""`vmm restore` on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import require_boot_sector_guest
from tests.vmm.api.restoring.saved_nights import save_night
from tests.vmm.cli.running import document, failure, good
from tests.vmm.guests.boot_sector import BootOptions
from tests.vmm.small_guests import console, make_machine, wait_counting
from tests.vmm.snapshots.machines import Machines
from vhdkit import backups
from vmm.api.manager import Manager


def test_a_dry_run_lists_what_must_be_allowed(machines: Machines, tmp_path: Path) -> None:
    """The plan names the night, what it is worth, each new image and each option; nothing is made."""
    machines.create("web", 1, paths={"disks": str(tmp_path)})
    repository = machines.folder / "repo"
    save_night("web", repository, consistency=backups.Consistency.CRASH)
    shown = good("restore", repository, "web", "--as", "new", "--dry-run")
    assert "night 1 of 2026-11-30 02:30 UTC, as after a power cut" in shown
    assert f"--allow {tmp_path}" in shown and "new-disk-0.vhd" in shown
    found = document("restore", repository, "web", "--as", "new", "--dry-run")
    assert found["outside"] == {f"the folder for disks {tmp_path}": f"--allow {tmp_path}"}
    assert "--allow all" in failure("restore", repository, "web", "--as", "new", code=6)
    assert good("list", "--quiet") == good("list", "--quiet") and Manager().names() == ["web"]
    done = good("restore", repository, "web", "--as", "new", "--allow", str(tmp_path))
    assert f"allowed: the folder for disks {tmp_path}" in done
    assert "new is restored: night 1 of 2026-11-30 02:30 UTC, as after a power cut" in done
    (tmp_path / "x").mkdir()
    made = document("restore", repository, "web", "--as", "new2", "--to", tmp_path / "x")
    assert made["name"] == "new2" and Path(made["disks"]["disk-0"]).is_file() and made["consistency"] == "crash"


@pytest.mark.nightly
@pytest.mark.kvm
def test_a_restored_machine_boots(manager: Manager, tmp_path: Path) -> None:
    """The guest of the night starts beside its original, and finds what it had written."""
    require_boot_sector_guest()
    make_machine(manager, tmp_path, options=BootOptions(print_every=2, write_every=1))
    manager.start("small")
    wait_counting(manager)
    manager.stop("small")
    save_night("small", tmp_path / "repo")
    manager.start("small")
    good("restore", tmp_path / "repo", "small", "--as", "twin")
    manager.start("twin")
    wait_counting(manager, "twin")
    assert "LBA16-DATA" in console(manager, "twin") and "WRITE-OK" in console(manager, "twin")
    wait_counting(manager, "small")
