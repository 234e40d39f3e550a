# SPDX-License-Identifier: Apache-2.0
"""Disks alone in a repository: which image is saved, what it is called, what becomes of frozen layers."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import vhdkit
from tests.harness.folder_power import files_of
from tests.harness.killing import killings
from tests.support import daily_or_nightly
from tests.waiting import wait_until
from vhdkit import errors
from vhdkit.backup import single
from vhdkit.backup.manifest import How
from vhdkit.backup.night import Wishes, Writing
from vhdkit.backup.repository import Repository
from vhdkit.backup.restore import restore
from vhdkit.backup.single import SavedDisk, SingleWishes, backup_image
from vhdkit.chain.records import references
from vhdkit.chain.verbs.newest import newest_leaf
from vhdkit.rate import RateLimit
from vhdkit.units import KIB, MIB

SIZE = 4 * MIB
KEEP = SingleWishes(keep_reference=True)


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def make(path: str = "web.vhd") -> None:
    """An image with some data."""
    vhdkit.create_image(path, SIZE, block_size_bytes=512 * KIB)
    write(path, 0)


def write(path: str, offset: int) -> bytes:
    """Write some bytes; what the image reads then."""
    with vhdkit.open_disk(path, writable=True) as disk:
        disk.write(offset, random.Random(f"{path} {offset}").randbytes(9000))
    return content(path)


def content(path: str) -> bytes:
    """What an image reads."""
    with vhdkit.open_disk(path) as disk:
        return disk.read(0, disk.size_bytes)


def restored(word: str) -> bytes:
    """What a night reads when it is restored."""
    if os.path.exists("restored.vhd"):
        os.unlink("restored.vhd")
    restore("repo", word, "restored.vhd")
    return content("restored.vhd")


def how(saved: SavedDisk) -> How:
    """How the disk was saved."""
    return saved.manifest.disks[0].how


def test_without_a_reference_the_image_keeps_its_name() -> None:
    """The image is saved as it is, compared each night, and nothing lies beside it."""
    make()
    expected = {1: content("web.vhd")}
    assert how(backup_image("web.vhd", "repo")) is How.FULL
    expected[2] = write("web.vhd", MIB)
    assert how(backup_image("web.vhd", "repo")) is How.COMPARED
    assert how(backup_image("web.vhd", "repo")) is How.SAME
    assert sorted(one for one in os.listdir() if one != "repo") == ["web.vhd"]
    assert {number: restored(f"web@{number}") for number in expected} == expected
    assert restored("web") == expected[2]


def test_with_a_reference_the_chain_stays_short() -> None:
    """Each night freezes the newest image, saves what it owns, and merges what the last night froze."""
    make()
    expected, leaf = {}, "web.vhd"
    for number in range(1, 5):
        expected[number] = write(leaf, number * 700 * KIB)
        saved = backup_image("web.vhd", "repo", KEEP)
        assert how(saved) is (How.FULL if number == 1 else How.LAYERS)
        assert len(vhdkit.chain_paths(saved.leaf)) == 2 and content("web.vhd") == expected[number]
        leaf = saved.leaf
        assert saved.merged_into == (None if number == 1 else os.path.abspath("web.vhd"))
    assert {number: restored(f"web@{number}") for number in expected} == expected


def test_the_old_name_of_a_kept_image_leads_to_the_newest() -> None:
    """A reader of the old name does not get last night's state from a backup: its newest descendant is saved."""
    make()
    saved = backup_image("web.vhd", "repo", KEEP)
    now = write(saved.leaf, MIB)
    backup_image("web.vhd", "repo")
    assert restored("web") == now != content("web.vhd")


def test_a_parent_is_not_taken_for_the_disk() -> None:
    """An image that has children without a backup's mark is refused, unless it is wanted as it is."""
    make()
    base = content("web.vhd")
    vhdkit.create_child("clone.avhd", "web.vhd")
    write("clone.avhd", MIB)
    with pytest.raises(errors.HasChildren, match=r"clone\.avhd"):
        backup_image("web.vhd", "repo")
    backup_image("web.vhd", "repo", as_it_is=True)
    assert restored("web") == base


def test_layers_that_a_user_froze_stay() -> None:
    """A snapshot between two nights is saved, and neither merged nor changed; later nights stay short above it."""
    make()
    backup_image("web.vhd", "repo", KEEP)
    user = "web.avhd"
    frozen = write(user, MIB)
    leaf = vhdkit.snapshot(user)
    for number in range(3):
        write(leaf, number * 600 * KIB)
        saved = backup_image("web.vhd", "repo", KEEP)
        leaf = saved.leaf
        assert how(saved) is How.LAYERS and restored("web") == content(leaf)
    assert content(user) == frozen and len(vhdkit.chain_paths(leaf)) == 4


def test_after_a_failure_the_disk_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """A night that fails leaves the chain as it was, and the next one saves everything since the last."""
    make()
    saved = backup_image("web.vhd", "repo", KEEP)
    now = write(saved.leaf, MIB)
    before = sorted(os.listdir())

    def fail(night: Writing, *args: object, **options: object) -> None:
        raise errors.NoSpace("the disk is full")

    with monkeypatch.context() as context:
        context.setattr(Writing, "save", fail)
        with pytest.raises(errors.NoSpace):
            backup_image("web.vhd", "repo", KEEP)
    assert sorted(os.listdir()) == before and content(saved.leaf) == now
    again = backup_image("web.vhd", "repo", KEEP)
    assert how(again) is How.LAYERS and restored("web") == now


def test_a_kill_between_freezing_and_the_night(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that a dead backup froze is saved with the next night, and merged with it."""
    make()
    backup_image("web.vhd", "repo", KEEP)
    write("web.avhd", MIB)

    def killed(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(single.ImageLine, "give_back", killed)
        context.setattr("vhdkit.backup.night.write_layers", killed)
        with pytest.raises(KeyboardInterrupt):
            backup_image("web.vhd", "repo", KEEP)
    now = write("web-1.avhd", 2 * MIB)
    saved = backup_image("web.vhd", "repo", KEEP)
    assert how(saved) is How.LAYERS and len(vhdkit.chain_paths(saved.leaf)) == 2
    assert restored("web") == now == content("web.vhd")


def test_two_disks_do_not_share_a_name() -> None:
    """Another image of the same name is refused, unless the user says what it is called."""
    make()
    os.mkdir("other")
    make("other/web.vhd")
    backup_image("web.vhd", "repo")
    with pytest.raises(errors.InvalidArgument, match="under the name web"):
        backup_image("other/web.vhd", "repo")
    backup_image("other/web.vhd", "repo", SingleWishes(name="second"))
    assert restored("second") == content("other/web.vhd") and restored("web") == content("web.vhd")
    saved = backup_image("other/web.vhd", "repo", SingleWishes(name="web"))
    assert how(saved) is How.COMPARED and restored("web") == content("other/web.vhd")


def test_a_name_that_a_repository_cannot_have() -> None:
    """A file's name that is no name of a machine is refused before anything is made."""
    make("ä@.vhd")
    with pytest.raises(errors.InvalidArgument, match="--as"):
        backup_image("ä@.vhd", "repo")
    assert "ä@.avhd" not in os.listdir()


def test_space_is_checked_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without enough space nothing is frozen, and nothing is written."""
    make()
    backup_image("web.vhd", "repo")
    before = files_of(Path("repo/machines"))
    write("web.vhd", MIB)
    with pytest.raises(errors.NoSpace, match="kept free"):
        backup_image("web.vhd", "repo", SingleWishes(keep_reference=True, keep_free_bytes=1 << 60))
    assert files_of(Path("repo/machines")).keys() == before.keys() and not os.path.exists("web.avhd")


def test_an_image_in_use_is_refused_with_the_way_out() -> None:
    """While a program writes to the image, the error says how a served disk is saved."""
    make()
    with (
        vhdkit.open_disk("web.vhd", writable=True),
        pytest.raises(errors.ImageInUse) as caught,
    ):
        backup_image("web.vhd", "repo")
    assert "--control" in str(caught.value)


def test_a_backup_after_a_restore() -> None:
    """A restored disk is saved again: what differs from its newest night, whichever night it came from."""
    make()
    expected = {1: content("web.vhd")}
    backup_image("web.vhd", "repo")
    expected[2] = write("web.vhd", MIB)
    backup_image("web.vhd", "repo")
    os.unlink("web.vhd")
    restore("repo", "web@1", "web.vhd")
    assert how(backup_image("web.vhd", "repo")) is How.COMPARED
    expected[3] = expected[1]
    expected[4] = write("web.vhd", 3 * MIB)
    backup_image("web.vhd", "repo", SingleWishes(night=Wishes(compare=True)))
    assert {number: restored(f"web@{number}") for number in expected} == expected


def test_two_first_nights_at_once_are_of_one_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes that find no machine of a name make one: later the name has one meaning."""
    make()
    os.mkdir("other")
    make("other/web.vhd")
    real = Repository.find_machine

    def late(repository: Repository, word: str) -> str:
        monkeypatch.setattr(Repository, "find_machine", real)
        try:
            return real(repository, word)
        finally:
            backup_image("other/web.vhd", "repo")

    monkeypatch.setattr(Repository, "find_machine", late)
    with pytest.raises(errors.InvalidArgument, match="under the name web"):
        backup_image("web.vhd", "repo")
    assert len(os.listdir("repo/machines")) == 1 and restored("web") == content("other/web.vhd")


def test_a_night_whose_layers_cannot_be_merged(caplog: pytest.LogCaptureFixture) -> None:
    """A clone of a frozen layer keeps it from being changed: the night is saved all the same, and that is said."""
    make()
    backup_image("web.vhd", "repo", KEEP)
    vhdkit.create_child("clone.avhd", "web.vhd")
    before, now = content("clone.avhd"), write("web.avhd", MIB)
    saved = backup_image("web.avhd", "repo", SingleWishes(name="web", keep_reference=True))
    assert saved.merged_into is None and "web@2 is saved, but layers were not merged" in caplog.text
    assert restored("web") == now == content(saved.leaf) and content("clone.avhd") == before
    os.unlink("clone.avhd")
    again = write(saved.leaf, 2 * MIB)
    assert how(backup_image(saved.leaf, "repo", SingleWishes(name="web", keep_reference=True))) is How.LAYERS
    assert restored("web") == again


def test_a_killed_first_night_with_a_reference() -> None:
    """Wherever the first night that keeps a reference is killed, the next one finds the disk by its old name, has all
    of it, and leaves two images."""
    make()
    image = Path("web.vhd").read_bytes()
    for number in killings(lambda: backup_image("web.vhd", "repo", KEEP), step=daily_or_nightly(9, 1)):
        leaf = newest_leaf("web.vhd", vhdkit.OpenOptions())
        now = write(leaf, MIB) if number % 2 else content(leaf)
        saved = backup_image("web.vhd", "repo", KEEP)
        assert restored("web") == now == content(saved.leaf)
        assert len(vhdkit.chain_paths(saved.leaf)) == 2, number
        for path in Path().iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        Path("web.vhd").write_bytes(image)


def test_a_layer_that_a_user_froze_after_a_failed_freeze(monkeypatch: pytest.MonkeyPatch) -> None:
    """An image that a backup could not freeze is not taken for its work later: what a user freezes then stays."""
    make()

    def full(*_: object, **__: object) -> str:
        raise errors.NoSpace("cannot create")

    with monkeypatch.context() as context:
        context.setattr(single, "snapshot_noted", full)
        with pytest.raises(errors.NoSpace):
            backup_image("web.vhd", "repo", KEEP)
    frozen = content("web.vhd")
    vhdkit.snapshot("web.vhd")
    write("web.avhd", MIB)
    backup_image("web.avhd", "repo", KEEP)
    assert content("web.vhd") == frozen


def test_a_host_that_was_put_back() -> None:
    """Case 12: an image that was put back to an older state, times included, is saved as a branch from the night that
    it reads as; the newer nights stay."""
    make()
    saved = backup_image("web.vhd", "repo", KEEP)
    expected = {1: content("web.vhd")}
    shutil.copytree(".", "../old", ignore=shutil.ignore_patterns("repo"))
    for number in (2, 3):
        expected[number] = write(saved.leaf, number * 700 * KIB)
        saved = backup_image("web.vhd", "repo", KEEP)
    for path in Path().glob("*web*"):
        path.unlink()
    for path in Path().glob(".web*"):
        path.unlink()
    shutil.copytree("../old", ".", dirs_exist_ok=True)
    shutil.rmtree("../old")
    expected[4] = write("web.avhd", 50 * KIB)
    saved = backup_image("web.vhd", "repo", KEEP)
    [disk] = saved.manifest.disks
    assert (disk.how, disk.reference_night) == (How.LAYERS, 1)
    assert {number: restored(f"web@{number}") for number in expected} == expected


def test_a_merge_by_a_user_into_the_reference() -> None:
    """Case 9: a merge that reaches the kept layer ends it as a reference; the next night has everything."""
    make()
    saved = backup_image("web.vhd", "repo", KEEP)
    write(saved.leaf, MIB)
    newest = vhdkit.snapshot(saved.leaf)
    now = write(newest, 2 * MIB)
    vhdkit.merge(saved.leaf, into="web.vhd", relink_children=True)
    again = backup_image(newest, "repo", SingleWishes(name="web", keep_reference=True))
    assert how(again) is How.COMPARED and restored("web") == now


@pytest.mark.parametrize("length", [1, 511, 513, 4096, SIZE - 100, SIZE])
def test_a_raw_disk_keeps_its_length(length: int) -> None:
    """A raw disk is restored with the length that its file had, which need not be whole sectors; also after a night
    in which nothing but the length changed."""
    raw = random.Random(length).randbytes(length)
    Path("disk.raw").write_bytes(raw)
    backup_image("disk.raw", "repo")
    backup_image("disk.raw", "repo")
    for word in ("disk@1", "disk@2"):
        restore("repo", word, "again.raw", kind="raw")
        assert Path("again.raw").read_bytes() == raw
        os.unlink("again.raw")
    Path("disk.raw").write_bytes(raw + b"\0")
    backup_image("disk.raw", "repo")
    restore("repo", "disk@3", "again.raw", kind="raw")
    assert Path("again.raw").read_bytes() == raw + b"\0"


@pytest.mark.nightly
def test_a_thousand_nights() -> None:
    """Case 35: a thousand nights that are never pruned can each be restored: a chain ends long before its limit."""
    make()
    expected = {}
    for number in range(1, 1001):
        expected[number] = write("web.vhd", number * 4096 % (SIZE - 9000))
        backup_image("web.vhd", "repo")
    rng = random.Random(35)
    for number in {1, 2, 127, 128, 129, 130, 256, 257, 999, 1000, *rng.sample(range(1, 1001), 50)}:
        assert restored(f"web@{number}") == expected[number], number


def test_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backup and a restore with a limit wait for what they write, a restore for what it compares; holes are free."""
    vhdkit.create_image("web.vhd", 64 * MIB, block_size_bytes=512 * KIB)
    with vhdkit.open_disk("web.vhd", writable=True) as disk:
        for offset in range(0, 64 * MIB, 16 * MIB):
            disk.write(offset, random.Random(offset).randbytes(MIB))
    taken: list[int] = []
    monkeypatch.setattr(RateLimit, "take", lambda _, size: taken.append(size))
    limit = RateLimit(MIB)
    backup_image("web.vhd", "repo", SingleWishes(night=Wishes(limit=limit)))
    assert 4 * MIB <= sum(taken) < 5 * MIB
    taken.clear()
    restore("repo", "web", "restored.vhd", limit=limit)
    assert 8 * MIB <= sum(taken) < 10 * MIB and content("restored.vhd") == content("web.vhd")
    taken.clear()
    restore("repo", "web", "again.vhd", check=False, limit=limit)
    assert 4 * MIB <= sum(taken) < 5 * MIB


def test_a_limited_backup_is_interrupted_at_once() -> None:
    """Ctrl-C ends the wait of a backup with a low limit at once, and leaves no night."""
    make()
    write("web.vhd", MIB)
    backup = [sys.executable, "-m", "vhdkit", "backup", "run", "web.vhd", "repo", "--limit", "1K", "--no-progress"]
    with subprocess.Popen(backup, stderr=subprocess.DEVNULL) as process:
        wait_until(lambda: list(Path().glob("repo/machines/*/images/disk/.vhdkit-*")), "an image is written", 30)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) != 0  # the first mebibyte would take 17 minutes
    assert not list(Path().glob("repo/machines/*/nights/*")) and not list(Path().glob("repo/machines/*/images/disk/*"))


def make_kind(suffix: str) -> str:
    """An image of that kind with some data; its name."""
    name = f"web.{suffix}"
    vhdkit.create_image(name, SIZE, disk_format="vhdx" if suffix == "vhdx" else "dynamic")
    write(name, 0)
    return name


def the_users_layer_stays(name: str) -> None:
    """What the user freezes now is neither merged nor changed by the next night."""
    frozen, newest = content(name), vhdkit.snapshot(name)
    now = write(newest, MIB)
    saved = backup_image(newest, "repo", SingleWishes(name="web", keep_reference=True))
    assert os.path.realpath(newest) in vhdkit.chain_paths(saved.leaf) and content(name) == frozen
    assert restored("web") == now == content(saved.leaf)


@pytest.mark.parametrize("suffix", ["vhd", "vhdx"])
def test_a_layer_that_a_user_froze_after_a_kill(suffix: str) -> None:
    """An image that a backup had marked and was killed before it froze it is the user's when the user freezes it."""
    name = make_kind(suffix)
    images = {path: path.read_bytes() for path in Path().iterdir()}
    tried = 0
    for number in killings(lambda: backup_image(name, "repo", KEEP)):
        if vhdkit.find_children([name])[name]:
            break
        if references.marks_at(name):
            tried += 1
            if tried % daily_or_nightly(2, 1) == 0:
                the_users_layer_stays(name)
        for path in Path().iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for path, raw in images.items():
            path.write_bytes(raw)
        assert number > 0
    assert tried > 1


@pytest.mark.parametrize("suffix", ["vhd", "vhdx"])
def test_a_layer_that_a_user_froze_in_place_of_a_backup(suffix: str) -> None:
    """So is one whose empty child, which a backup had made, the user has removed."""
    name = make_kind(suffix)
    os.unlink(backup_image(name, "repo", KEEP).leaf)
    the_users_layer_stays(name)
