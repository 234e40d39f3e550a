# SPDX-License-Identifier: Apache-2.0
"""A machine's folder that was copied beside the original: which is which, and every verb knows. INV-COPY-APART."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import vhdkit
from tests.vmm.small_guests import make_machine, wait_counting, wait_state
from vmm.api.export_import.exporting import export
from vmm.api.manager import DiskRequest, Manager
from vmm.host.proc import ProcessRef
from vmm.model.errors import AlreadyExists, Refused, WrongState
from vmm.model.spec import make_spec
from vmm.snapshots.background_merge import Fold
from vmm.store import registry
from vmm.store.copies import original_of
from vmm.store.snapshots.store import tree_path
from vmm.store.snapshots.tree import Snapshot, Tree
from vmm.store.state import MachineState, SupervisorNote

_ID = "0" * 8 + "-0000" * 3 + "-" + "0" * 12


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home for this test."""
    monkeypatch.setenv("VMM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("VMM_RUNTIME", str(tmp_path / "run"))
    return tmp_path


def add(name: str = "web", *images: Path) -> registry.Machine:
    """Add a machine with these images, which are made."""
    for image in images:
        vhdkit.create_image(image, 1 << 20)
    disks = [{"id": f"disk-{n}", "path": str(image), "unit": n} for n, image in enumerate(images)]
    return registry.add(make_spec(name=name, disks=disks))


def copied(name: str = "web", to: str = "copy", *, renamed: bool = False) -> Path:
    """A copy of its folder; with the copy's name in its definition or not."""
    machine = registry.load(name)
    folder = Path(machine.paths.folder).with_name(to)
    shutil.copytree(machine.paths.folder, folder, symlinks=True)
    if renamed:
        definition = folder / "machine.json"
        definition.write_text(json.dumps(json.loads(definition.read_text()) | {"name": to}))
    return folder


@contextlib.contextmanager
def running(machine: registry.Machine) -> Iterator[None]:
    """A process that looks like the machine's supervisor."""
    program = "import sys; print(flush=True); sys.stdin.read()"
    words = [sys.executable, "-c", program, "vmm.processes.supervisor", machine.paths.folder]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == b"\n"  # its command line is set
            os.makedirs(machine.runtime.folder)
            SupervisorNote(supervisor=ProcessRef.of(process.pid)).write(machine.runtime)
            yield
        finally:
            process.kill()


def test_a_list_reads_each_definition_a_few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Listing many machines looks for copies in each definition a few times, not once per machine; a copy is still
    found."""
    count = 12
    for number in range(count):
        add(f"web{number}")
    copied("web3")
    opened: list[object] = []

    def counting(path: str, *args: Any, **options: Any) -> Any:
        opened.append(path)
        return open(path, *args, **options)

    monkeypatch.setattr("vmm.store.copies.open", counting, raising=False)
    found = {one.name: one.copy_of for one in Manager().machines()}
    assert found["copy"] == "web3" and not any(found[f"web{number}"] for number in range(count))
    assert len(opened) <= 5 * (count + 1)


def test_the_copy_has_the_originals_name_in_its_definition() -> None:
    """A copied folder is recognised by the name in its definition; the original stays the original."""
    add()
    assert original_of("web") is None
    copied()
    assert (original_of("web"), original_of("copy"), original_of("absent")) == (None, "web", None)


def test_the_running_one_is_the_original() -> None:
    """If both definitions have the right names, the processes decide which machine has the id; without any, neither
    has."""
    web = add()
    copied(renamed=True)
    assert (original_of("web"), original_of("copy")) == ("copy", "web")
    with running(web):
        assert (original_of("web"), original_of("copy")) == (None, "web")


def test_a_renamed_original_is_found_by_its_processes() -> None:
    """The folder's name may differ from the one in the definition: the running processes are considered first."""
    folder = Path(add().paths.folder)
    folder.rename(folder.with_name("site"))
    copied("site", "web")
    assert (original_of("site"), original_of("web")) == ("web", None)
    with running(registry.load("site")):
        assert (original_of("site"), original_of("web")) == (None, "site")


def test_an_id_is_added_only_once(home: Path) -> None:
    """For example, two concurrent imports of one folder give one machine."""
    spec = add().spec
    with pytest.raises(AlreadyExists, match="same id as the machine web"):
        registry.add(spec.changed(name="db"))


VERBS: dict[str, Callable[[Path], object]] = {
    "set": lambda folder: Manager().set("copy", cpu_count=2),
    "rename": lambda folder: Manager().set("copy", name="other"),
    "start": lambda folder: Manager().start("copy"),
    "stop": lambda folder: Manager().stop("copy"),
    "shutdown": lambda folder: Manager().shutdown("copy"),
    "save": lambda folder: Manager().save("copy"),
    "pause": lambda folder: Manager().pause("copy"),
    "resume": lambda folder: Manager().resume("copy"),
    "reset": lambda folder: Manager().reset("copy"),
    "discard_saved": lambda folder: Manager().discard_saved("copy"),
    "delete": lambda folder: Manager().delete("copy", with_disks=True, with_snapshots=True),
    "add_disk": lambda folder: Manager().add_disk("copy", DiskRequest(str(folder / "more.vhd"))),
    "remove_disk": lambda folder: Manager().remove_disk("copy", "disk-0"),
    "resize_disk": lambda folder: Manager().resize_disk("copy", "disk-0", 2 << 20),
    "add_adapter": lambda folder: Manager().add_adapter("copy"),
    "remove_adapter": lambda folder: Manager().remove_adapter("copy", "nic-0"),
    "change_adapter": lambda folder: Manager().change_adapter("copy", "nic-0", link_up=False),
    "repair": lambda folder: Manager().repair("copy"),
    "backup": lambda folder: Manager().save_night("copy", str(folder / "backup")),
    "export": lambda folder: export("copy", str(folder / "export")),
    "ping": lambda folder: Manager().guest("copy").ping(),
    "freeze": lambda folder: Manager().guest("copy").freeze(),
    "set_item": lambda folder: Manager().guest("copy").set_item("key", "value"),
    "delete_item": lambda folder: Manager().guest("copy").delete_item("key"),
    "create": lambda folder: Manager().snapshots("copy").create("new"),
    "apply": lambda folder: Manager().snapshots("copy").apply("one", discard_current=True),
    "delete snapshot": lambda folder: Manager().snapshots("copy").delete("one"),
    "forget_memory": lambda folder: Manager().snapshots("copy").forget_memory("one"),
    "merge": lambda folder: Manager().snapshots("copy").merge(),
    "merge_live": lambda folder: Manager().snapshots("copy").merge_live(),
    "cancel_merge": lambda folder: Manager().snapshots("copy").cancel_merge(),
    "rename snapshot": lambda folder: Manager().snapshots("copy").rename("one", "other"),
    "annotate": lambda folder: Manager().snapshots("copy").annotate("one", "text"),
    "set_limit": lambda folder: Manager().snapshots("copy").set_limit(7),
    "fold": lambda folder: Fold(registry.load("copy").paths, registry.load("copy").runtime).run(),
}


def files_of(folder: Path) -> dict[str, bytes]:
    """All files in the folder and below it."""
    found = {str(one.relative_to(folder)): one.read_bytes() for one in folder.rglob("*") if one.is_file()}
    return {name: content for name, content in found.items() if not name.endswith("lock")}


def test_every_verb_refuses_a_copy(home: Path) -> None:
    """No verb does anything with a copy; the refusal says what to do, and no file changes. INV-COPY-APART."""
    web = add("web", home / "a.vhd")
    vhdkit.create_image(home / "more.vhd", 1 << 20)
    snapshot = Snapshot(
        id=_ID, name="one", created=0.0, parent=None, folder=str(home / "s" / _ID),
        disks={"disk-0": str(home / "a.vhd")}, taken_in="off", memory_bytes=1,
    )  # fmt: skip
    Path(tree_path(web.paths)).write_bytes(Tree({snapshot.id: snapshot}, snapshot.id).to_json())
    (home / "s" / _ID).mkdir(parents=True)
    (home / "s" / _ID / "x.bin").write_bytes(b"m")
    copied()
    before = files_of(home)
    for name, verb in VERBS.items():
        with pytest.raises(Refused, match=r"same id as the machine web: .*\(vmm set copy --new-id "):
            verb(home)
            pytest.fail(f"{name} did something with a copy")
        assert files_of(home) == before, name


def test_the_original_can_be_used_as_before(home: Path) -> None:
    """A copy beside it never leads to a refusal for the original, but images that both name are not removed."""
    add("web", home / "a.vhd")
    copied()
    manager = Manager()
    manager.set("web", cpu_count=3)
    assert manager.show("web").copy_of is None and registry.load("web").spec.cpu_count == 3
    plan = manager.delete("web", with_disks=True)
    assert plan.disks == () and (home / "a.vhd").exists()
    assert original_of("copy") is None, "the original is the only machine left"


def test_a_copy_is_shown_as_a_copy(home: Path) -> None:
    """List and show name the original of the copy, and never report the copy as running."""
    web = add()
    copied()
    with running(web):
        info = Manager().show("copy")
        assert (info.state, info.copy_of, info.pids) == (MachineState.OFF, "web", None)
        assert Manager().state("copy") is MachineState.OFF
        assert [one.copy_of for one in Manager().machines() if one.name == "copy"] == ["web"]


def test_a_copy_does_not_reach_the_running_guest(manager: Manager, tmp_path: Path) -> None:
    """It can neither stop nor save nor query it: the guest keeps counting. With its own id the copy is a machine."""
    leaf = make_machine(manager, tmp_path)
    manager.start("small")
    wait_counting(manager)
    copied("small", "copy", renamed=True)
    for verb in (manager.stop, manager.save, manager.shutdown, manager.pause, manager.delete):
        with pytest.raises(Refused, match="--new-id"):
            verb("copy")
    assert manager.show("copy").state is MachineState.OFF
    done = manager.new_id("copy")
    assert [(one.disk, one.path) for one in done.taken_out] == [("disk-0", str(leaf))] and done.disks == ()
    with pytest.raises(WrongState, match="is off"):
        manager.stop("copy")
    manager.delete("copy", with_disks=True)
    wait_counting(manager)
    manager.stop("small")
    wait_state(manager, MachineState.OFF, "small")
