# SPDX-License-Identifier: Apache-2.0
"""Nights are written only into the repository that is known at its path."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vmm
from tests.vmm.cli.running import failure, good
from tests.vmm.snapshots.machines import Machines
from vhdkit import backups
from vmm.api import known_repositories
from vmm.model.errors import Refused
from vmm.store import registry
from vmm.store.snapshots.store import load_tree
from vmm.store.snapshots.tree import Tree, read_tree

manager = vmm.Manager()


def saved(machines: Machines, to: str = "repo", **wishes: Any) -> int:
    """The number of the next night of the machine."""
    return manager.save_night("web", str(machines.folder / to), vmm.BackupWishes(**wishes)).night


def refused(machines: Machines, to: str = "repo", **wishes: Any) -> str:
    """What is said when no night is written; the folder is as before."""
    folder = machines.folder / to
    before = sorted(folder.rglob("*")) if folder.exists() else None
    with pytest.raises(Refused) as caught:
        saved(machines, to, **wishes)
    assert (sorted(folder.rglob("*")) if folder.exists() else None) == before
    return str(caught.value)


def test_a_disk_that_is_not_mounted(machines: Machines) -> None:
    """INV-TARGET-KNOWN: where the machine has nights, neither a missing folder, nor an empty mount point, nor another
    repository gets one, also if no layer is kept any more. The message has the command that accepts what is there."""
    machines.create()
    repo, away, other = (machines.folder / name for name in ("repo", "away", "other"))
    assert saved(machines) == 1
    with backups.open_repository(repo) as repository:
        known = repository.id
    repo.rename(away)
    words = refused(machines)
    assert known in words and "the folder does not exist" in words and "is its disk mounted?" in words
    assert f"vmm backup run web {repo} --new-repository" in words
    repo.mkdir()
    assert "the folder is empty" in refused(machines)
    assert [one.name for one in manager.events("web")][-1] == "backup-failed"
    manager.forget_nights("web")
    machines.merge("web")
    assert "the folder is empty" in failure("backup", "run", "web", repo, code=6)
    repo.rmdir()
    backups.create_repository(other).close()
    other.rename(repo)
    assert "another repository is there" in refused(machines)
    assert saved(machines, "elsewhere") == 1, "at another path none is known"
    repo.rename(other)
    away.rename(repo)
    assert saved(machines) == 2


def test_repositories_that_take_turns(machines: Machines) -> None:
    """A second disk at the same path is accepted once, by the option; from then on either may be there, but not
    neither."""
    machines.create()
    repo, first, second = (machines.folder / name for name in ("repo", "first", "second"))
    assert saved(machines) == 1
    repo.rename(first)
    assert "web@1: " in good("backup", "run", "web", repo, "--new-repository")
    assert saved(machines) == 2
    repo.rename(second)
    first.rename(repo)
    assert saved(machines) == 2
    repo.rename(first)
    assert "the folder does not exist" in refused(machines)


def test_a_path_that_is_a_link(machines: Machines) -> None:
    """A repository is known by the path that was given, and by the one where that led: a link that leads to an empty
    folder now is no reason to make one there; one that leads to the repository in its new place is right."""
    machines.create()
    repo, moved, link = (machines.folder / name for name in ("repo", "moved", "link"))
    link.symlink_to(repo)
    assert saved(machines, "link") == 1
    repo.rename(moved)
    assert "the folder does not exist" in refused(machines) and "the folder does not exist" in refused(
        machines, "link"
    )
    (machines.folder / "empty").mkdir()
    link.unlink()
    link.symlink_to("empty")
    assert "the folder is empty" in refused(machines, "link")
    link.unlink()
    link.symlink_to(moved)
    assert saved(machines, "link") == 2 and saved(machines, "moved") == 3


def test_a_machine_from_before_the_record(machines: Machines) -> None:
    """Nights of a vmm that recorded no paths are known by the layers that are kept for them."""
    machines.create()
    assert saved(machines) == 1
    path = Path(registry.load("web").paths.folder) / "snapshots.json"
    tree = load_tree(registry.load("web").paths)
    tree.saved_in = {}
    path.write_bytes(tree.to_json())
    (machines.folder / "repo").rename(machines.folder / "away")
    assert "is its disk mounted?" in refused(machines)


STEPS = st.sampled_from(["run", "accept", "mount a", "mount b", "unmount", "forget"])


@settings(max_examples=40, deadline=None)
@given(st.lists(STEPS, max_size=12))
def test_any_order(tmp_path_factory: pytest.TempPathFactory, steps: list[str]) -> None:
    """INV-TARGET-KNOWN: whatever is mounted and accepted, a night goes into a repository only if none is known at its
    path, or this one, or if the user said so."""
    folder = tmp_path_factory.mktemp("known")
    for name in ("a", "b", "bare"):
        (folder / name).mkdir()
    path, mounted, known, ids = folder / "repo", "bare", set[str](), dict[str, str]()
    path.symlink_to("bare")
    tree = Tree()
    for step in steps:
        if step.startswith(("mount", "unmount")):
            mounted = step.rpartition(" ")[2] if step != "unmount" else "bare"
            path.unlink()
            path.symlink_to(mounted)
        elif step == "forget":
            tree.keep_only(lambda one: False)
        else:
            may = not known or ids.get(mounted) in known or step == "accept"
            at = tree.repositories_at([str(path)])
            assert at == known
            before = os.listdir(folder / mounted)
            try:
                opened = known_repositories.repository_for_night("web", str(path), at, accepts_new=step == "accept")
            except Refused:
                assert not may and os.listdir(folder / mounted) == before
                continue
            with opened:
                assert may and ids.setdefault(mounted, opened.id) == opened.id
                known.add(opened.id)
                tree.note_repository([str(path)], opened.id)
            tree = read_tree(tree.to_json(), "t")
