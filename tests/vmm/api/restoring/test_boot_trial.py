# SPDX-License-Identifier: Apache-2.0
"""Nights are started from the repository to see whether they boot; nothing of a trial stays."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest

import vhdkit
from tests.support import require_boot_sector_guest
from tests.vmm.api.restoring.saved_nights import hashes, lease_count, save_night
from tests.vmm.guests.boot_sector import BootOptions
from tests.vmm.small_guests import make_machine
from tests.vmm.stage import pids_naming
from tests.waiting import wait_until
from vmm.api.manager import DiskRequest, Manager
from vmm.api.restoring import boot_trial
from vmm.api.restoring.boot_trial import end_abandoned, try_boot
from vmm.api.restoring.signs import TrialWish
from vmm.model import paths
from vmm.net import switches
from vmm.net.switch_spec import make_switch
from vmm.store import registry
from vmm.store.state import MachineState

SECONDS = 60.0


def trials() -> list[str]:
    """What is left of trials."""
    folder = Path(paths.home()) / "trials"
    left = [one.name for one in folder.iterdir()] if folder.exists() else []
    above, name = os.path.split(paths.runtime_home())
    return left + [one for one in os.listdir(above) if one.startswith(f"{name}-t")]


@pytest.mark.kvm
def test_a_night_boots(manager: Manager, tmp_path: Path) -> None:
    """The guest of a night starts from the repository and writes, beside its original; the night is unchanged, and
    neither a machine, nor a process, nor a lease is left."""
    require_boot_sector_guest()
    make_machine(manager, tmp_path, options=BootOptions(print_every=2, write_every=1))
    switches.create(make_switch(name="lan"))
    manager.add_adapter("small", switch="lan")
    save_night("small", tmp_path / "repo")
    before = hashes(tmp_path / "repo")
    found = try_boot(str(tmp_path / "repo"), "small", TrialWish(expect="WRITE-OK", seconds=SECONDS))
    assert found.is_good and (found.machine, found.night, found.seen) == ("small", 1, "text")
    assert hashes(tmp_path / "repo") == before and lease_count(tmp_path / "repo") == 0
    assert manager.names() == ["small"] and manager.state("small") is MachineState.OFF and trials() == []


@pytest.mark.kvm
@pytest.mark.nightly
def test_a_night_that_does_not_boot(manager: Manager, tmp_path: Path) -> None:
    """A guest that shows nothing of what is expected in time has failed, and is gone as well."""
    vhdkit.create_image(tmp_path / "empty.vhd", 1 << 20)
    manager.create("empty", disks=[DiskRequest(str(tmp_path / "empty.vhd"))], memory_bytes=16 << 20, accelerator="tcg")
    save_night("empty", tmp_path / "repo")
    found = try_boot(str(tmp_path / "repo"), "empty@1", TrialWish(expect="login:", seconds=0.1))
    assert not found.is_good and "does not show 'login:' within 0 s" in found.words
    assert trials() == [] and lease_count(tmp_path / "repo") == 0


# Writes a letter on the screen with each tick of the clock: mov al,'A'; again: int 10h; sti; hlt; inc al; jmp again.
LETTERS = bytes.fromhex("31dbb40eb041cd10fbf4fec0ebf8").ljust(510, b"\0") + b"\x55\xaa"


@pytest.mark.kvm
@pytest.mark.nightly
@pytest.mark.parametrize(
    ("firmware", "content", "seen"), [("bios", b"", None), ("bios", LETTERS, "screen"), ("uefi", b"", None)]
)
def test_what_a_screen_shows(
    firmware: Literal["bios", "uefi"], content: bytes, seen: str | None, manager: Manager, tmp_path: Path
) -> None:
    """A guest that draws has booted. A firmware that finds nothing to boot has not: its pictures, and the cursor that
    blinks below them, are known from the same machine with empty disks."""
    vhdkit.create_image(tmp_path / "disk.vhd", 1 << 20)
    with vhdkit.open_disk(tmp_path / "disk.vhd", writable=True) as disk:
        disk.write(0, content)
    disks = [DiskRequest(str(tmp_path / "disk.vhd"))]
    manager.create("draws", disks=disks, memory_bytes=96 << 20, accelerator="tcg", screen=True, firmware=firmware)
    save_night("draws", tmp_path / "repo")
    found = try_boot(str(tmp_path / "repo"), "draws", TrialWish(screen=True, seconds=40))
    assert found.seen == seen and "that its firmware does not show" in found.words
    assert trials() == [] and lease_count(tmp_path / "repo") == 0


def test_a_machine_without_a_screen(manager: Manager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A screen that is not there cannot be judged, which the report says."""
    vhdkit.create_image(tmp_path / "disk.vhd", 1 << 20)
    manager.create("blind", disks=[DiskRequest(str(tmp_path / "disk.vhd"))], memory_bytes=16 << 20, screen=False)
    save_night("blind", tmp_path / "repo")
    starts = []
    monkeypatch.setattr(Manager, "start", lambda self, name, progress=None: starts.append(name))
    monkeypatch.setattr(boot_trial, "watch", lambda manager, name, wish, shown: (None, f"screen: {wish.screen}"))
    found = try_boot(str(tmp_path / "repo"), "blind", TrialWish(screen=True))
    assert (found.words, starts) == ("screen: False, and it has no screen", ["blind"])


@pytest.mark.kvm
@pytest.mark.nightly
def test_a_killed_trial_is_ended_by_the_next(manager: Manager, tmp_path: Path) -> None:
    """After a kill the machine of the trial still runs; the next trial ends it and removes everything."""
    require_boot_sector_guest()
    make_machine(manager, tmp_path, options=BootOptions(print_every=2))
    save_night("small", tmp_path / "repo")
    program = f"""
from vmm.api.restoring.boot_trial import try_boot
from vmm.api.restoring.signs import TrialWish
try_boot({str(tmp_path / "repo")!r}, "small", TrialWish(expect="never"))
"""
    child = subprocess.Popen([sys.executable, "-c", program])
    try:
        wait_until(
            lambda: child.poll() is not None or any("tick" in _console(one) for one in _homes()), "the guest counts"
        )
        assert child.poll() is None
    finally:
        child.kill()
        child.wait()
    [home] = _homes()
    runtime = (home / "runtime-folder").read_text()
    assert Manager(home, runtime).state("small") is MachineState.RUNNING
    end_abandoned()
    assert trials() == []
    wait_until(lambda: pids_naming(Path(runtime)) == [], "its last processes end")


def _homes() -> list[Path]:
    folder = Path(paths.home()) / "trials"
    return list(folder.iterdir()) if folder.exists() else []


def _console(home: Path) -> str:
    try:
        return (home / "machines/small/console.log").read_text(errors="replace")
    except OSError:
        return ""


def test_the_trial_has_nothing_of_the_host(manager: Manager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Media, kernels, switches and rights that the definition names are left out; disks, ids and addresses stay."""
    iso = tmp_path / "installer.iso"
    iso.write_bytes(bytes(1 << 20))
    vhdkit.create_image(tmp_path / "web.vhd", 1 << 20)
    disks = [DiskRequest(str(tmp_path / "web.vhd")), DiskRequest(str(iso), kind="iso")]
    manager.create("web", disks=disks, memory_bytes=16 << 20)
    switches.create(make_switch(name="lan"))
    manager.add_adapter("web", switch="lan", spoofing=True, mirror="source")
    save_night("web", tmp_path / "repo")
    original = registry.load("web").spec
    made = []

    def started(self: Manager, name: str, progress: object = None) -> None:
        with self.folders.used():
            made.append(registry.load(name).spec)
            assert [one.type for one in map(switches.load, switches.names())] == ["private"]
        raise KeyboardInterrupt

    monkeypatch.setattr(Manager, "start", started)
    with pytest.raises(KeyboardInterrupt):
        try_boot(str(tmp_path / "repo"), "web")
    [trial] = made
    assert (trial.id, trial.name) == (original.id, original.name)
    disk, drive = trial.disks
    assert str(disk.path).startswith(f"{os.path.realpath(paths.home())}/trials/") and drive.path is None
    assert disk.serial == original.disks[0].serial
    assert trial.boot_order == ("disk",)
    [adapter] = trial.adapters
    assert (adapter.switch, adapter.spoofing, adapter.mirror) == ("trial", False, "none")
    assert adapter.mac == original.adapters[0].mac
    assert trials() == [] and switches.names() == ["lan"]
