# SPDX-License-Identifier: Apache-2.0
"""Machines from nights: equal contents, beside the original or in its place, whole or not at all."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

import vhdkit
from tests.vmm.api.restoring.saved_nights import content, hashes, lease_count, save_night
from tests.vmm.snapshots.machines import DISK_BYTES, Machines, each_kind
from vhdkit import backups
from vmm.api.manager import DiskRequest, Manager
from vmm.api.restoring import restoring
from vmm.api.restoring.found_night import RestoreRequest, consent_of
from vmm.api.restoring.restoring import look_at_night, restore_machine
from vmm.model.errors import AlreadyExists, InvalidSpec, NoSpace, NotFound, Refused, StoreFailed, VmmError
from vmm.store import registry
from vmm.store.night_files import DEFINITION, night_files
from vmm.store.state import is_clean


def request(machines: Machines, night: str = "web", **settings: Any) -> RestoreRequest:
    """A request for a night of the test's repository."""
    return RestoreRequest(str(machines.folder / "repo"), night, **settings)


def saved(machines: Machines, **settings: Any) -> None:
    """The machine web with two disks, and two nights, which differ in the first disk."""
    machines.create("web", 2, **settings)
    save_night("web", machines.folder / "repo")
    with vhdkit.open_disk(machines.folder / f"web-0.{machines.kind}", writable=True) as disk:
        disk.write(4096, b"after the first night")
    save_night("web", machines.folder / "repo", hours=24, consistency=backups.Consistency.CRASH)


def changed(name: str, change: Callable[[dict[str, Any]], None], disks: list[str]) -> dict[str, bytes]:
    """The files of a night of a machine with a changed definition, and with images of these disks."""
    machine = registry.load(name)
    document = json.loads(night_files(machine.paths, machine.spec, disks)[DEFINITION])
    change(document["definition"])
    return {DEFINITION: json.dumps(document).encode()}


@each_kind
def test_a_machine_stands_beside_its_original(machines: Machines) -> None:
    """The disks read as in that night; ids, addresses and serials are new; the night's files are unchanged."""
    saved(machines, adapters=[{}])
    original, before = registry.load("web").spec, hashes(machines.folder / "repo")
    for night, name, marker in (("web@1", "old", bytes(21)), ("web", "new", b"after the first night")):
        done = restore_machine(request(machines, night, name=name))
        spec = registry.load(name).spec
        assert {disk.id: disk.path for disk in spec.disks} == done.disks
        assert content(done.disks["disk-0"])[4096:4117] == marker
        assert content(done.disks["disk-1"]) == content(str(original.disks[1].path))
        assert spec.id != original.id and spec.adapters[0].mac != original.adapters[0].mac
        assert not {disk.serial for disk in spec.disks} & {disk.serial for disk in original.disks}
        assert [disk.place for disk in spec.disks] == [disk.place for disk in original.disks]
        folder = Path(done.disks["disk-0"]).parent
        assert sorted(os.listdir(folder)) == sorted(os.path.basename(path) for path in done.disks.values())
        assert folder.stat().st_mode & 0o777 == 0o700
    assert is_clean(registry.load("old").paths) and not is_clean(registry.load("new").paths), "as the night says"
    assert hashes(machines.folder / "repo") == before and lease_count(machines.folder / "repo") == 0
    [event] = [one for one in Manager().events("new") if one.name == "restored"]
    assert event.details["night"] == 2 and event.details["consistency"] == "crash"


def test_the_old_machine_comes_back(machines: Machines) -> None:
    """With `register` it has its id, addresses and serials again; not while the original, or its addresses, exist."""
    saved(machines, adapters=[{}])
    original = registry.load("web").spec
    with pytest.raises(AlreadyExists, match="is already the machine web"):
        restore_machine(request(machines, name="again", register=True))
    Manager().delete("web", with_disks=True)
    other = Manager().create("other", adapters=[{"mac": original.adapters[0].mac}])
    with pytest.raises(AlreadyExists, match="adapter nic-0 of machine other"):
        restore_machine(request(machines, register=True))
    Manager().delete(other.name)
    restore_machine(request(machines, register=True))
    spec = registry.load("web").spec
    assert (spec.id, spec.adapters) == (original.id, original.adapters)
    assert [disk.serial for disk in spec.disks] == [disk.serial for disk in original.disks]
    again = save_night("web", machines.folder / "repo", hours=48)
    assert again.night == 3 and [one.how.value for one in again.disks] == ["same", "same"], "its nights go on"


def test_another_folder_and_uefi_variables(machines: Machines, tmp_path: Path) -> None:
    """The disks go to the folder that is named, with holes for zeros; UEFI variables come along."""
    saved(machines, firmware="uefi")
    Path(registry.load("web").paths.uefi_variables).write_bytes(b"variables" * 1000)
    save_night("web", machines.folder / "repo", hours=48)
    elsewhere = request(machines, name="new", folder=str(tmp_path / "elsewhere"))
    with pytest.raises(InvalidSpec, match="is not a folder"):
        restore_machine(elsewhere)
    (tmp_path / "elsewhere").mkdir()
    done = restore_machine(elsewhere)
    assert os.path.dirname(done.disks["disk-0"]) == str(tmp_path / "elsewhere" / "new")
    assert Path(registry.load("new").paths.uefi_variables).read_bytes() == b"variables" * 1000
    with vhdkit.open_disk(done.disks["disk-1"]) as disk:
        assert disk.size_bytes == DISK_BYTES and os.stat(done.disks["disk-1"]).st_blocks * 512 < DISK_BYTES


def test_what_lies_outside_is_asked_for(machines: Machines, tmp_path: Path) -> None:
    """A medium, a switch, a right or a start with the host comes only with consent, and everything is listed."""
    iso = tmp_path / "a.iso"
    iso.write_bytes(bytes(65536))
    machines.create("web", 1, adapters=[{}], automatic={"start": "always"})
    Manager().add_disk("web", DiskRequest(str(iso), kind="iso"))
    files = changed("web", lambda one: one["adapters"][0].update(switch="lan"), ["disk-0"])
    save_night("web", machines.folder / "repo", files=files)
    found = look_at_night(request(machines, name="new"))
    assert set(found.outside.values()) == {f"--allow {iso}", "--allow switch:lan", "--allow autostart"}
    with pytest.raises(Refused, match=r"the switch lan .--allow switch:lan.") as caught:
        restore_machine(request(machines, name="new"))
    assert "--allow all" in str(caught.value.hint) and registry.names() == ["web"]
    told: list[str] = []
    by_name = consent_of([str(iso), "autostart"], {}, {"lan": "-"})
    done = restore_machine(request(machines, name="new", consent=by_name), announce=told.append)
    assert [f"allowed: {words}" for words in done.granted] == told and len(told) == 3
    spec = registry.load("new").spec
    assert spec.adapters[0].switch is None and spec.disks[1].path == str(iso) and spec.automatic.start == "always"
    restore_machine(request(machines, name="all", consent=consent_of(["all"], {}, {})))
    assert registry.load("all").spec.adapters[0].switch == "lan"
    with pytest.raises(VmmError, match="has nothing called 'spoofing'"):
        look_at_night(request(machines, name="x", consent=consent_of(["spoofing", "all"], {}, {})))


def test_a_definition_is_not_trusted(machines: Machines, tmp_path: Path) -> None:
    """A definition that names a disk or device of this host as the machine's is refused, and nothing is made."""
    saved(machines)
    (tmp_path / "secret").write_bytes(bytes(1 << 20))
    files = changed("web", lambda one: one["disks"][1].update(path=str(tmp_path / "secret")), ["disk-0"])
    save_night("web", machines.folder / "repo", files=files, hours=48)
    with pytest.raises(Refused, match=r"disk disk-1: the image .*secret"):
        restore_machine(request(machines, name="new"))
    save_night("web", machines.folder / "repo", files={"definition.json": b"{}"}, hours=72)
    with pytest.raises(VmmError, match="does not describe a machine"):
        restore_machine(request(machines, name="new"))
    assert registry.names() == ["web"] and not os.path.exists(machines.folder / "home" / "disks" / "new")


def test_damage_is_found_before_anything_is_made(machines: Machines) -> None:
    """A night whose files differ from their sums is not restored, unless the user says so; nothing is left."""
    saved(machines)
    [image] = (machines.folder / "repo").rglob("images/disk-1/00001.vhd")
    with image.open("r+b") as file:
        file.seek(-512 - 4096, os.SEEK_END)
        file.write(b"damage")
    with pytest.raises(StoreFailed, match="sums differ"):
        restore_machine(request(machines, name="new"))
    assert registry.names() == ["web"] and os.listdir(machines.folder / "home" / "disks") == []
    restore_machine(request(machines, name="new", check=False))


@pytest.mark.parametrize("moment", ["copy_disks", "add_machine"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))], ids=str)
def test_a_failure_leaves_nothing(
    machines: Machines, monkeypatch: pytest.MonkeyPatch, moment: str, error: BaseException
) -> None:
    """Ctrl-C and a full disk, after the copy or before the machine is added, leave no file and no lease."""
    saved(machines)
    real = getattr(restoring, moment)

    def fail(*args: Any, **more: Any) -> None:
        if moment == "copy_disks":
            real(*args, **more)
        raise error

    monkeypatch.setattr(restoring, moment, fail)
    with pytest.raises((KeyboardInterrupt, NoSpace)):
        restore_machine(request(machines, name="new"))
    assert registry.names() == ["web"] and os.listdir(machines.folder / "home" / "disks") == []
    assert lease_count(machines.folder / "repo") == 0


def test_an_interrupt_after_the_last_step_keeps_the_disks(machines: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is in the registry has its disks, whatever happens to the command afterwards."""
    saved(machines)
    real = restoring.add_machine

    def fail(*args: Any, **more: Any) -> None:
        real(*args, **more)
        raise KeyboardInterrupt

    monkeypatch.setattr(restoring, "add_machine", fail)
    with pytest.raises(KeyboardInterrupt):
        restore_machine(request(machines, name="new"))
    path = str(registry.load("new").spec.disks[0].path)
    assert content(path)[4096:4101] == b"after" and ".vmm-restore.json" not in os.listdir(os.path.dirname(path))


def test_names_that_are_taken(machines: Machines) -> None:
    """A machine of that name, or a folder in the place of its disks, is refused before anything is copied."""
    saved(machines)
    with pytest.raises(AlreadyExists, match="give another name: --as"):
        restore_machine(request(machines))
    with pytest.raises(AlreadyExists, match="delete it first, or restore beside it: --as NEW"):
        restore_machine(request(machines, register=True))
    folder = machines.folder / "home" / "disks" / "new"
    folder.mkdir(parents=True)
    (folder / "mine.vhd").write_bytes(b"")
    with pytest.raises(AlreadyExists, match="in the way"):
        restore_machine(request(machines, name="new"))
    assert os.listdir(folder) == ["mine.vhd"] and os.listdir(folder.parent) == ["new"]


def test_a_night_of_a_disk_alone_is_no_machine(machines: Machines) -> None:
    """The error says how to restore the disk."""
    machines.disk("alone.vhd")
    vhdkit_run(machines.folder / "alone.vhd", machines.folder / "repo")
    with pytest.raises(NotFound, match="no definition of a machine") as caught:
        look_at_night(request(machines, "alone"))
    assert "vhdkit restore" in str(caught.value.hint)


def vhdkit_run(image: Path, repository: Path) -> None:
    """Save an image as a disk of its own."""
    taken = datetime(2026, 1, 1, tzinfo=UTC)
    facts = backups.Circumstances(taken, "UTC", timedelta(), "test", backups.Consistency.CRASH)
    with (
        backups.create_repository(repository) as opened,
        vhdkit.open_disk(image) as disk,
        backups.writing(opened, "alone-id", "alone", backups.Wishes()) as night,
    ):
        night.save([backups.FrozenDisk("disk", disk.chain)], facts)
