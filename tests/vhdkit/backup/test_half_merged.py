# SPDX-License-Identifier: Apache-2.0
"""A prune that was killed, any number of times: nights that stay are judged rightly and restored, though nothing can
be written and so nothing finishes the prune."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import vhdkit
from tests.doc_commands import blocks
from tests.harness.killing import killed_at, killings
from tests.support import daily_or_nightly
from tests.vhdkit.backup.pruned import check, copy, left, make
from tests.vhdkit.backup.repositories import Nights
from vhdkit import errors
from vhdkit.backup import pruning
from vhdkit.backup.manifest import Manifest
from vhdkit.backup.pruning import finish
from vhdkit.backup.renewal import Renewal
from vhdkit.backup.repository import MachineFolder
from vhdkit.backup.restore import restore
from vhdkit.backup.verify import known_results, verify
from vhdkit.held_folder import HeldFolder


@pytest.fixture(scope="module", params=["vhd", pytest.param("vhdx", marks=pytest.mark.nightly)])
def original(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Nights:
    """A repository that no test changes."""
    return make(tmp_path_factory.mktemp("original") / "repo", request.param)


def dropped(nights: Nights, drop: tuple[int, ...]) -> None:
    """Drop these nights at once, as a prune does."""
    with nights.machine() as machine:
        pruning._changed(machine, "prune", lambda _nights, _leased: (set(drop), {}), dry_run=False, progress=None)


def finished(nights: Nights) -> None:
    """Finish what was interrupted."""
    with nights.machine() as machine, machine.held("prune"):
        finish(machine)


def read_only(patch: pytest.MonkeyPatch) -> None:
    """Let nothing in a repository be written."""

    def refused(*_: object, **__: object) -> None:
        raise errors.ReadOnly("is read-only")

    for name in ("new_file", "made_folder", "held_lock", "remove"):
        patch.setattr(HeldFolder, name, refused)


def check_as_it_is(nights: Nights, place: Path, about: object) -> None:
    """Every night is restored as it was, and nothing calls one damaged."""
    (block,) = [one for one in blocks("docs/backup.md") if one.language == "python"]
    done = subprocess.run(
        [sys.executable, "-I", "-c", block.text, nights.path], capture_output=True, text=True, check=False
    )
    assert not done.stderr and "DAMAGED" not in done.stdout, about
    assert done.returncode == ("is unfinished" in done.stdout), about
    with pytest.MonkeyPatch.context() as patch:
        read_only(patch)
        with nights.machine() as machine:
            found = [*verify(machine).nights, *known_results(machine, machine.nights())]
        assert not [one.problems for one in found if not one.is_whole], about
        for number in left(nights):
            for disk in ["a", "b"][: daily_or_nightly(1, 2)]:
                restore(nights.path, f"web@{number}", place, disks=[disk], kind="raw")
                assert place.read_bytes() == nights.content[number][disk], (number, disk, about)
                place.unlink()


@pytest.mark.parametrize(
    "drop",
    [(5,), *(pytest.param(one, marks=pytest.mark.nightly) for one in ((3,), (1, 2), (1, 2, 3, 4), (1, 3, 5), (6,)))],
    ids=str,
)
def test_a_prune_that_nothing_can_finish(original: Nights, tmp_path: Path, drop: tuple[int, ...]) -> None:
    """Killed before any change of a file, and once or more while it is finished, a prune leaves nights that are
    restored from a read-only copy as they were; the program of the docs and `verify` call none of them damaged."""
    work = copy(original, tmp_path / "repo")
    rng = random.Random(str(drop))
    for number in killings(lambda: dropped(work, drop), step=daily_or_nightly(41, 1)):
        kills = [number]
        while number > 0 and rng.random() < 0.5 and killed_at(rng.randrange(1, 70), lambda: finished(work)):
            kills.append(0)
        check_as_it_is(work, tmp_path / "new.raw", kills)
        finished(work)
        check(work, *left(work))
        copy(original, tmp_path / "repo")


@pytest.mark.parametrize("written", [1, *(pytest.param(one, marks=pytest.mark.nightly) for one in (0, 2, 3))])
def test_between_two_manifests(original: Nights, tmp_path: Path, written: int) -> None:
    """Wherever manifests are replaced one by one, in the first run and in the one that finishes it, each night that
    stays is found and restored; also if another program finishes the merge, without the manifests."""
    work = copy(original, tmp_path / "repo")
    real, write = Renewal._write_manifests, MachineFolder.write_manifest

    def stopped(renewal: Renewal, *args: object) -> None:
        left_to_write = [written]

        def some(machine: MachineFolder, manifest: Manifest, *, replace: bool = False) -> None:
            left_to_write[0] -= 1
            if left_to_write[0] < 0:
                raise KeyboardInterrupt
            write(machine, manifest, replace=replace)

        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(MachineFolder, "write_manifest", some)
            real(renewal, *args)  # type: ignore[arg-type]
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Renewal, "_write_manifests", stopped)
        works: list[Callable[[], None]] = [lambda: dropped(work, (5,)), lambda: finished(work)]
        for work_of in works:
            with pytest.raises(KeyboardInterrupt):
                work_of()
    check_as_it_is(work, tmp_path / "new.raw", written)
    vhdkit.resume_merge(next(work.path.rglob(f"a/00005.a{work.extension}")))
    check_as_it_is(work, tmp_path / "new.raw", written)
    finished(work)
    check(work, *left(work))
