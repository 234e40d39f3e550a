# SPDX-License-Identifier: Apache-2.0
"""A repository is opened only if it is a known one, so that an empty mount point gets none."""

from __future__ import annotations

from pathlib import Path

import pytest

from vhdkit import backups, errors

OTHERS = frozenset("abcdef0123")


def made(path: Path) -> str:
    """The id of a new repository."""
    with backups.create_repository(path) as repository:
        return repository.id


def refused(path: Path, *ids: str) -> str:
    """What is said when none of these is there; the folder is as before."""
    before = sorted(path.rglob("*")) if path.exists() else None
    with pytest.raises(backups.UnexpectedRepository) as caught:
        backups.open_known(path, ids)
    assert (sorted(path.rglob("*")) if path.exists() else None) == before
    assert caught.value.path == str(path)
    return caught.value.problem


def test_only_a_known_repository_is_opened(tmp_path: Path) -> None:
    """INV-TARGET-KNOWN: one of several known ones opens; in an empty mount point, and in one that has other files or
    another repository, nothing is made, and the message says what was expected and what is there."""
    ours, other = made(tmp_path / "ours"), made(tmp_path / "other")
    for ids in ((ours,), (ours, other)):
        with backups.open_known(tmp_path / "ours", ids) as repository:
            assert repository.id == ours
    assert f"the repository {ours}, " in refused(tmp_path / "gone", ours)
    (tmp_path / "empty" / "lost+found").mkdir(parents=True)
    words = refused(tmp_path / "empty", ours)
    assert "the folder is empty" in words and words.endswith("is its disk mounted?")
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "x").touch()
    assert "the folder has no repository" in refused(tmp_path / "files", ours)
    assert f"another repository is there, with the id {other}" in refused(tmp_path / "other", ours)
    assert "or another known one, in which" in refused(tmp_path / "other", ours, *OTHERS)


def test_what_is_wrong_with_the_folder_itself_is_said(tmp_path: Path) -> None:
    """A file in the folder's place, and a damaged repository, are what they are, and not an unmounted disk."""
    ours = made(tmp_path / "ours")
    (tmp_path / "ours" / "repository.json").write_text("{}")
    with pytest.raises(backups.DamagedRepository):
        backups.open_known(tmp_path / "ours", (ours,))
    (tmp_path / "file").touch()
    with pytest.raises(errors.VhdkitError, match="file"):
        backups.open_known(tmp_path / "file", (ours,))
