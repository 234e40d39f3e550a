# SPDX-License-Identifier: Apache-2.0
"""A copied machine becomes an independent one: nothing of its original changes, and nothing is lost."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

import vhdkit
from tests.harness.killing import killings
from tests.vmm.store.test_copies import add, copied, files_of
from vmm.api.manager import Manager
from vmm.api.new_id import OwnDisk, TakenOut
from vmm.cli.main import main
from vmm.model.errors import Refused, WrongState
from vmm.model.spec import make_spec
from vmm.store import registry
from vmm.store.copies import original_of
from vmm.store.snapshots.store import has_tree, load_tree


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home for this test."""
    monkeypatch.setenv("VMM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("VMM_RUNTIME", str(tmp_path / "run"))
    return tmp_path


def test_disks_of_the_original_are_taken_out(home: Path) -> None:
    """A disk that both name stays with the original; MAC addresses are new; the original's files do not change."""
    add("web", home / "a.vhd")
    Manager().add_adapter("web")
    copied()
    before = files_of(home / "home" / "machines" / "web")
    done = Manager().new_id("copy")
    web, copy = registry.load("web").spec, registry.load("copy").spec
    assert done.taken_out == (TakenOut("disk-0", str(home / "a.vhd"), "the machine web needs it"),)
    assert copy.disks == () and copy.id == done.id != web.id and copy.name == "copy"
    assert copy.adapters[0].mac != web.adapters[0].mac
    assert files_of(home / "home" / "machines" / "web") == before
    assert original_of("copy") is None and done.aside is None
    with pytest.raises(WrongState, match="only machine with its id"):
        Manager().new_id("copy")


def test_images_copied_with_the_folder_belong_to_the_copy(home: Path) -> None:
    """An image in the machine's folder was copied with it: the copy gets that image, with its content."""
    web = add("web")
    image = Path(web.paths.folder) / "disks" / "a.vhd"
    image.parent.mkdir()
    vhdkit.create_image(image, 1 << 20)
    with registry.changing("web") as machine:
        disks = make_spec(name="x", disks=[{"id": "disk-0", "path": str(image)}]).disks
        registry.save(machine, machine.spec.changed(disks=disks))
    folder = copied()
    done = Manager().new_id("copy")
    assert done.disks == (OwnDisk("disk-0", str(folder / "disks" / "a.vhd")),) and done.taken_out == ()
    with pytest.raises(Refused, match="would be lost with it: the machine copy needs it"):
        Manager().delete("copy")
    assert Manager().delete("copy", with_disks=True).disks == (str(folder / "disks" / "a.vhd"),)
    assert image.exists()


def test_snapshots_and_memory_are_set_aside(home: Path) -> None:
    """The copied tree belongs to the original: the copy has none, and its copied files are moved to a separate
    folder."""
    add("web", home / "a.vhd")
    Manager().snapshots("web").create("one")
    web = registry.load("web")
    os.mkdir(web.paths.saved)
    Path(web.paths.saved, "memory.bin").write_bytes(b"memory")
    folder = copied()
    done = Manager().new_id("copy")
    assert done.aside == str(folder / f"of-{web.spec.id}")
    assert sorted(os.listdir(done.aside)) == ["saved", "snapshots.json"]
    copy = registry.load("copy")
    assert not has_tree(copy.paths) and copy.spec.disks == ()
    one = load_tree(web.paths).find("one")
    Manager().delete("copy", with_disks=True)
    assert os.path.isdir(one.folder) and all(map(os.path.exists, one.disks.values()))


def test_after_a_kill_it_is_a_copy_or_a_machine(home: Path) -> None:
    """If it is interrupted it is still a copy, and doing it again finishes it; the original never changes."""
    add("web", home / "a.vhd")
    Manager().snapshots("web").create("one")
    folder = copied()
    before = files_of(home / "home" / "machines" / "web")
    pristine = home / "pristine"
    shutil.copytree(folder, pristine)
    ended = 0
    for number in killings(lambda: Manager().new_id("copy"), step=2):
        if original_of("copy") is not None:
            Manager().new_id("copy")
        ended += number < 0
        assert registry.load("copy").spec.id != registry.load("web").spec.id
        assert not has_tree(registry.load("copy").paths) and registry.load("copy").spec.disks == ()
        assert files_of(home / "home" / "machines" / "web") == before
        shutil.rmtree(folder)
        shutil.copytree(pristine, folder)
    assert ended == 1


def test_on_the_command_line(home: Path) -> None:
    """The hint in the refusal works, and says what happened to the disks; list says which machine is a copy."""
    add("web", home / "a.vhd")
    copied()
    run = CliRunner()
    assert "a copy of web: vmm set copy --new-id" in run.invoke(main, ["list"]).output
    done = run.invoke(main, ["set", "copy", "--new-id", "--cpus", "2"])
    assert done.exit_code == 0, done.output
    assert "copy is now a machine separate from web" in done.output and "the machine web needs it" in done.output
    assert registry.load("copy").spec.cpu_count == 2
