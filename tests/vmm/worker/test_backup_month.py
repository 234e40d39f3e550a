# SPDX-License-Identifier: Apache-2.0
"""A month of a machine whose guest writes all the time, while anything may be killed: every night is right."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import pytest

import vhdkit
from tests.support import require_boot_sector_guest, require_tool, run
from tests.vmm import nights
from tests.vmm.running_month import NAME, SECOND, RunningMonth
from vmm.api.manager import Manager
from vmm.store.state import MachineState

pytestmark = [pytest.mark.kvm, pytest.mark.nightly]


@pytest.mark.parametrize(("seed", "kind"), [(1, "vhd"), (2, "vhd"), (3, "vhdx"), (4, "vhd"), (5, "vhdx"), (6, "vhd")])
def test_every_night_of_a_machine_that_runs(manager: Manager, tmp_path: Path, seed: int, kind: str) -> None:
    """INV-NIGHT-WHOLE, INV-MARK-TRUE: after 30 nights in which the worker, the disk server, QEMU and the command died,
    alone and together, every kept night of both disks is what it was when it was frozen, read by our engine and by
    7-Zip; the guest has lost nothing, and its images are sound."""
    require_boot_sector_guest()
    program = require_tool("7zz")
    month = RunningMonth(manager, tmp_path, seed, kind)
    month.run(30)
    images = month.end()
    assert len(images) >= 2 and month.strikes > 5, month.said
    for number, (path, content) in enumerate(images):
        with vhdkit.open_disk(path) as disk:
            if len({layer.size_bytes for layer in disk.chain.layers}) > 1:
                continue  # 7-Zip expects of a parent that it is as large as its child
        place = tmp_path / f"out-{number}"
        run([program, "x", f"-o{place}", path])
        [found] = place.iterdir()
        assert sha256(found.read_bytes()).hexdigest() == content, (path, month.said)
        found.unlink()
    manager.forget_nights(NAME)
    manager.stop(NAME)
    assert manager.state(NAME) is MachineState.OFF
    shown = manager.show(NAME).spec
    assert shown is not None
    disks = {one.id: str(one.path) for one in shown.disks}
    assert nights.content_of(disks[SECOND]) == sha256(month.content).hexdigest()
    findings = [one for path in disks.values() for one in vhdkit.check(path)]
    assert [one for one in findings if one.severity is not vhdkit.Severity.NOTE] == []  # a disk that grew is noted
