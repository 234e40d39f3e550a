# SPDX-License-Identifier: Apache-2.0
"""A month of nights under whatever happens to disks: every night that is kept reads as the disks did."""

from __future__ import annotations

from pathlib import Path

import pytest

import vhdkit
from tests.support import require_tool, run
from tests.vhdkit.backup.month import Month


@pytest.mark.parametrize(
    ("seed", "days"), [(1, 6), *(pytest.param(seed, 30, marks=pytest.mark.nightly) for seed in range(10, 18))]
)
def test_every_kept_night_reads_as_it_was_recorded(seed: int, days: int, tmp_path: Path) -> None:
    """INV-NIGHT-WHOLE, INV-MARK-TRUE: after kills of backups, prunes, copies, restores and the server, every kept
    night of both disks equals what was recorded, read by our engine, by manifests and by names, and by 7-Zip."""
    program = require_tool("7zz")
    month = Month(tmp_path, seed)
    try:
        month.run(days)
        assert month.end() and month.kills, month.told
    finally:
        month.close()
    for number, (path, content) in enumerate(month.images()):
        with vhdkit.open_disk(path) as disk:
            assert disk.read(0, disk.size_bytes) == content, (path, month.told)
            if len({layer.size_bytes for layer in disk.chain.layers}) > 1:
                continue  # 7-Zip expects of a parent that it is as large as its child
        place = tmp_path / f"out-{number}"
        run([program, "x", f"-o{place}", path])
        [found] = place.iterdir()
        assert found.read_bytes() == content, (path, month.told)
