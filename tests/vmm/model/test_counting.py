# SPDX-License-Identifier: Apache-2.0
"""How far copying is, in bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vmm.model.counting import Counter


def test_bytes_add_up(tmp_path: Path) -> None:
    """What is expected and what was copied add up over all steps; files that are missing count for nothing."""
    told: list[dict[str, Any]] = []
    now = [0.0]
    counter = Counter(told.append, clock=lambda: now[0])
    (tmp_path / "a").write_bytes(bytes(8192))
    counter.expect_files([str(tmp_path / "a"), str(tmp_path / "absent")])
    expected = (tmp_path / "a").stat().st_blocks * 512
    counter.expect(1000)
    counter.begin("copying images")
    counter.did(expected)  # at once: it was told just now
    now[0] = 5.0
    counter.did(600)
    counter.begin("copying memory")
    total = expected + 1000
    assert told == [
        {"step": "copying images", "done": 0, "total": total},
        {"step": "copying images", "done": expected + 600, "total": total},
        {"step": "copying memory", "done": expected + 600, "total": total},
    ]


def test_never_more_than_all() -> None:
    """A file that takes up more than it was expected to raises the total: no share is above 100 %."""
    told: list[dict[str, Any]] = []
    counter = Counter(told.append, clock=iter([0.0, 1.0, 1.0, 2.0, 2.0]).__next__)
    counter.expect(10)
    counter.begin("copying")
    counter.did(25)
    assert told[-1] == {"step": "copying", "done": 25, "total": 25}
