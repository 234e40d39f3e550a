# SPDX-License-Identifier: Apache-2.0
"""Machines exported to folders and imported from them, and folders that are not valid exports."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import vhdkit
import vmm
from tests.vmm.discs import make_iso
from tests.vmm.snapshots.machines import Machines, each_kind, each_kind_nightly
from vmm.api.export_import.exporting import MANIFEST, export
from vmm.api.export_import.foreign import Consent
from vmm.api.export_import.importing import import_machine
from vmm.kvm import memory_file
from vmm.model.errors import AlreadyExists, InvalidSpec, NotFound, Refused
from vmm.snapshots.dependents import images_of
from vmm.store import registry, saved
from vmm.store.media import media_of


@pytest.fixture
def out(machines: Machines) -> Iterator[Path]:
    """The place for exports, which can be moved."""
    yield machines.folder / "out"


def built(machines: Machines) -> dict[str | None, dict[str, str]]:
    """A machine on a shared base, with a branch; and the content of its states."""
    base = machines.disk(f"base.{machines.kind}")
    (machines.folder / "own").mkdir()
    one = machines.folder / f"one.a{machines.kind}"
    vhdkit.clone(base, [one])
    web = machines.create("web", [one, machines.disk(f"data.{machines.kind}")])
    for name in ("a", "b"):
        web.create(name, notes=f"notes of {name}")
        machines.write("web", 4096, name.encode() * 512)
    web.apply("a", discard_current=True)
    machines.write("web", 8192, b"now" * 512)
    return machines.states("web")


@each_kind
def test_whole_machine_as_a_copy(machines: Machines, out: Path) -> None:
    """The copy has every state of the original, its own files and id, and needs nothing from the export."""
    states = built(machines)
    done = export("web", str(out))
    assert (done.images, done.snapshots) == (7, 2)
    elsewhere = machines.folder / "moved"
    out.rename(elsewhere)
    import_machine(str(elsewhere), name="copy")
    shutil.rmtree(elsewhere)
    assert machines.states("copy") == states
    copy, web = registry.load("copy").spec, registry.load("web").spec
    assert copy.id != web.id and not set(images_of(copy).values()) & set(images_of(web).values())
    snapshots = vmm.Manager().snapshots("copy")
    assert snapshots.find("b").notes == "notes of b" and snapshots.tree().now == snapshots.find("a").id
    for name in ("a", "b"):
        states.pop(snapshots.delete(name).snapshots[0].id)
    machines.merge("copy")
    assert machines.states("copy") == states
    assert {Path(path).name for path in images_of(copy).values()} and not snapshots.tree().images
    # and copies of its images on this host do not affect the original
    original = vmm.Manager().snapshots("web")
    for name in ("b", "a"):
        original.delete(name)
    machines.merge("web")
    assert original.merges_due() == 0 and not original.tree().images


@each_kind_nightly
def test_registering_in_place_keeps_the_id(machines: Machines, out: Path) -> None:
    """A machine registered where it lies is the same one, with its id; beside the original that is refused."""
    states = built(machines)
    export("web", str(out))
    elsewhere = machines.folder / "moved"
    out.rename(elsewhere)
    with pytest.raises(AlreadyExists, match="of that name"):
        import_machine(str(elsewhere), register=True)
    with pytest.raises(AlreadyExists, match="already the machine web"):
        import_machine(str(elsewhere), name="other", register=True)
    old = registry.load("web").spec.id
    vmm.Manager().delete("web", with_snapshots=True, with_disks=True)
    import_machine(str(elsewhere), register=True)
    web = registry.load("web").spec
    assert web.id == old and machines.states("web") == states
    assert all(Path(path).parent == elsewhere / "disks" for path in images_of(web).values())
    vmm.Manager().snapshots("web").apply("b", discard_current=True)


@each_kind_nightly
def test_flat_and_one_snapshot(machines: Machines, out: Path) -> None:
    """A flat export has one image per disk; a single exported snapshot becomes a machine in the state of that time."""
    states = built(machines)
    b = vmm.Manager().snapshots("web").find("b").id
    for number, (snapshot, flat) in enumerate(((None, True), ("b", True), ("b", False))):
        target = machines.folder / f"out{number}"
        done = export("web", str(target), snapshot=snapshot, flat=flat)
        assert done.images == (2 if flat else 5) and done.snapshots == 0
        import_machine(str(target), name=f"copy{number}")
        assert machines.now(f"copy{number}") == states[None if snapshot is None else b]
        machines.write(f"copy{number}", 0, b"written" * 20)
    assert machines.states("web") == states


def test_a_folder_with_the_temporary_name_of_an_export_is_kept(machines: Machines, out: Path) -> None:
    """Such a folder is the user's: the error names it, and it is left as it is."""
    machines.create()
    part = Path(f"{out}.part")
    part.mkdir()
    (part / "thesis").write_text("precious")
    with pytest.raises(AlreadyExists, match="in the way") as refused:
        export("web", str(out))
    assert refused.value.path == str(part) and (part / "thesis").read_text() == "precious" and not out.exists()


def test_folders_that_are_not_exports(machines: Machines, out: Path) -> None:
    """The error says what is wrong and in which file, and neither a machine nor a file is made."""
    with pytest.raises(NotFound, match="no such folder"):
        import_machine(str(out))
    with pytest.raises(NotFound, match=r"no vmm-export\.json"):
        import_machine(str(machines.folder))
    built(machines)
    export("web", str(out))
    with pytest.raises(AlreadyExists):
        export("web", str(out))
    with pytest.raises(NotFound):
        export("web", str(machines.folder / "nowhere" / "x"))
    manifest = out / MANIFEST
    good = manifest.read_text()
    image = next((out / "disks").glob("*.avhd"))
    content = image.read_bytes()

    def expect(problem: str, error: type[vmm.VmmError] = InvalidSpec) -> None:
        with pytest.raises(error, match=problem):
            import_machine(str(out), name="copy")
        assert vmm.Manager().names() == ["web"] and not (machines.folder / "home" / "disks" / "copy").exists()

    for text in ("", "[]", "{}", good[:-100], good.replace('"format": 1', '"format": 2')):
        manifest.write_text(text)
        expect("export|version")
    for wrong in ("/etc/passwd", "../x", "disks/../../x"):
        document = json.loads(good)
        document["files"][wrong] = 1
        manifest.write_text(json.dumps(document))
        expect("outside")
    document = json.loads(good)
    document["images"]["disk-0"] = "../../home/x"
    manifest.write_text(json.dumps(document))
    expect("outside")
    manifest.write_text(good.replace("/disks/", "/../disks/"))
    expect("outside|damaged")
    manifest.write_text(good)
    image.write_bytes(content[:-1])
    expect("bytes instead of")
    image.unlink()
    expect("missing", NotFound)
    image.symlink_to("/etc/passwd")
    expect("a link")
    image.unlink()
    image.write_bytes(bytes(len(content)))
    expect("VHD|footer|read", vmm.VmmError)
    image.write_bytes(content)
    import_machine(str(out), name="copy")


def test_saved_memory_is_exported(machines: Machines, out: Path) -> None:
    """A saved machine arrives as saved, and its memory fits the machine that was imported."""
    web = machines.create()
    saved = machines.folder / "home" / "machines" / "web" / "saved"
    saved.mkdir()
    (saved / "memory.bin").write_bytes(memory_file.HEADER + bytes(5992))
    definition = json.loads(registry.load("web").spec.to_json())
    (saved / "state.json").write_text(json.dumps({
        "format": 1, "saved_at": 1.0, "qemu_version": "7.2.0", "accelerator": "tcg", "was_running": True,
        "memory_file_bytes": 6000, "definition": definition,
    }))  # fmt: skip
    web.create("a")
    export("web", str(out))
    import_machine(str(out), name="copy")
    manager = vmm.Manager()
    assert manager.state("copy") is vmm.MachineState.SAVED
    copy = registry.load("copy")
    state = json.loads((Path(copy.paths.saved) / "state.json").read_text())
    assert state["definition"]["id"] == copy.spec.id and state["definition"]["name"] == "copy"
    manager.discard_saved("copy")
    assert manager.snapshots("copy").apply("a", discard_current=True).state == "saved"


def test_progress_is_reported_in_bytes(machines: Machines, out: Path) -> None:
    """Export and import report how many bytes are copied, of images, snapshots and media together."""
    make_iso(machines.folder / "one.iso", "first")
    web = machines.create()
    vmm.Manager().add_disk("web", vmm.DiskRequest(str(machines.folder / "one.iso"), kind="iso"))
    web.create("a")
    exported: list[dict[str, Any]] = []
    imported: list[dict[str, Any]] = []
    export("web", str(out), progress=exported.append)
    import_machine(str(out), name="copy", progress=imported.append)
    for reports in (exported, imported):
        assert "copying images" in {one["step"] for one in reports}
        done, totals = [one["done"] for one in reports], {one["total"] for one in reports}
        assert done == sorted(done) and min(totals) > 256 << 10 and done[0] == 0


def test_saved_memory_without_its_medium_and_kernel(machines: Machines, out: Path) -> None:
    """What the user left out of an import is not required by its memory: the guest is notified, and continues."""
    image, kernel = make_iso(machines.folder / "one.iso", "first"), make_iso(machines.folder / "vmlinuz", "kernel")
    machines.create(kernel=str(kernel))
    vmm.Manager().add_disk("web", vmm.DiskRequest(str(image), kind="iso"))
    web = registry.load("web")
    known = media_of(web.spec)
    saved_folder = Path(web.paths.saved)
    saved_folder.mkdir()
    (saved_folder / "memory.bin").write_bytes(memory_file.HEADER + bytes(5992))
    (saved_folder / "state.json").write_text(json.dumps({
        "format": 1, "saved_at": 1.0, "qemu_version": "7.2.0", "accelerator": "tcg", "was_running": True,
        "memory_file_bytes": 6000, **saved.machine_document(web.spec, known, {}),
    }))  # fmt: skip
    image.unlink()
    kernel.unlink()
    export("web", str(out))
    import_machine(str(out), name="copy", consent=Consent({str(image): "", str(kernel): ""}))
    copy = registry.load("copy")
    descriptor, description = saved.open_saved_memory(copy.paths, copy.spec, "7.2.0")
    os.close(descriptor)
    assert description.had_kernel and copy.spec.kernel is None
    assert description.media == known and description.accepted == {"disk-1": None}
    with pytest.raises(Refused, match="the saved memory is kept"):
        saved.open_saved_memory(web.paths, web.spec, "7.2.0")


def test_a_copy_has_its_own_mac_addresses(machines: Machines, out: Path) -> None:
    """They come from the host's pool and are unique; files registered in place, and saved memory, keep the old
    ones."""
    machines.create()
    manager = vmm.Manager()
    for _ in range(2):
        manager.add_adapter("web", switch=None)
    old = [one.mac for one in registry.load("web").spec.adapters]
    export("web", str(out))
    import_machine(str(out), name="copy")
    import_machine(str(out), name="another")
    new = [one.mac for name in ("copy", "another") for one in registry.load(name).spec.adapters]
    assert None not in new and len({*old, *new}) == 6
    manager.delete("web")
    import_machine(str(out), register=True)
    assert [one.mac for one in registry.load("web").spec.adapters] == old
