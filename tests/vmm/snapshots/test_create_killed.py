# SPDX-License-Identifier: Apache-2.0
"""A snapshot of a machine all of whose processes were killed."""

from __future__ import annotations

from pathlib import Path

import pytest

import vhdkit
from tests.vmm.guests import boot_sector
from tests.vmm.small_guests import kill_together, make_machine, processes, wait_counting
from tests.waiting import wait_until
from vmm.api.manager import Manager
from vmm.store import registry


def is_locked(path: Path) -> bool:
    """True while a process holds the image; a dying one does so until the kernel has closed its files."""
    try:
        vhdkit.check(path)
    except vhdkit.ImageInUse:
        return True
    return False


@pytest.mark.parametrize("kind", ["vhd", "vhdx"])
def test_the_frozen_image_has_neither_a_log_nor_notes(manager: Manager, tmp_path: Path, kind: str) -> None:
    """The image under the new leaf is never written to again, so it is left with its log replayed, and it does not
    refer to notes that are gone with the machine's processes."""
    options = boot_sector.BootOptions(print_every=4, write_every=1)
    leaf = make_machine(manager, tmp_path, kind=kind, options=options)
    manager.start("small")
    wait_counting(manager)
    kill_together(processes().values())
    wait_until(lambda: not processes() and not is_locked(leaf), "all processes are dead, and their locks gone")
    assert "notes-unwritten" in [one.code for one in vhdkit.check(leaf)]
    manager.snapshots("small").create("one")
    assert not {one.code for one in vhdkit.check(leaf)} & {"notes-unwritten", "notes-left-out", "log-not-replayed"}
    [disk] = registry.load("small").spec.disks
    assert disk.path is not None and vhdkit.chain_paths(disk.path)[1] == str(leaf)
    manager.start("small")
    wait_counting(manager)
    manager.stop("small")
