# SPDX-License-Identifier: Apache-2.0
"""The order of the tests: none is lost, each worker begins with long ones, and the table names files that exist."""

from __future__ import annotations

import pytest

from tests.scheduling import LONG_FILES, shared_out
from tests.support import ROOT


def test_the_table_names_files() -> None:
    """Each once, and each exists."""
    assert len(set(LONG_FILES)) == len(LONG_FILES)
    assert [path for path in LONG_FILES if not (ROOT / path).is_file()] == []


@pytest.mark.parametrize("workers", [1, 3, 4])
def test_every_part_begins_with_long_files(workers: int) -> None:
    """All items are there once; each worker's part begins with its share of the long files, each of them whole."""
    items = [(path, number) for path in ("tests/a.py", *reversed(LONG_FILES), "tests/b.py") for number in range(9)]
    items += [("tests/c.py", number) for number in range(500)]
    order = shared_out(items, lambda item: item[0], workers)
    assert sorted(order) == sorted(items)
    start = 0
    for worker in range(workers):
        size = (len(items) - start) // (workers - worker)
        wanted = [(path, number) for path in LONG_FILES[worker::workers] for number in range(9)]
        assert order[start : start + size][: len(wanted)] == wanted
        start += size


def test_a_few_tests_are_all_run() -> None:
    """Fewer items than workers, or long files only: all of them, once."""
    assert shared_out([], str, 4) == [] and shared_out(["tests/a.py"], str, 4) == ["tests/a.py"]
    assert sorted(shared_out(list(LONG_FILES), str, 4)) == sorted(LONG_FILES)
