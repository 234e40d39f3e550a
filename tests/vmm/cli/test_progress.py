# SPDX-License-Identifier: Apache-2.0
"""The line that shows progress."""

from __future__ import annotations

import pytest

from vmm.cli.common import format_size
from vmm.cli.progress import ProgressText

GIB = 1 << 30


def at(seconds: float, done: int, columns: int, *, total: int = 4 * GIB) -> str:
    """The text after so many seconds from the beginning."""
    now = [0.0]
    text = ProgressText(format_size, clock=lambda: now[0])
    text.text({"step": "copying images", "done": 0, "total": total}, columns)
    now[0] = seconds
    return text.text({"step": "copying images", "done": done, "total": total}, columns)


@pytest.mark.parametrize(
    ("columns", "text"),
    [
        (80, "copying images 25 %, 1.0 GiB of 4.0 GiB, 102.4 MiB/s, 0:30 left"),
        (50, "copying images 25 %, 102.4 MiB/s, 0:30 left"),
        (40, "copying images 25 %, 0:30 left"),
        (20, "copying images 25 %"),
        (10, "copyi 25 %"),
    ],
)
def test_bytes_rate_and_remaining_time(columns: int, text: str) -> None:
    """Bytes, rate and remaining time are shown; on a narrow terminal the least important is left out first."""
    assert at(10.0, GIB, columns) == text


def test_no_rate_before_it_is_meaningful() -> None:
    """In the first second no rate is shown, and without progress none at all."""
    assert at(0.5, GIB, 80) == "copying images 25 %, 1.0 GiB of 4.0 GiB"
    assert at(100.0, 0, 80) == "copying images 0 %, 0 B of 4.0 GiB"


def test_each_step_has_its_own_rate() -> None:
    """With the next step the rate begins again; a step without sizes is shown by its name."""
    now = [0.0]
    text = ProgressText(format_size, clock=lambda: now[0])
    text.text({"step": "one", "done": 0, "total": 4 * GIB}, 80)
    now[0] = 10.0
    assert text.text({"step": "two", "done": GIB, "total": 2 * GIB}, 80) == "two 50 %, 1.0 GiB of 2.0 GiB"
    assert text.text({"step": "closing the disks"}, 80) == "closing the disks"
    hours = ProgressText(format_size, clock=iter([0.0, 0.0, 3600.0]).__next__)
    hours.text({"step": "x", "done": 0, "total": 3 * GIB}, 80)
    assert hours.text({"step": "x", "done": GIB, "total": 3 * GIB}, 80).endswith("2:00:00 left")
