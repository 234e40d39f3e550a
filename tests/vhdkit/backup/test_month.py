# SPDX-License-Identifier: Apache-2.0
"""A month of nights under whatever happens to disks: every night that is kept reads as the disks did."""

from __future__ import annotations

from pathlib import Path

import pytest

import vhdkit
from tests.support import require_tool, run
from tests.vhdkit.backup.month import Month


@pytest.mark.parametrize(
    ("end", "seed", "days"),
    [
        ("killed", 1, 6),
        ("power cut", 6, 3),
        *(
            pytest.param(end, seed, 30, marks=pytest.mark.nightly)
            for end in ("killed", "power cut")
            for seed in range(10, 18)
        ),
    ],
)
def test_every_kept_night_reads_as_it_was_recorded(end: str, seed: int, days: int, tmp_path: Path) -> None:
    """INV-NIGHT-WHOLE, INV-MARK-TRUE: after kills of backups, prunes, copies, restores and the server, or power cuts
    in them, every kept night of both disks equals what was recorded, read by our engine, by manifests and by names,
    and by 7-Zip."""
    program = require_tool("7zz")
    month = Month(tmp_path, seed, power_fails=end == "power cut")
    try:
        month.run(days)
        assert month.end() and (month.cuts if month.power_fails else month.kills), month.told
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
