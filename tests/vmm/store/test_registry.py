# SPDX-License-Identifier: Apache-2.0
"""Machines as files: complete or absent, one command at a time, one writer for each image."""

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
    """A home for this test."""
    monkeypatch.setenv("VMM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("VMM_RUNTIME", "/tmp/vmm-test-run")
    return tmp_path / "home"


def spec(name: str, *images: Path, **settings: object) -> MachineSpec:
    """A machine with these images."""
    disks = [{"id": f"disk-{n}", "path": str(path), "unit": n, **settings} for n, path in enumerate(images)]
    return make_spec(name=name, disks=disks)


def test_a_machine_is_added_found_saved_and_removed(own_home: Path) -> None:
    """A machine exists until it is removed, with the definition that was last saved."""
    assert registry.names() == []
    machine = registry.add(spec("web"))
    assert registry.names() == ["web"] and registry.load("web").spec == machine.spec
    with registry.changing("web") as machine:
        registry.save(machine, machine.spec.changed(cpu_count=3))
    assert registry.load("web").spec.cpu_count == 3
    with registry.changing("web") as machine:
        registry.remove(machine)
    assert registry.names() == [] and os.listdir(own_home / "machines") == []


def test_a_name_that_is_taken(own_home: Path) -> None:
    """A machine never replaces another one, or a foreign folder."""
    registry.add(spec("web"))
    with pytest.raises(AlreadyExists, match="of that name"):
        registry.add(spec("web"))
    (own_home / "machines" / "db").mkdir()
    with pytest.raises(AlreadyExists):
        registry.add(spec("db"))
    assert not list((own_home / "machines").glob(".*"))


def test_too_long_socket_names_are_refused_beforehand(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose sockets could not be made is not defined, and nothing of it is left."""
    monkeypatch.setenv("VMM_RUNTIME", "/tmp/" + "r" * 90)
    with pytest.raises(InvalidSpec, match=r"too long for sockets.*VMM_RUNTIME"):
        registry.add(spec("web"))
    assert registry.names() == [] and not own_home.exists()


def test_a_machine_in_another_folder(tmp_path: Path, own_home: Path) -> None:
    """A link leads to it, and is removed with it; a lost folder is reported as such."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    machine = registry.add(spec("web"), folder=str(elsewhere))
    assert machine.paths.folder == str(elsewhere / "web")
    assert (own_home / "machines" / "web").is_symlink()
    elsewhere.rename(tmp_path / "unmounted")
    with pytest.raises(NotFound, match="is its file system mounted"):
        registry.load("web")
    (tmp_path / "unmounted").rename(elsewhere)
    with registry.changing("web") as found:
        registry.remove(found)
    assert os.listdir(elsewhere) == [] and registry.names() == []


def test_renaming(own_home: Path) -> None:
    """The folder and the definition have the new name; a taken name is refused; an interrupted rename is completed."""
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
    """While one command changes a machine another is refused; afterwards it is allowed."""
    registry.add(spec("web"))
    with registry.changing("web"), pytest.raises(InUse, match="another vmm command"), registry.changing("web"):
        pass
    with registry.changing("web") as machine:
        assert machine.name == "web"


@pytest.mark.parametrize("name", ["", "..", "../web", "a/b", ".hidden", "absent", "a\0b", "a\nb"])
def test_unknown_names(name: str) -> None:
    """No text leads out of the registry; it is an unknown machine, reported in one line."""
    with pytest.raises(NotFound, match=r"machine .* does not exist") as caught:
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
    """Another machine's image is refused, under any of its names, unless both only read it; changes are checked,
    too."""
    image, other = tmp_path / "a.vhd", tmp_path / "b.vhd"
    image.write_bytes(b"")
    other.write_bytes(b"")
    os.link(image, tmp_path / "hard.vhd")
    (tmp_path / "soft.vhd").symlink_to(image)
    registry.add(spec("web", image))
    for name in ("a.vhd", "hard.vhd", "soft.vhd", "./a.vhd"):
        with pytest.raises(InUse, match=r"is already a disk of the machine web .*vhdkit create"):
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
