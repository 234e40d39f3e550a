# SPDX-License-Identifier: Apache-2.0
"""Bringing a file to the content that a table describes: any content becomes right, only wrong ranges are copied."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.support import daily_or_nightly
from vhdkit.backup import sums
from vhdkit.backup.carrying import DataBefore, bring, changed_between
from vhdkit.backup.documents import DamagedRepository
from vhdkit.rate import RateLimit
from vhdkit.store import FileStore


def stored(path: Path, content: bytes) -> FileStore:
    """A file with this content, open for writing."""
    path.write_bytes(content)
    return FileStore.open(path, writable=True)


def table_of(store: FileStore, path: Path) -> FileStore:
    """The table of sums of a file."""
    table = stored(path, b"")
    sums.make_table(store, table)
    return table


def drawn(rng: random.Random, pages: int) -> bytes:
    """A file: pages with data and pages of zeros; the last one may end early."""
    return b"".join(rng.choice([bytes(4096), rng.randbytes(4096)]) for _ in range(pages)) + rng.randbytes(
        rng.choice([0, 512])
    )


def test_any_content_becomes_right(tmp_path: Path) -> None:
    """Whatever the file had, it has the content of the source afterwards; done again, nothing is copied."""
    rng = random.Random(5)
    for run in range(daily_or_nightly(20, 200)):
        content = drawn(rng, rng.randrange(1, 70))
        before = rng.choice([b"", drawn(rng, rng.randrange(70)), content[: rng.randrange(len(content))], content])
        with (
            stored(tmp_path / "source", content) as source,
            stored(tmp_path / "target", before) as target,
            table_of(source, tmp_path / "table") as table,
            table_of(target, tmp_path / "old") as old,
        ):
            changed = changed_between(old, table) if run % 2 else None
            copied = bring(source, target, table, changed)
            assert (tmp_path / "target").read_bytes() == content, run
            assert copied <= len(content) and (before != content or copied == 0)
            assert bring(source, target, table) == 0


def test_only_wrong_ranges_are_read(tmp_path: Path) -> None:
    """A source is read only where the sums differ, at the rate that is allowed."""
    rng = random.Random(6)
    content = bytearray(rng.randbytes(1 << 20))
    with stored(tmp_path / "source", bytes(content)) as source, table_of(source, tmp_path / "table") as table:
        content[70_000] ^= 1
        with stored(tmp_path / "target", bytes(content)) as target:
            taken: list[int] = []
            limit = RateLimit(1 << 40)
            limit.take = taken.append  # type: ignore[method-assign, assignment]
            assert bring(source, target, table, limit=limit) == sums.RANGE_BYTES
            assert taken == [sums.RANGE_BYTES]


def test_damage_is_not_carried_on(tmp_path: Path) -> None:
    """A source that differs from its table is refused with its name and place; so is a target that does not keep what
    is written."""
    content = random.Random(7).randbytes(200_000)
    with stored(tmp_path / "good", content) as good, table_of(good, tmp_path / "table") as table:
        with (
            stored(tmp_path / "source", content[:150_000] + bytes(1) + content[150_001:]) as source,
            stored(tmp_path / "target", b"") as target,
            pytest.raises(DamagedRepository, match=r"source.*its sums differ"),
        ):
            bring(source, target, table)
        with stored(tmp_path / "target", b"") as target:
            target.pwrite = lambda *_: None  # type: ignore[method-assign]
            with pytest.raises(DamagedRepository, match=r"target.*reads other bytes"):
                bring(good, target, table)


def test_what_work_has_read(tmp_path: Path) -> None:
    """Holes before an offset do not count as read, and an offset that was passed is not asked for again."""
    with stored(tmp_path / "file", b"") as store:
        store.truncate(1 << 20)
        store.pwrite(64 << 10, bytes([1]) * (64 << 10))
        store.pwrite(512 << 10, bytes([1]) * 4096)
        before = DataBefore(store)
        found = [before(offset << 10) for offset in (0, 32, 64, 96, 96, 512, 514, 1024, 100)]
        assert found == [offset << 10 for offset in (0, 0, 0, 32, 32, 64, 66, 68, 68)]
