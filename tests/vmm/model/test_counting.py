# SPDX-License-Identifier: Apache-2.0
"""The progress of copying, in bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vmm.model.counting import Counter


def test_bytes_add_up(tmp_path: Path) -> None:
    """Expected and copied bytes add up over all steps; missing files count as nothing."""
    reports: list[dict[str, Any]] = []
    now = [0.0]
    counter = Counter(reports.append, clock=lambda: now[0])
    (tmp_path / "a").write_bytes(bytes(8192))
    counter.expect_files([str(tmp_path / "a"), str(tmp_path / "absent")])
    expected = (tmp_path / "a").stat().st_blocks * 512
    counter.expect(1000)
    counter.begin("copying images")
    counter.did(expected)  # at once: the last report was just made
    now[0] = 5.0
    counter.did(600)
    counter.begin("copying memory")
    total = expected + 1000
    assert reports == [
        {"step": "copying images", "done": 0, "total": total},
        {"step": "copying images", "done": expected + 600, "total": total},
        {"step": "copying memory", "done": expected + 600, "total": total},
    ]


def test_the_share_never_exceeds_the_total() -> None:
    """A file that takes more space than expected raises the total: no share is above 100 %."""
    reports: list[dict[str, Any]] = []
    counter = Counter(reports.append, clock=iter([0.0, 1.0, 1.0, 2.0, 2.0]).__next__)
    counter.expect(10)
    counter.begin("copying")
    counter.did(25)
    assert reports[-1] == {"step": "copying", "done": 25, "total": 25}
