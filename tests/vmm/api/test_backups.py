# SPDX-License-Identifier: Apache-2.0
"""Nights of machines that are off or saved: what they hold, which images are kept, and what an early end leaves."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import vhdkit
import vmm
from tests.support import daily_or_nightly
from tests.vmm import nights
from tests.vmm.cli.running import document, failure, good, run
from tests.vmm.snapshots.machines import DISK_BYTES, Machines, each_kind
from tests.vmm.snapshots.test_recovery import after_each_kill
from vhdkit import backups
from vmm.api.export_import.exporting import export
from vmm.api.export_import.importing import import_machine
from vmm.model.errors import InUse, InvalidSpec, NoSpace, NotFound, Refused, StoreFailed, VmmError, WrongState
from vmm.model.spec import DiskSpec, make_spec
from vmm.snapshots.freeze import refuse_unfreezable
from vmm.snapshots.recovery import settle
from vmm.store import registry
from vmm.store.snapshots.store import holding, load_tree
from vmm.store.state import note_unclean

manager = vmm.Manager()


def saved(machines: Machines, name: str = "web", to: str = "repo", **wishes: Any) -> vmm.MachineNight:
    """The next night of the machine."""
    return manager.save_night(name, str(machines.folder / to), vmm.BackupWishes(**wishes))


def restored(machines: Machines, night: int, name: str = "web") -> dict[str, str]:
    """The hash of each disk of a night, all of whose files are checked."""
    return nights.restored(machines.folder / "repo", f"{name}@{night}")


def now(machines: Machines, name: str = "web") -> dict[str, str]:
    """The hash of each disk of the machine."""
    return {disk.id: nights.content_of(str(disk.path)) for disk in registry.load(name).spec.disks}


def tree_of(name: str = "web") -> Any:
    """The machine's tree."""
    return load_tree(registry.load(name).paths)


def events(kind: str, name: str = "web") -> list[dict[str, Any]]:
    """The details of the machine's events of this kind."""
    return [dict(one.details) for one in manager.events(name) if one.name == kind]


@each_kind
def test_nights_hold_what_changed(machines: Machines) -> None:
    """The first night is full, later ones have what was written since, an unchanged disk adds nothing; one image is
    kept for each disk, and every night reads as the machine did."""
    machines.create(disks=2)
    taken = []
    for number in range(5):
        if number != 2:
            machines.write("web", 4096 * number, b"night %d" % number * 100)
        taken.append(now(machines))
        night = saved(machines)
        assert night.night == number + 1 and night.consistency == "off-clean" and night.pause_seconds is None
        assert set(night.how.values()) == {"full" if number == 0 else "same" if number == 2 else "layers"}
        assert now(machines) == taken[-1]
        machines.merge("web")
        assert len(machines.images()) == 4, "of each disk: the kept image and the newest one"
    assert [restored(machines, number) for number in range(1, 6)] == taken
    assert len(events("backed-up")) == len(events("backup-begun")) == 5


def test_the_definition_comes_along(machines: Machines) -> None:
    """A night has the machine's definition, its UEFI variables, and facts about its snapshots."""
    machines.create(firmware="uefi")
    web = manager.snapshots("web")
    Path(registry.load("web").paths.uefi_variables).write_bytes(b"boot this")
    web.create("before")
    saved(machines)
    with (
        backups.open_repository(machines.folder / "repo") as repository,
        repository.machine(repository.find_machine("web")) as machine,
    ):
        [night] = machine.nights()
        assert night.manifest is not None and machine.id == registry.load("web").spec.id
        assert {one.name for one in night.manifest.files} == {"definition.json", "uefi-vars.fd"}
        assert [one["name"] for one in night.manifest.snapshots] == ["before"]
        [disk] = night.manifest.disks
        assert (disk.slot, disk.serial) == ("ide0:0", registry.load("web").spec.disks[0].serial)


def test_snapshots_and_backups_beside_each_other(machines: Machines) -> None:
    """Snapshots that are taken, applied and deleted between nights change neither nights nor snapshots; nothing is
    merged into the image that the next night needs."""
    web = machines.create()
    taken: list[dict[str, str]] = []

    def night(byte: int, how: str | None = None) -> None:
        machines.write("web", 4096 * byte, bytes([byte]) * 512)
        taken.append(now(machines))
        found = saved(machines).how["disk-0"]
        assert found == how or how is None
        machines.merge("web")
        for number, disks in enumerate(taken):
            assert restored(machines, number + 1) == disks

    night(1, "full")
    one = web.create("one")
    night(2, "layers")
    two = web.create("two")
    web.delete(one.id)  # its image is merged into the one below it, which the last night needs no more
    machines.merge("web")
    night(3, "layers")
    web.delete(two.id)
    machines.merge("web")
    night(4, "layers")
    back = web.create("back")
    night(5, "layers")
    web.apply(back.id, discard_current=True)
    machines.merge("web")
    night(6)
    forward = web.create("forward")
    web.apply(back.id, discard_current=True)
    night(7)
    web.apply(forward.id, discard_current=True)
    night(8)
    assert all(os.path.exists(one.image) for one in tree_of().kept) and len(tree_of().kept) == 1


def test_an_image_that_no_state_stands_on_is_not_kept(machines: Machines) -> None:
    """A machine that was taken back in time before its last night does not keep that night's image for ever."""
    web = machines.create()
    web.create("first")
    machines.write("web", 0, b"x" * 512)
    saved(machines)
    assert len(tree_of().kept) == 1
    web.apply("first", discard_current=True)
    assert tree_of().kept == () and len(machines.images()) == 2


def test_disks_come_and_go(machines: Machines) -> None:
    """A disk that was added is saved whole, and so is another one under the id of one that was removed; the others are
    saved as before."""
    machines.create(disks=2)
    saved(machines)
    manager.remove_disk("web", "disk-1")
    assert saved(machines).how == {"disk-0": "same"}
    assert [one.disk for one in tree_of().kept] == ["disk-0"]
    manager.add_disk("web", vmm.DiskRequest(str(machines.disk(f"other.{machines.kind}"))))
    assert saved(machines).how == {"disk-0": "same", "disk-1": "full"}
    expected = now(machines)
    assert restored(machines, 3) == expected


def test_images_of_removed_disks_stay(machines: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    """The image of a disk that was taken out of its machine is never removed, although a backup or a snapshot made it
    and nothing in the tree needs it; nor is that of a disk that a snapshot that is applied does not have."""
    web = machines.create(disks=2)
    web.create("before")
    manager.add_disk("web", vmm.DiskRequest(str(machines.disk("added.vhd"))))
    saved(machines)
    machines.write("web", 4096, b"precious" * 64)
    expected = now(machines)
    paths = {one.id: str(one.path) for one in registry.load("web").spec.disks}
    with monkeypatch.context() as failing:
        failing.setattr(registry, "save", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            manager.remove_disk("web", "disk-1")
    assert paths["disk-1"] in tree_of().images, "it is still the machine's"
    manager.remove_disk("web", "disk-1")
    saved(machines)
    web.apply("before", discard_current=True)
    machines.merge("web")
    saved(machines)
    web.delete("before")
    machines.merge("web")
    assert nights.content_of(paths["disk-1"]) == expected["disk-1"]
    assert nights.content_of(paths["disk-2"]) == expected["disk-2"]
    assert not os.path.exists(paths["disk-0"]), "the snapshot had a state of this disk, which took its place"


def test_a_machine_of_the_same_name_is_another_one(machines: Machines) -> None:
    """A machine that was deleted and made again under its name begins a line of its own; one that was renamed goes on
    with its own."""
    machines.create()
    saved(machines)
    manager.set("web", name="mail")
    assert saved(machines, "mail").night == 2
    manager.delete("mail")
    machines.create("mail", [machines.disk("new.vhd")])
    assert saved(machines, "mail").night == 1
    with pytest.raises(vhdkit.InvalidArgument, match="2 machines called"):
        backups.restore(machines.folder / "repo", "mail", machines.folder / "x.vhd")


def test_two_repositories_in_turn(machines: Machines) -> None:
    """Each repository has an image of its own that is kept; to forget one leaves the other alone, to forget both
    leaves each disk as it was."""
    machines.create()
    image = registry.load("web").spec.disks[0].path
    for number in range(3):
        for repo in ("a", "b"):
            machines.write("web", 4096 * number, repo.encode() * 256)
            assert saved(machines, to=repo).how["disk-0"] == ("layers" if number else "full")
            machines.merge("web")
    assert len(machines.images()) == 3
    shown = good("snapshot", "tree", "web")
    assert all(f"kept for the next backup: {one.image} ({one.folder})" in shown for one in tree_of().kept)
    with pytest.raises(NotFound, match="for: "):
        manager.forget_nights("web", str(machines.folder / "c"))
    gone = manager.forget_nights("web", str(machines.folder / "a"))
    assert gone.repositories == (str(machines.folder / "a"),) and not gone.is_merged
    assert [one.folder for one in tree_of().kept] == [str(machines.folder / "b")]
    expected = now(machines)
    assert "no images are kept for" in good("backup", "forget", "web")
    assert machines.merge("web") == 1 and now(machines) == expected
    assert registry.load("web").spec.disks[0].path == image and len(machines.images()) == 1
    assert "no image was kept" in good("backup", "forget", "web")
    assert saved(machines, to="a").how["disk-0"] == "compared"


def test_what_the_consistency_words_mean(machines: Machines) -> None:
    """A machine that shut down is clean, one that died is not, and a saved one is as after a power cut; --consistent
    refuses the last two, and nothing is done."""
    machines.create()
    assert saved(machines, consistent=True).consistency == "off-clean"
    note_unclean(registry.load("web").paths)
    assert saved(machines).consistency == "off-unclean"
    images = machines.images()
    with pytest.raises(WrongState, match="died, or was powered off"):
        saved(machines, consistent=True)
    assert machines.images() == images and len(tree_of().kept) == 1
    assert len(list((machines.folder / "repo").glob("machines/*/nights/*"))) == 2


def test_what_is_refused_changes_nothing(machines: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass-through disk is refused by name, also a repository in use, one that has no room, and one that is none."""
    machines.create()
    device = DiskSpec(id="disk-7", kind="pass-through", path="/dev/vda", controller="virtio")
    with pytest.raises(Refused, match=r"disk-7.*inside the guest"):
        refuse_unfreezable(make_spec(name="x", disks=[device]))
    with pytest.raises(NoSpace, match=r"to be kept free"):
        saved(machines, keep_free_bytes=1 << 60)
    assert "to be kept free" in events("backup-failed")[0]["problem"]
    (machines.folder / "full").mkdir()
    (machines.folder / "full" / "x").write_text("x")
    with pytest.raises(InvalidSpec, match="neither a repository nor an empty folder"):
        saved(machines, to="full")
    with pytest.raises(NotFound):
        saved(machines, "nope")
    with (
        backups.create_repository(machines.folder / "repo") as repository,
        repository.made_machine(registry.load("web").spec.id, "web") as machine,
        machine.held("a test"),
        pytest.raises(InUse, match="a test"),
    ):
        saved(machines)
    assert len(machines.images()) == 1 and tree_of().kept == ()
    assert not list((machines.folder / "repo").glob("machines/*/nights/*"))


def _no_space(*words: object, **named: object) -> None:
    raise vhdkit.NoSpace("the repository is full")


def _interrupted(*words: object, **named: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("place", ["repository.MachineFolder.write_manifest", "night.write_full"])
@pytest.mark.parametrize("failing", [_no_space, _interrupted])
def test_an_early_end_leaves_no_night(
    machines: Machines, monkeypatch: pytest.MonkeyPatch, place: str, failing: Callable[..., None]
) -> None:
    """A full repository and Ctrl-C leave nothing of the night; the machine is as before once its layers are merged."""
    machines.create()
    image, expected = registry.load("web").spec.disks[0].path, now(machines)
    with monkeypatch.context() as broken:
        broken.setattr(f"vhdkit.backup.{place}", failing)
        result = run("backup", "run", "web", machines.folder / "repo")
    if failing is _no_space:
        assert result.exit_code == 7 and "the repository is full" in result.stderr
    else:
        assert result.exit_code == 130 and "the backup was stopped: there is no night" in result.stderr
    [event] = events("backup-failed")
    assert ("full" if failing is _no_space else "interrupted") in event["problem"]
    files = [path for path in (machines.folder / "repo").rglob("*") if path.is_file()]
    assert {path.name for path in files} == {"repository.json", "machine.json", "lock"}
    assert tree_of().kept == () and now(machines) == expected
    assert machines.merge("web") == 1
    assert registry.load("web").spec.disks[0].path == image and len(machines.images()) == 1
    assert saved(machines).night == 1 and restored(machines, 1) == expected


def test_a_machine_that_starts_and_changes_while_it_is_copied(
    machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the night is written, the machine is free: it is written to, gets snapshots and other settings, and the
    night is as the machine was at the freeze."""
    web = machines.create()
    saved(machines)
    machines.write("web", 0, b"before" * 100)
    expected, write = now(machines), backups.Writing.save

    def beside(*words: Any) -> Any:
        machines.write("web", 0, b"after!" * 100)
        web.create("meanwhile")
        machines.write("web", 8192, b"still!" * 100)
        web.delete("meanwhile")
        assert machines.merge("web") == 1, "what the night reads is not merged"
        manager.set("web", notes="meanwhile")
        return write(*words)

    with monkeypatch.context() as patched:
        patched.setattr(backups.Writing, "save", beside)
        assert saved(machines).how == {"disk-0": "layers"}
    assert restored(machines, 2) == expected
    assert now(machines) != expected


def test_a_limit_of_the_rate(machines: Machines) -> None:
    """With a limit a night takes the time that its bytes need; a rate of nothing is refused."""
    machines.create()
    for number in range(64):
        machines.write("web", 4096 * number, os.urandom(4096))
    night = saved(machines, max_rate_bytes=512 << 10)
    assert night.added_bytes >= 256 << 10 and night.seconds >= 0.3
    with pytest.raises(InvalidSpec, match="bytes a second"):
        saved(machines, max_rate_bytes=0)
    assert "bytes a second" in failure("backup", "run", "web", machines.folder / "repo", "--limit", "1", code=2)


def test_a_saved_machine_keeps_its_layers(machines: Machines) -> None:
    """Nights of a machine whose newest image is empty add no layers: the image below it is marked again."""
    machines.create()
    for number in range(4):
        assert saved(machines).how["disk-0"] == ("full" if number == 0 else "same")
        assert len(machines.images()) == 2 and machines.merge("web") == 0
    [kept] = tree_of().kept
    [mark] = backups.marks_at(kept.image)
    assert mark.night.number == 4 and mark.night.night_id == kept.night_id


def test_exports_and_deletion_know_kept_images(machines: Machines) -> None:
    """An export has the whole disk, an imported machine keeps nothing for backups, and a machine that is deleted with
    its disks takes its kept images along."""
    machines.create()
    saved(machines)
    machines.write("web", 4096, b"later" * 100)
    saved(machines)
    expected = now(machines)
    export("web", str(machines.folder / "out"))
    import_machine(str(machines.folder / "out"), name="copy")
    assert now(machines, "copy") == expected and tree_of("copy").kept == ()
    manager.delete("copy", with_disks=True)
    manager.delete("web", with_disks=True)
    assert machines.images() == set()
    assert not list(machines.folder.glob(".*vhdkit-nights"))


def test_a_machine_that_is_deleted_while_it_is_copied(machines: Machines) -> None:
    """Its night is whole, and nothing is said of merges that will never be made."""
    machines.create()
    content = now(machines)
    with nights.recorded(lambda: manager.delete("web")):
        assert saved(machines).merges == ()
    assert restored(machines, 1) == content
    assert manager.names() == []


def test_several_machines_at_once(machines: Machines) -> None:
    """One that fails does not stop the others; the exit code is that of the failure."""
    for name in ("web", "prune"):
        machines.create(name)
    result = run("backup", "run", "web", "nope", "prune", machines.folder / "repo")
    assert result.exit_code == 1 and "nope" in result.stderr
    assert "web@1" in result.stdout and "prune@1" in result.stdout
    found = document("backup", "run", "web", machines.folder / "repo")
    assert found["failed"] == [] and found["nights"][0]["how"] == {"disk-0": "same"}
    assert "nothing has changed" in good("backup", "run", "prune", machines.folder / "repo")
    assert good("backup", "run", "web", machines.folder / "repo", "-q") == ""
    failure("backup", "run", "web", code=2)


@pytest.mark.parametrize("is_first", [True, False])
def test_a_night_that_is_killed_at_any_change(machines: Machines, is_first: bool) -> None:
    """Whichever change of a file the process is killed at, the machine and all nights read as before, and the next
    night is right; after the merges only the kept image and the newest one are left."""
    machines.create(disks=1)
    taken = []
    if not is_first:
        taken.append(now(machines))
        saved(machines)
    machines.write("web", 4096, b"changed" * 100)
    before = now(machines)
    for ended in after_each_kill(machines, lambda: saved(machines), step=daily_or_nightly(17, 1)):
        with holding(registry.load("web").paths, "web") as held:
            settle(held)
        assert now(machines) == before
        known = nights.all_restored(machines.folder / "repo", "web")
        assert known in ([*taken], [*taken, before]) and (not ended or known == [*taken, before])
        machines.merge("web")
        machines.write("web", 8192, b"more" * 100)
        latest = now(machines)
        saved(machines)
        assert nights.all_restored(machines.folder / "repo", "web") == [*known, latest]
        machines.merge("web")
        assert len(machines.images()) == 2 and now(machines) == latest
        manager.forget_nights("web")
        machines.merge("web")
        assert len(machines.images()) == 1 and now(machines) == latest


def test_a_disk_that_cannot_be_read_is_named(machines: Machines) -> None:
    """A missing image is reported before anything is frozen."""
    machines.create()
    Path(str(registry.load("web").spec.disks[0].path)).unlink()
    with pytest.raises(StoreFailed, match="web-0"):
        saved(machines)
    assert tree_of().kept == ()


def test_sizes_that_change_between_nights(machines: Machines) -> None:
    """A disk that grew is saved as an increment, one that shrank as a whole; both nights have the right size."""
    machines.create()
    saved(machines)
    manager.resize_disk("web", "disk-0", 2 * DISK_BYTES)
    machines.write("web", DISK_BYTES, b"grown" * 100)
    grown = now(machines)
    assert saved(machines).how["disk-0"] == "layers"
    machines.merge("web")
    assert restored(machines, 2) == grown
    with contextlib.suppress(VmmError):
        machines.write("web", DISK_BYTES, bytes(512))
        manager.resize_disk("web", "disk-0", DISK_BYTES, shrink=True)
    latest = now(machines)
    saved(machines)
    assert restored(machines, 3) == latest
