# SPDX-License-Identifier: Apache-2.0
"""Machines as files: whole or not at all, one command at a time, one writer for each image."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vmm.model import paths
from vmm.model.errors import AlreadyExists, InUse, InvalidSpec, NotFound
from vmm.model.spec import MachineSpec, make_spec
from vmm.store import registry


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of the test's own."""
    monkeypatch.setenv("VMM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("VMM_RUNTIME", "/tmp/vmm-test-run")
    return tmp_path / "home"


def spec(name: str, *images: Path, **settings: object) -> MachineSpec:
    """A machine with these images."""
    disks = [{"id": f"disk-{n}", "path": str(path), "unit": n, **settings} for n, path in enumerate(images)]
    return make_spec(name=name, disks=disks)


def test_added_found_saved_and_removed(own_home: Path) -> None:
    """A machine is there until it is removed, with what was last saved."""
    assert registry.names() == []
    machine = registry.add(spec("web"))
    assert registry.names() == ["web"] and registry.load("web").spec == machine.spec
    with registry.changing("web") as machine:
        registry.save(machine, machine.spec.changed(cpu_count=3))
    assert registry.load("web").spec.cpu_count == 3
    with registry.changing("web") as machine:
        registry.remove(machine)
    assert registry.names() == [] and os.listdir(own_home / "machines") == []


def test_name_that_is_taken_or_in_the_way(own_home: Path) -> None:
    """No machine replaces another, or a folder that is none of ours."""
    registry.add(spec("web"))
    with pytest.raises(AlreadyExists, match="of that name"):
        registry.add(spec("web"))
    (own_home / "machines" / "db").mkdir()
    with pytest.raises(AlreadyExists):
        registry.add(spec("db"))
    assert not list((own_home / "machines").glob(".*"))


def test_too_long_names_of_sockets_are_told_before(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose sockets could not be made is not defined, and nothing is left of it."""
    monkeypatch.setenv("VMM_RUNTIME", "/tmp/" + "r" * 90)
    with pytest.raises(InvalidSpec, match=r"too long for sockets.*VMM_RUNTIME"):
        registry.add(spec("web"))
    assert registry.names() == [] and not own_home.exists()


def test_a_folder_elsewhere(tmp_path: Path, own_home: Path) -> None:
    """A machine may lie elsewhere: a link leads there, and goes with it; a lost folder is told as that."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    machine = registry.add(spec("web"), folder=str(elsewhere))
    assert machine.paths.folder == str(elsewhere / "web")
    assert (own_home / "machines" / "web").is_symlink()
    elsewhere.rename(tmp_path / "unmounted")
    with pytest.raises(NotFound, match="is its disk mounted"):
        registry.load("web")
    (tmp_path / "unmounted").rename(elsewhere)
    with registry.changing("web") as found:
        registry.remove(found)
    assert os.listdir(elsewhere) == [] and registry.names() == []


def test_renamed(own_home: Path) -> None:
    """The folder and the definition have the new name; a taken name is refused; a rename cut short is completed."""
    registry.add(spec("web"))
    registry.add(spec("db"))
    with registry.changing("web") as machine:
        with pytest.raises(AlreadyExists):
            registry.rename(machine, machine.spec.changed(name="db"))
        registry.rename(machine, machine.spec.changed(name="www"))
    assert registry.names() == ["db", "www"] and registry.load("www").spec.id == machine.spec.id
    (own_home / "machines" / "www").rename(own_home / "machines" / "cut")
    assert registry.load("cut").spec.name == "cut"


def test_one_command_at_a_time() -> None:
    """While one changes a machine another is refused; afterwards it may."""
    registry.add(spec("web"))
    with registry.changing("web"), pytest.raises(InUse, match="another vmm command"), registry.changing("web"):
        pass
    with registry.changing("web") as machine:
        assert machine.name == "web"


@pytest.mark.parametrize("name", ["", "..", "../web", "a/b", ".hidden", "absent", "a\0b", "a\nb"])
def test_names_that_are_not_there(name: str) -> None:
    """No text leads out of the registry; it is a machine that is not there, in one line."""
    with pytest.raises(NotFound, match="there is no machine") as caught:
        registry.load(name)
    assert "\n" not in str(caught.value)


def test_damaged_definitions_are_listed(own_home: Path) -> None:
    """One that cannot be read does not hide the others."""
    registry.add(spec("web"))
    registry.add(spec("db"))
    (own_home / "machines" / "db" / "machine.json").write_text("{")
    machines, failures = registry.load_all()
    assert [one.name for one in machines] == ["web"]
    assert [type(one) for one in failures] == [InvalidSpec] and failures[0].machine == "db"


def test_one_writer_for_each_image(tmp_path: Path) -> None:
    """An image of another machine's is refused by whatever name, unless both only read it; changes are looked at."""
    image, other = tmp_path / "a.vhd", tmp_path / "b.vhd"
    image.write_bytes(b"")
    other.write_bytes(b"")
    os.link(image, tmp_path / "hard.vhd")
    (tmp_path / "soft.vhd").symlink_to(image)
    registry.add(spec("web", image))
    for name in ("a.vhd", "hard.vhd", "soft.vhd", "./a.vhd"):
        with pytest.raises(InUse, match=r"is a disk of the machine web already .*vhdkit create"):
            registry.add(spec("db", tmp_path / name))
    with pytest.raises(InUse, match="twice"):
        registry.add(spec("db", other, tmp_path / "b.vhd"))
    with pytest.raises(InUse):
        registry.add(spec("db", image, read_only=True))
    db = registry.add(spec("db", other, read_only=True))
    registry.add(spec("ro", other, read_only=True))
    with registry.changing("db") as held, pytest.raises(InUse):
        registry.save(held, spec("db", image).changed(id=db.spec.id))
    assert registry.load("db").spec == db.spec
    assert registry.names() == ["db", "ro", "web"]
    assert paths.registry_folder().endswith("machines")
