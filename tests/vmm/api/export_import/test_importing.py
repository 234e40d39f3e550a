# SPDX-License-Identifier: Apache-2.0
"""Folders from strangers: an imported machine gets nothing of this host without consent, and nothing is lost."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import vhdkit
import vmm
from tests.vmm.snapshots.machines import Machines
from vmm.api.export_import import importing
from vmm.api.export_import.arrival import check_chains, judge_all, look_at_export
from vmm.api.export_import.exporting import MANIFEST, export
from vmm.api.export_import.foreign import Consent
from vmm.api.export_import.importing import import_machine
from vmm.api.export_import.inside import Inside
from vmm.model.errors import AlreadyExists, InvalidSpec, Refused
from vmm.snapshots.dependents import images_of
from vmm.snapshots.preflight import definition_of
from vmm.store import registry
from vmm.store.snapshots.store import load_tree


@pytest.fixture
def out(machines: Machines) -> Path:
    """An export of a machine with one disk and a snapshot; the machine itself has been removed from this host."""
    machines.create("web").create("a")
    export("web", str(machines.folder / "out"))
    vmm.Manager().delete("web", with_disks=True, with_snapshots=True)
    return machines.folder / "out"


def changed(out: Path, change: Callable[[dict[str, Any]], None], *, snapshot: bool = False) -> None:
    """Forge the definition, or the snapshot's."""
    manifest = json.loads((out / MANIFEST).read_text())
    path = next((out / "snapshots").glob("*/*.json"))
    document = json.loads(path.read_text()) if snapshot else manifest["definition"]
    change(document)
    if snapshot:
        path.write_text(json.dumps(document))
        manifest["files"][str(path.relative_to(out))] = path.stat().st_size
    (out / MANIFEST).write_text(json.dumps(manifest))


def nothing_made(machines: Machines) -> bool:
    """True if a refused import left nothing."""
    home = machines.folder / "home"
    left = [*(home / "machines").iterdir(), *(home / "disks").glob("*"), *(home / "snapshots").glob("*/*")]
    return not left


@pytest.mark.parametrize("snapshot", [False, True])
@pytest.mark.parametrize("register", [False, True])
def test_references_to_files_of_the_host(machines: Machines, out: Path, snapshot: bool, register: bool) -> None:
    """INV-IMPORT-CONFINED: all of them are listed with the options that allow them; with these they are reported and
    accepted."""
    secret = machines.folder / "secret.iso"
    secret.write_bytes(b"x" * 4096)
    link = machines.folder / "link.iso"
    link.symlink_to(secret)

    def reach(document: dict[str, Any]) -> None:
        drive = {**document["disks"][0], "id": "disk-9", "kind": "iso", "path": str(link), "controller": "ide",
                 "unit": 1, "serial": "x", "format": None, "read_only": True}  # fmt: skip
        document["disks"].append(drive)
        document |= {"kernel": "/etc/shadow", "background_capture": True}
        document["paths"] = {"disks": str(machines.folder / "home"), "snapshots": None}

    changed(out, reach, snapshot=snapshot)
    with pytest.raises(Refused, match="would reach outside") as refusal:
        import_machine(str(out), register=register)
    for option in (f"--map {link}=NEW", "--map /etc/shadow=NEW", "--allow background-capture",
                   f"--map {machines.folder / 'home'}=NEW"):  # fmt: skip
        assert option in str(refusal.value)
    assert nothing_made(machines)
    said: list[str] = []
    consent = Consent(
        {str(link): str(link), "/etc/shadow": "", str(machines.folder / "home"): ""},
        allow=frozenset(["background-capture"]),
    )
    with pytest.raises(InvalidSpec, match="nothing called 'nowhere'"):
        import_machine(str(out), consent=Consent({**consent.paths, "nowhere": ""}, allow=consent.allow))
    done = import_machine(str(out), register=register, consent=consent, announce=said.append)
    assert done.granted == tuple(said) and len(said) == 4
    web = registry.load("web")
    tree = load_tree(web.paths)
    spec = definition_of(tree.find("a")) if snapshot else web.spec
    drive = spec.disk("disk-9")
    assert drive is not None and drive.path == str(secret) and spec.kernel is None and spec.background_capture
    assert "/etc/shadow" not in spec.to_json().decode() and str(link) not in spec.to_json().decode()
    vmm.Manager().snapshots("web").apply("a", discard_current=True)


def test_disks_outside(machines: Machines, out: Path) -> None:
    """A raw disk, a VHD and a parent outside the folder are refused, also those of a snapshot."""
    host = machines.disk("host.vhd")
    before = host.read_bytes()
    keep = (out / MANIFEST).read_bytes()

    def add(document: dict[str, Any]) -> None:
        document["disks"].append({**document["disks"][0], "id": "disk-5", "unit": 1, "serial": "y", "format": "raw",
                                  "path": str(host), "read_only": False})  # fmt: skip

    for snapshot in (True, False):
        forged = out.with_name(f"forged-{snapshot}")
        shutil.copytree(out, forged)
        changed(forged, add, snapshot=snapshot)
        with pytest.raises(Refused, match="disk-5: the image"):
            import_machine(str(forged))
    manifest = json.loads(keep)
    child = out / "disks" / "child.avhd"
    vhdkit.clone(host, [child])
    manifest["images"]["disk-0"] = child.name
    manifest["files"]["disks/child.avhd"] = child.stat().st_size
    (out / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(vmm.StoreFailed, match=r"host\.vhd"):
        import_machine(str(out))
    assert nothing_made(machines) and host.read_bytes() == before


def test_records_are_not_imported(machines: Machines, out: Path) -> None:
    """A definition that names one of vhdkit's records is refused; a record that lies beside an image is left
    behind."""
    image = next((out / "disks").iterdir())
    record = out / "disks" / f".{image.name}.vhdkit-merge"
    record.write_text("{}")
    import_machine(str(out), name="one")
    assert not [name for name in os.listdir(machines.folder / "home" / "disks" / "one") if name.startswith(".")]
    manifest = json.loads((out / MANIFEST).read_text())
    manifest["files"][f"disks/{record.name}"] = 2
    (out / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(InvalidSpec, match="record of vhdkit"):
        import_machine(str(out), name="two")


def test_files_swapped_between_check_and_copy(machines: Machines, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """INV-IMPORT-CONFINED: the checked files are the ones that are imported, whatever is put in their place."""
    host = machines.disk("host.vhd")
    image = max((out / "disks").iterdir(), key=lambda path: path.stat().st_size)
    definition = next((out / "snapshots").glob("*/*.json"))

    def swap(*words: Any) -> None:
        judge_all(*words)
        document = json.loads(definition.read_text()) | {"kernel": "/etc/shadow"}
        definition.write_text(json.dumps(document))

    monkeypatch.setattr(importing, "judge_all", swap)
    import_machine(str(out), name="one")
    tree = load_tree(registry.load("one").paths)
    assert definition_of(tree.find("a")).kernel is None

    def put_link(*words: Any) -> None:
        judge_all(*words)
        image.unlink()
        image.symlink_to(host)

    before = host.read_bytes()
    (out / MANIFEST).write_bytes((out / MANIFEST).read_bytes())
    monkeypatch.setattr(importing, "judge_all", put_link)
    manifest = json.loads((out / MANIFEST).read_text())
    manifest["files"][str(definition.relative_to(out))] = definition.stat().st_size
    definition.write_text(definition.read_text().replace('"/etc/shadow"', "null"))
    manifest["files"][str(definition.relative_to(out))] = definition.stat().st_size
    (out / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(vmm.VmmError):
        import_machine(str(out), name="two")
    assert host.read_bytes() == before and vmm.Manager().names() == ["one"]
    assert not (machines.folder / "home" / "disks" / "two").exists()


def test_media_are_exported(machines: Machines) -> None:
    """Kernel, initrd and ISO images are in the folder, also those of snapshots; only we can read any of it."""
    for name in ("tools.iso", "vmlinuz", "initrd", "old.iso"):
        (machines.folder / name).write_bytes(name.encode() * 1000)
    old = os.umask(0)
    try:
        manager = vmm.Manager()
        disk = vmm.DiskRequest(str(machines.disk("a.vhd")))
        drive = vmm.DiskRequest(str(machines.folder / "old.iso"), kind="iso")
        manager.create("web", disks=[disk, drive], kernel=str(machines.folder / "vmlinuz"), memory_bytes=16 << 20,
                       initrd=str(machines.folder / "initrd"))  # fmt: skip
        manager.snapshots("web").create("a")
        manager.remove_disk("web", "disk-1")
        manager.add_disk("web", vmm.DiskRequest(str(machines.folder / "tools.iso"), kind="iso"))
        export("web", str(machines.folder / "out"))
        manager.delete("web", with_disks=True, with_snapshots=True)
        for name in ("tools.iso", "vmlinuz", "initrd", "old.iso"):
            (machines.folder / name).unlink()
        import_machine(str(machines.folder / "out"), name="copy")
    finally:
        os.umask(old)
    for folder in (machines.folder / "out", machines.folder / "home"):
        assert folder.stat().st_mode & 0o77 == 0
        for path in folder.rglob("*"):
            assert path.stat().st_mode & 0o77 == 0, path
    shutil.copytree(machines.folder / "out", machines.folder / "in-place")
    import_machine(str(machines.folder / "in-place"), name="placed", register=True)
    for name in ("copy", "placed"):
        machine = registry.load(name)
        tree = load_tree(machine.paths)
        then = definition_of(tree.find("a"))
        paths = [machine.spec.kernel, machine.spec.initrd, *(disk.path for disk in machine.spec.disks),
                 *(disk.path for disk in then.disks)]  # fmt: skip
        assert len({Path(str(path)).name for path in paths}) == 6 and all(os.path.isfile(str(path)) for path in paths)
        manager.snapshots(name).apply("a", discard_current=True)


def test_files_that_others_can_change_are_not_registered(machines: Machines, out: Path) -> None:
    """A folder that others can write to, or an image with a second name, is not used where it lies; a copy is made."""
    (out / "disks").chmod(0o777)
    with pytest.raises(Refused, match="other users"):
        import_machine(str(out), register=True)
    (out / "disks").chmod(0o700)
    image = next((out / "disks").iterdir())
    os.link(image, machines.folder / "other.vhd")
    with pytest.raises(Refused, match="second name"):
        import_machine(str(out), register=True)
    assert nothing_made(machines)
    import_machine(str(out), name="copy")


def test_of_two_imports_the_second_fails_without_damage(
    machines: Machines, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two imports with one name the second fails, and the disks of the first one stay."""
    states = []
    number = os.getpid() + 1

    def other_first(arrival: Any, disks: str) -> None:
        check_chains(arrival, disks)
        if disks.endswith(".part"):  # our copies are complete, and have no names yet
            monkeypatch.setattr(importing, "check_chains", check_chains)
            monkeypatch.setattr(os, "getpid", lambda: number)
            import_machine(str(out))
            states.append(machines.states("web"))

    monkeypatch.setattr(importing, "check_chains", other_first)
    with pytest.raises(AlreadyExists):
        import_machine(str(out))
    assert machines.states("web") == states[0]
    assert all(os.path.exists(path) for path in images_of(registry.load("web").spec).values())


def test_the_empty_folder_of_a_deleted_machine_is_reused(machines: Machines, out: Path) -> None:
    """A machine can be imported, deleted and imported again under the same name; a folder with content is left
    alone."""
    for _ in range(2):
        import_machine(str(out), name="again")
        vmm.Manager().delete("again", with_disks=True, with_snapshots=True)
    (machines.folder / "home/disks/again/kept").touch()
    with pytest.raises(AlreadyExists, match="in the way"):
        import_machine(str(out), name="again")
    assert (machines.folder / "home/disks/again/kept").exists()


def test_a_damaged_tree_is_a_damaged_export(out: Path) -> None:
    """The hint is not the one for a machine's tree, because the machine does not exist yet."""
    manifest = json.loads((out / MANIFEST).read_text())
    manifest["tree"]["snapshots"][0]["folder"] = 1
    (out / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(InvalidSpec, match="it does not describe a machine") as caught:
        import_machine(str(out), name="copy")
    assert caught.value.hint is None


def test_an_import_is_complete_or_absent(machines: Machines, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine is never visible without its snapshots: a failure between the two steps leaves nothing."""

    def fail(*words: Any, **more: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(importing, "_bring_files", fail)
    with pytest.raises(vmm.VmmError):
        import_machine(str(out))
    assert nothing_made(machines)


def test_an_id_that_shares_a_runtime_folder(machines: Machines, out: Path) -> None:
    """An id whose runtime folder is that of an existing machine is refused."""
    other = machines.create("other")
    del other
    spec = registry.load("other").spec
    changed(out, lambda document: document.__setitem__("id", spec.id[:-1] + ("0" if spec.id[-1] != "0" else "1")))
    with pytest.raises(AlreadyExists, match="the machine other"):
        import_machine(str(out), register=True)


def test_any_manifest(machines: Machines, out: Path) -> None:
    """INV-IMPORT-CONFINED: whatever a manifest or a definition says, it is refused with a message, or confined."""
    chance = random.Random(0)
    nasty: list[Any] = [
        None,
        True,
        -1,
        1e999,
        10**30,
        "",
        "/etc/passwd",
        "../x",
        "/disks/../x",
        "a\0b",
        [],
        {},
        [[]],
        "\ud800",
        "é" * 300,
    ]

    def spoil(document: Any) -> None:
        here = document
        while True:
            keys = list(here) if isinstance(here, dict) else list(range(len(here)))
            if not keys:
                return
            key = chance.choice(keys)
            if isinstance(here[key], dict | list) and chance.random() < 0.8:
                here = here[key]
                continue
            if isinstance(here, dict) and chance.random() < 0.2:
                here[chance.choice(["/etc/passwd", "../x", "x"])] = here.pop(key)
            else:
                here[key] = chance.choice(nasty)
            return

    good = (out / MANIFEST).read_text()
    inner = next((out / "snapshots").glob("*/*.json"))
    inside = inner.read_text()
    for _ in range(400):
        manifest, definition = json.loads(good), json.loads(inside)
        spoil(definition if chance.random() < 0.3 else manifest)
        inner.write_text(json.dumps(definition))
        if chance.random() < 0.9 and isinstance(manifest.get("files"), dict):
            manifest["files"][str(inner.relative_to(out))] = inner.stat().st_size
        (out / MANIFEST).write_text(json.dumps(manifest))
        with Inside(str(out)) as folder, contextlib.suppress(vmm.VmmError):
            arrival = look_at_export(folder)
            judge_all(arrival, Consent(), lambda words: None)
            check_chains(arrival, str(out / "disks"))
            for spec in arrival.judged.values():
                paths = [
                    *(disk.path for disk in spec.disks),
                    spec.kernel,
                    spec.initrd,
                    *spec.paths.model_dump().values(),
                ]
                assert all(path is None or Path(path).resolve().is_relative_to(out) for path in paths)
