# SPDX-License-Identifier: Apache-2.0
"""VHDX images at a power cut: inside every write and every sync each sector holds its flushed content or newer."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.harness.power import PowerRun, Scene, vhdx_child_scene, vhdx_scene
from vhdkit.formats.vhdx.commit import Commit
from vhdkit.formats.vhdx.journal import Journal
from vhdkit.formats.vhdx.log import LogChange


@pytest.mark.parametrize("scene", [vhdx_scene, vhdx_child_scene], ids=["base", "child"])
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.nightly)])
def test_every_cut_leaves_flushed_or_newer(scene: Callable[[int], Scene], seed: int) -> None:
    """INV-FLUSHED-OR-NEWER, INV-LOG-WHOLE, INV-HEADER-PAIR: the file opens, and no flushed sector is lost."""
    run = PowerRun(scene(seed), seed, cuts=2, steps=14)
    run.run()
    assert run.operations > run.syncs > 3 and run.judged > run.operations


def empty_child_scene(seed: int) -> Scene:
    """A child that owns nothing, so its first flush makes a sector bitmap."""
    return vhdx_child_scene(seed, writes=0)


def small_ring(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limit log entries to one page, so that a flush has several and the ring is reused."""
    monkeypatch.setattr(Journal, "max_pages", property(lambda self: 1))


def test_flushes_of_several_entries_survive_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages that do not fit into one entry follow in an order in which every prefix is a sound image."""
    small_ring(monkeypatch)
    PowerRun(vhdx_child_scene(2), 2, cuts=2, steps=10).run()


def caught(scene: Callable[[int], Scene], *, known: int = 0) -> None:
    """At least one of a few workloads detects a wrong order, the first time it was the one with the seed `known`."""
    with pytest.raises(AssertionError):
        for seed in (known, *range(6)):
            PowerRun(scene(seed), seed, cuts=6, steps=16, second_cuts=False).run()


@pytest.mark.nightly
def test_a_header_that_names_its_log_too_early_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Self-test: detects an entry and the header that names its log becoming durable with one sync."""
    real = Journal._put_empty

    def unsynced(self: Journal, log_guid: bytes) -> None:
        guard, self._guard = self._guard, _NoSync()  # type: ignore[assignment]
        try:
            real(self, log_guid)
        finally:
            self._guard = guard

    monkeypatch.setattr(Journal, "_put_empty", unsynced)
    caught(vhdx_scene, known=1)


class _NoSync:
    """A guard whose sync does nothing."""

    def sync(self) -> None:
        """Pretend."""


@pytest.mark.nightly
def test_a_childs_data_and_entry_in_one_sync_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Self-test: detects bits that are durable before their data, and so hide the parent."""
    real = Commit._write

    def together(self: Commit, pages: list[LogChange]) -> None:
        self._has_parent = False
        real(self, pages)

    monkeypatch.setattr(Commit, "_write", together)
    caught(vhdx_child_scene)


def test_pages_in_their_places_before_the_log_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Self-test: detects a page that is written before its log entry is durable, and refers to lost data."""

    def at_once(self: Commit, pages: list[LogChange]) -> None:
        for one in pages:
            assert one.data is not None
            self._store.pwrite(one.file_offset_bytes, one.data)

    monkeypatch.setattr(Commit, "_write", at_once)
    caught(vhdx_child_scene)


def test_pages_of_the_bat_in_rising_order_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Self-test: detects a block that is partially present before its bitmap, with several log entries."""
    small_ring(monkeypatch)
    real = Commit._copied

    def rising(self: Commit, fresh: set[int]) -> list[LogChange]:
        return sorted(real(self, fresh), key=lambda one: one.file_offset_bytes)

    PowerRun(empty_child_scene(1), 1, cuts=2, steps=6, second_cuts=False).run()
    monkeypatch.setattr(Commit, "_copied", rising)
    caught(empty_child_scene)
