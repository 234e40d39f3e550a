# SPDX-License-Identifier: Apache-2.0
"""Copies of repositories: the copy has every night, whole, whatever happens; and no night is lost on either side."""

from __future__ import annotations

import os
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests.harness.folder_power import Cut, FolderPower, fill, repeatable
from tests.harness.killing import killings
from tests.support import daily_or_nightly
from tests.vhdkit.backup.pruned import check, copy, left, make
from tests.vhdkit.backup.repositories import MACHINE, Nights
from vhdkit import errors
from vhdkit.backup import pruning
from vhdkit.backup.copying import Copied, copy_repository, promote_copy
from vhdkit.backup.documents import DamagedRepository
from vhdkit.backup.leases import leased, leases
from vhdkit.backup.repository import open_repository
from vhdkit.backup.verify import verify
from vhdkit.unfinished import is_part
from vhdkit.units import KIB


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Nights]:
    """Repositories that no test changes."""
    folder = tmp_path_factory.mktemp("originals")
    return {extension: make(folder / extension, extension) for extension in ("vhd", "vhdx")}


@pytest.fixture
def nights(originals: dict[str, Nights], tmp_path: Path) -> Nights:
    """A repository of VHDs."""
    return own(copy(originals["vhd"], tmp_path / "repo"))


def own(nights: Nights) -> Nights:
    """The same repository, with a record of its content that no other one shares."""
    return Nights(nights.path, nights.extension, {number: dict(disks) for number, disks in nights.content.items()})


def copied(nights: Nights, other: Path) -> Copied:
    """Copy; everything that could be copied was."""
    done = copy_repository(nights.path, other)
    assert not done.only_there and not [one for machine in done.machines for one in machine.problems], done
    return done


def seen(nights: Nights, other: Path) -> Nights:
    """The copy, with the content that its nights must have."""
    return Nights(other, nights.extension, nights.content)


def files_of(folder: Path) -> dict[str, bytes]:
    """The machine's part of a repository: everything that a copy must have, byte for byte."""
    found = {}
    for path in sorted((folder / "machines").rglob("*")):
        if path.is_file() and path.name not in ("lock", "verify.json", "machine.json") and not is_part(path.name):
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found


def dropped(nights: Nights, *numbers: int) -> None:
    """Drop these nights at once, as a prune does."""
    with nights.machine() as machine:
        pruning._changed(machine, "prune", lambda _nights, _leased: (set(numbers), {}), dry_run=False, progress=None)


@pytest.mark.parametrize("extension", ["vhd", pytest.param("vhdx", marks=pytest.mark.nightly)])
def test_a_copy_has_everything(originals: dict[str, Nights], tmp_path: Path, extension: str) -> None:
    """A first copy has every night, byte for byte, is as sparse, and a second run finds nothing to do."""
    nights = own(copy(originals[extension], tmp_path / "repo"))
    with nights.machine() as machine, leased(machine.repository.root, MACHINE, 2, "a test"):
        done = copied(nights, tmp_path / "other")
    assert done.machines[0].added == [1, 2, 3, 4, 5, 6, 7] and not done.machines[0].changed
    check(seen(nights, tmp_path / "other"), 1, 2, 3, 4, 5, 6, 7)
    assert files_of(nights.path) == files_of(tmp_path / "other")
    with open_repository(tmp_path / "other") as other:
        assert leases(other.root) == []
    sizes = [
        sum(one.stat().st_blocks for one in folder.rglob("*.*vhd*")) for folder in (nights.path, tmp_path / "other")
    ]
    assert sizes[1] <= sizes[0]
    [again] = copied(nights, tmp_path / "other").machines
    assert (again.added, again.changed, again.dropped, again.copied_bytes) == ([], [], [], 0)


@pytest.mark.parametrize(
    ("extension", "drop"),
    [
        ("vhd", (1, 2, 4)),
        pytest.param("vhdx", (1, 3, 7), marks=pytest.mark.nightly),
        *(
            pytest.param(extension, drop, marks=pytest.mark.nightly)
            for extension in ("vhd", "vhdx")
            for drop in ((1,), (7,), (2, 4, 6), (5,), (1, 2, 3, 4, 5, 6))
        ),
    ],
    ids=str,
)
def test_a_prune_is_repeated(
    originals: dict[str, Nights], tmp_path: Path, extension: str, drop: tuple[int, ...]
) -> None:
    """What a prune did to the source is done to the copy, which is then equal byte for byte; of rewritten images only
    what changed is copied."""
    nights = own(copy(originals[extension], tmp_path / "repo"))
    copied(nights, tmp_path / "other")
    dropped(nights, *drop)
    nights.add({"a": {4096: b"new"}, "b": {}})
    [done] = copied(nights, tmp_path / "other").machines
    kept = [number for number in range(1, 8) if number not in drop]
    assert done.dropped == list(drop) and done.added == [8]
    nights.path.joinpath("machines", MACHINE, "meta/00008").mkdir()  # as `check` wants it
    tmp_path.joinpath("other/machines", MACHINE, "meta/00008").mkdir()
    check(seen(nights, tmp_path / "other"), *kept, 8)
    assert files_of(nights.path) == files_of(tmp_path / "other")


def test_only_what_changed_is_copied(tmp_path: Path) -> None:
    """A prune that merges a small night into a large image costs the copy what the small one changed."""
    nights = Nights(tmp_path / "repo")
    nights.add({"a": {0: random.Random(1).randbytes(4096 * KIB)}})
    nights.add({"a": {512 * KIB: b"small"}})
    copied(nights, tmp_path / "other")
    dropped(nights, 1)
    [done] = copied(nights, tmp_path / "other").machines
    assert done.changed == [2] and 0 < done.copied_bytes <= 512 * KIB
    seen(nights, tmp_path / "other").check(2)


def test_other_facts_follow(nights: Nights, tmp_path: Path) -> None:
    """The protection of a night and the name of a machine follow; marks and leases do not."""
    copied(nights, tmp_path / "other")
    with nights.machine() as machine, machine.held("a test"):
        found = machine.night(2)
        assert found is not None and found.manifest is not None
        machine.write_manifest(replace(found.manifest, protected=True), replace=True)
        machine.record(name="web2", last_night=9)
    nights.image(3, "a").with_name(".00003.avhd.vhdkit-nights").write_text("a mark")
    [done] = copied(nights, tmp_path / "other").machines
    assert done.changed == [2] and done.copied_bytes == 0 and done.name == "web2"
    with seen(nights, tmp_path / "other").machine() as machine:
        found = machine.night(2)
        assert found is not None and found.manifest is not None and found.manifest.protected
        assert (machine.name, machine.last_night) == ("web2", 9)
    assert not list((tmp_path / "other").rglob("*vhdkit-nights"))


def test_only_copying_changes_a_copy(nights: Nights, tmp_path: Path) -> None:
    """Backups, prunes and deletions in a copy are refused until it is promoted; then it is a repository of its own, to
    which nothing is copied."""
    copied(nights, tmp_path / "other")
    other = seen(nights, tmp_path / "other")
    for act in (lambda: other.add({"a": {0: b"x"}}), lambda: dropped(other, 3)):
        with pytest.raises(errors.InvalidArgument, match="is a copy of another repository"):
            act()
    check(other, 1, 2, 3, 4, 5, 6, 7)
    (tmp_path / f"other/machines/{MACHINE}/images/a/00004.avhd.tmp").touch()
    half = tmp_path / f"other/machines/{MACHINE}/images/a/00009.avhd"
    half.write_bytes(b"half")
    promote_copy(tmp_path / "other")
    assert not half.exists()
    (tmp_path / f"other/machines/{MACHINE}/images/a/00004.avhd.tmp").unlink()
    with pytest.raises(errors.InvalidArgument, match="is not a copy"):
        promote_copy(tmp_path / "other")
    dropped(other, 3)
    assert other.add({"a": {0: b"x"}}) == 8
    with pytest.raises(errors.InvalidArgument, match="did not make it"):
        copy_repository(nights.path, tmp_path / "other")
    other.check(8, 2)


def test_two_originals_are_found(nights: Nights, tmp_path: Path) -> None:
    """Case 14: of a repository that was copied with `cp -a`, and of which both are used on, neither takes the other
    for a copy; and a copy of one refuses the other's nights."""
    shutil.copytree(nights.path, tmp_path / "twin")
    twin = own(Nights(tmp_path / "twin", content=nights.content))
    nights.add({"a": {0: b"ours"}}, id="a" * 32)
    twin.add({"a": {0: b"theirs"}}, id="b" * 32)
    for one, two in ((nights, twin), (twin, nights)):
        with pytest.raises(errors.InvalidArgument, match="did not make it"):
            copy_repository(one.path, two.path)
    copied(nights, tmp_path / "other")
    with pytest.raises(errors.InvalidArgument, match="night 8 is another one"):
        copy_repository(twin.path, tmp_path / "other")
    seen(nights, tmp_path / "other").check(8)


def test_a_source_that_was_put_back(nights: Nights, tmp_path: Path) -> None:
    """INV-COPY-KEEPS, case 29: a copy that is newer than the source is refused, also when the source has used the
    numbers again and has dropped those nights: what only the copy has is not removed."""
    other = tmp_path / "other"
    copied(nights, other)
    old = own(copy(nights, tmp_path / "old"))
    nights.add({"a": {0: b"8"}}, id="8" * 32)
    copied(nights, other)
    with pytest.raises(errors.InvalidArgument, match="the source is older than the copy"):
        copy_repository(old.path, other)
    old.add({"a": {0: b"other 8"}}, id="9" * 32)
    old.add({"a": {0: b"other 9"}}, id="c" * 32)
    with pytest.raises(errors.InvalidArgument, match="is another one"):
        copy_repository(old.path, other)
    dropped(old, 8)
    with pytest.raises(errors.InvalidArgument, match="has night 8, and the source does not"):
        copy_repository(old.path, other)
    seen(nights, other).check(8)


def test_an_older_copy(nights: Nights, tmp_path: Path) -> None:
    """Case 29: a copy that was put back to an older state, or was copied with `cp -a`, is brought up to date."""
    copied(nights, tmp_path / "other")
    shutil.copytree(tmp_path / "other", tmp_path / "older")
    nights.add({"a": {0: b"8"}, "b": {}}, files={"nvram": b"n"})
    copied(nights, tmp_path / "other")
    dropped(nights, 1, 2, 3)
    copied(nights, tmp_path / "older")
    check(seen(nights, tmp_path / "older"), 4, 5, 6, 7, 8)
    assert files_of(tmp_path / "older") == files_of(nights.path)


def test_foreign_folders_are_refused(nights: Nights, tmp_path: Path) -> None:
    """Case 29: another repository, a folder with something in it, and the repository itself are no copies."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full/photo.jpg").touch()
    foreign = Nights(tmp_path / "foreign")
    (tmp_path / "link").symlink_to("repo")
    for name, problem in (
        ("full", "neither a repository nor an empty folder"),
        ("foreign", "is another repository"),
        ("repo", "is the repository that is to be copied"),
        ("link", "is the repository that is to be copied"),
    ):
        with pytest.raises(errors.InvalidArgument, match=problem):
            copy_repository(nights.path, tmp_path / name)
    assert os.listdir(tmp_path / "full") == ["photo.jpg"] and not (foreign.path / "machines").exists()
    (tmp_path / "disk/lost+found").mkdir(parents=True)
    copied(nights, tmp_path / "disk")


def test_copies_of_copies(nights: Nights, tmp_path: Path) -> None:
    """A copy can be copied on, and a night that is being read there is not changed meanwhile."""
    copied(nights, tmp_path / "other")
    copied(seen(nights, tmp_path / "other"), tmp_path / "third")
    dropped(nights, 1, 2)
    with open_repository(tmp_path / "other") as other, leased(other.root, MACHINE, 3, "a restore"):
        [done] = copy_repository(nights.path, tmp_path / "other").machines
        assert isinstance(done.problems[0], errors.ImageInUse) and "read by a restore" in str(done.problems[0])
        seen(nights, tmp_path / "other").check(1, 2, 3, 4, 5, 6, 7)
    copied(nights, tmp_path / "other")
    copied(seen(nights, tmp_path / "other"), tmp_path / "third")
    check(seen(nights, tmp_path / "third"), 3, 4, 5, 6, 7)


def test_a_damaged_source(nights: Nights, tmp_path: Path) -> None:
    """A night whose image is damaged is not copied, and reported; the others are. The copy keeps what it had."""
    path = nights.image(4, "a")
    raw = path.read_bytes()
    path.write_bytes(raw[:-512])
    [done] = copy_repository(nights.path, tmp_path / "other").machines
    assert len(done.problems) >= 1 and all(isinstance(one, DamagedRepository) for one in done.problems)
    assert 4 not in left(seen(nights, tmp_path / "other"))
    seen(nights, tmp_path / "other").check(1, 2, 3, 5)
    path.write_bytes(raw[:-600] + b"X" + raw[-599:])
    done = copy_repository(nights.path, tmp_path / "other").machines[0]
    assert any("its sums differ" in str(one) for one in done.problems)
    path.write_bytes(raw)
    manifest = nights.path / f"machines/{MACHINE}/nights/00003.json"
    kept = manifest.read_bytes()
    manifest.write_bytes(b"{}")
    done = copy_repository(nights.path, tmp_path / "other").machines[0]
    assert "00003.json" in str(done.problems[0])
    seen(nights, tmp_path / "other").check(1, 2, 3, 5)
    manifest.write_bytes(kept)
    copied(nights, tmp_path / "other")
    check(seen(nights, tmp_path / "other"), 1, 2, 3, 4, 5, 6, 7)


def test_a_damaged_copy_is_mended(nights: Nights, tmp_path: Path) -> None:
    """Images of the copy that are missing, cut short, or were found damaged get their content again."""
    copied(nights, tmp_path / "other")
    other = seen(nights, tmp_path / "other")
    missing, short, wrong = other.image(1, "b"), other.image(3, "a"), other.image(1, "a")
    missing.unlink()
    os.truncate(short, 1000)
    raw = bytearray(wrong.read_bytes())
    raw[len(raw) // 2] ^= 255
    wrong.write_bytes(raw)
    with other.machine() as machine:
        assert not verify(machine).is_good
    [done] = copied(nights, tmp_path / "other").machines
    assert len(done.mended) == 3 and done.added == [] and done.changed == []
    check(other, 1, 2, 3, 4, 5, 6, 7)
    [again] = copied(nights, tmp_path / "other").machines
    assert again.mended == []


def test_all_nights_of_a_machine(nights: Nights, tmp_path: Path) -> None:
    """If the source has no night of a machine left, the copy keeps its own."""
    copied(nights, tmp_path / "other")
    for path in (nights.path / f"machines/{MACHINE}/nights").iterdir():
        path.unlink()
    with nights.machine() as machine, machine.held("a test"):
        machine.record(last_night=9)
    with pytest.raises(errors.InvalidArgument, match="the source has none that can be read"):
        copy_repository(nights.path, tmp_path / "other")
    check(seen(nights, tmp_path / "other"), 1, 2, 3, 4, 5, 6, 7)


def after_interruption(nights: Nights, other: Path, had: set[int]) -> None:
    """Each night that the copy has reads as it must, unless images are being replaced; the next run makes it whole."""
    machine = other / "machines" / MACHINE
    if (machine / "machine.json").exists() and not (machine / "switch.json").exists():
        found = left(seen(nights, other))
        seen(nights, other).check(*found)
        assert had <= set(found)
    copied(nights, other)
    check(seen(nights, other), *left(nights))
    assert files_of(other) == files_of(nights.path)


def small(folder: Path, extension: str, *, pruned: bool) -> tuple[Nights, Nights]:
    """A repository that has gone on since its copy was made: a night more, and with `pruned` two less."""
    nights = make(folder / "repo", extension, 4)
    copied(nights, folder / "other")
    if pruned:
        dropped(nights, 1, 3)
    nights.add({"a": {0: b"late"}, "b": {4096: b"late"}}, files={"nvram": b"late"})
    return nights, seen(nights, folder / "other")


@pytest.mark.parametrize(
    ("extension", "pruned"),
    [("vhd", True), *(pytest.param(*one, marks=pytest.mark.nightly) for one in (("vhd", False), ("vhdx", True)))],
    ids=str,
)
def test_a_killed_copy_goes_on(tmp_path: Path, extension: str, *, pruned: bool) -> None:
    """INV-COPY-KEEPS: killed before any change of a file, a copy has whole nights alone, and the next run ends as if
    it was not."""
    nights, other = small(tmp_path, extension, pruned=pruned)
    shutil.copytree(other.path, tmp_path / "before")
    had = set(left(other)) & set(left(nights))
    for _ in killings(lambda: copied(nights, other.path), step=daily_or_nightly(61, 3)):
        after_interruption(nights, other.path, had)
        shutil.rmtree(other.path)
        shutil.copytree(tmp_path / "before", other.path)


@pytest.mark.parametrize(
    ("extension", "pruned"),
    [("vhd", True), *(pytest.param(*one, marks=pytest.mark.nightly) for one in (("vhd", False), ("vhdx", True)))],
    ids=str,
)
def test_a_power_cut_in_a_copy(tmp_path: Path, extension: str, *, pruned: bool) -> None:
    """INV-COPY-KEEPS: wherever the power is cut, the copy has whole nights alone, and the next run makes it whole."""
    with repeatable("made"):
        nights, other = small(tmp_path, extension, pruned=pruned)
    had = set(left(other)) & set(left(nights))
    found = tmp_path / "found"

    def judge(cut: Cut) -> None:
        fill(found, cut.files)
        after_interruption(nights, found, had)

    with repeatable("run"):
        every = daily_or_nightly(89, 5)
        FolderPower(other.path, "run", judge=judge, every=every).run(lambda: copied(nights, other.path))
    check(other, *left(nights))


def test_a_killed_first_copy(originals: dict[str, Nights], tmp_path: Path) -> None:
    """A first copy that is killed is never a repository of its own, and goes on with what it has."""
    nights, other = originals["vhd"], tmp_path / "other"
    for number in killings(lambda: copied(nights, other), step=daily_or_nightly(211, 7)):
        assert number < 0 or not (other / "repository.json").exists() or (other / "copy.json").exists()
        after_interruption(nights, other, set())
        shutil.rmtree(other)


def test_readers_finish_a_switch(tmp_path: Path) -> None:
    """A switch that was interrupted is finished without the source, by what reads the copy next."""
    nights, other = small(tmp_path, "vhd", pruned=True)
    shutil.copytree(other.path, tmp_path / "before")
    seen_journal = False
    for _ in killings(lambda: copied(nights, other.path), step=29):
        if (other.path / f"machines/{MACHINE}/switch.json").exists():
            seen_journal = True
            with other.machine() as machine:
                with pytest.raises(errors.ImageInUse, match="was interrupted"), machine.reading(2, "a restore"):
                    raise AssertionError
                pruning.finish_interrupted(machine)
                assert verify(machine, again=True).is_good
            other.check(*left(other))
            assert set(left(other)) == {2, 4}
            if daily_or_nightly(True, False):
                break
        shutil.rmtree(other.path)
        shutil.copytree(tmp_path / "before", other.path)
    assert seen_journal


def test_a_night_that_was_dropped_after_a_kill(tmp_path: Path) -> None:
    """What a killed copy has brought of a night that the source has dropped since then is removed by the next run."""
    nights, other = small(tmp_path, "vhd", pruned=False)
    shutil.copytree(other.path, tmp_path / "before")
    for _ in killings(lambda: copied(nights, other.path), step=17):
        found = {path.name for path in other.path.rglob("00005*")}
        if {"00005.avhd", "00005"} <= found and 5 not in left(other):
            break
        shutil.rmtree(other.path)
        shutil.copytree(tmp_path / "before", other.path)
    dropped(nights, 5)
    copied(nights, other.path)
    check(other, 1, 2, 3, 4)


def test_damage_in_an_image_that_changes(nights: Nights, tmp_path: Path) -> None:
    """An image of the copy that was found damaged, and which a prune has rewritten in the source, is mended, too."""
    copied(nights, tmp_path / "other")
    other = seen(nights, tmp_path / "other")
    raw = bytearray(other.image(1, "a").read_bytes())
    raw[len(raw) // 3] ^= 255
    other.image(1, "a").write_bytes(raw)
    with other.machine() as machine:
        assert not verify(machine).is_good
    dropped(nights, 1)
    [done] = copied(nights, other.path).machines
    assert done.mended == ["images/a/00001.vhd"] and done.dropped == [1]
    with other.machine() as machine:
        assert verify(machine, again=True).is_good
