# SPDX-License-Identifier: Apache-2.0
"""Resumed merges: the leftovers of an earlier attempt are freed, and nothing else."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

import vhdkit
from tests.vhdkit.chain.verbs.test_merge import content, make_chain, write
from vhdkit import errors
from vhdkit.formats.vhd.dynamic import DynamicImage
from vhdkit.image import Piece


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("empty", [False, True])
def test_resuming_leaves_the_names_of_the_targets_parent(empty: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The space that is freed ends behind the locators, which a relinked image has behind its blocks, and one without
    blocks behind its table."""
    if empty:
        names = ["leaf.avhd", *make_chain(1)]
        names.insert(1, "middle.avhd")
        for child, parent in ((1, 2), (0, 1)):
            vhdkit.create_child(names[child], names[parent])
        write(names[0], 5)
    else:
        names = make_chain(3)
        os.rename(names[2], "moved.vhd")
        names[2] = "moved.vhd"
        vhdkit.rebase(names[1], names[2])
    before = content(names[0])

    def copy_in(self: DynamicImage, pieces: Sequence[Piece]) -> None:
        raise errors.IoFailed("stopped")  # before there is anything behind the names

    with monkeypatch.context() as patch, pytest.raises(errors.IoFailed):
        patch.setattr(DynamicImage, "copy_in", copy_in)
        vhdkit.merge(names[0])
    with monkeypatch.context() as patch, pytest.raises(errors.IoFailed):
        patch.setattr(DynamicImage, "copy_in", copy_in)
        vhdkit.resume_merge(names[1])
    assert content(names[0]) == before
    vhdkit.resume_merge(names[1])
    assert [one for one in vhdkit.check(names[1]) if one.severity >= vhdkit.Severity.WARNING] == []
    assert content(names[1]) == before


def test_the_record_of_a_stopped_merge_goes_with_its_target() -> None:
    """If the target of a stopped merge is itself merged further down, its record is removed with it."""
    names = make_chain(3)
    before = content(names[0])

    def stop(done: int, total: int) -> None:
        raise errors.Cancelled("enough")

    with pytest.raises(errors.Cancelled):
        vhdkit.merge(names[0], into=names[1], progress=stop)
    assert vhdkit.merge_under_way(names[1]) is not None
    vhdkit.merge(names[0], into=names[2])
    assert content(names[2]) == before
    assert os.listdir() == [names[2]]
