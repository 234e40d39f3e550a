# SPDX-License-Identifier: Apache-2.0
"""A machine's definition: what is valid, what is not, and how it is stored."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.model.errors import InvalidSpec
from vmm.model.spec import UNITS, Controller, MachineSpec, make_disk, make_spec, read_spec


def disk(number: int = 0, **settings: Any) -> dict[str, Any]:
    """Settings of a disk."""
    return {"id": f"disk-{number}", "path": f"/disks/{number}.vhd", "unit": number % 2, **settings}


def test_defaults_make_a_machine() -> None:
    """A name is enough; each machine gets a unique id."""
    one, two = make_spec(name="web"), make_spec(name="web")
    assert one.id != two.id
    assert one.automatic.stop == "save"


def test_a_definition_reads_back() -> None:
    """The stored form is readable JSON and reads back as the same machine."""
    spec = make_spec(name="Web server 1", disks=[disk(0), disk(1, read_only=True)], adapters=[{"id": "nic-0"}])
    assert read_spec(spec.to_json(), "x") == spec
    assert json.loads(spec.to_json())["disks"][1]["read_only"] is True


def test_the_kind_of_an_image_does_not_depend_on_its_format() -> None:
    """An image is written with the kind "vhd" whatever its format, even a raw one, and reads back the same."""
    spec = make_spec(name="web", disks=[disk(0, format="raw"), disk(1, kind="iso", path=None)])
    assert [one.is_image for one in spec.disks] == [True, False]
    written = json.loads(spec.to_json())["disks"]
    assert [(one["kind"], one["format"]) for one in written] == [("vhd", "raw"), ("iso", None)]
    assert read_spec(spec.to_json(), "x").disks[0].is_image


@pytest.mark.parametrize(
    "name",
    ["", " ", ".hidden", "-x", "a/b", "..", "a\nb", "a\0b", "x" * 65, "a ", " a", "end.", "ü" * 65, "\x1b[31m", "_a"],
)
def test_bad_names(name: str) -> None:
    """A name must be valid as a folder's name and as an argument of a command."""
    with pytest.raises(InvalidSpec, match="cannot be the name of a machine"):
        make_spec(name=name)


@pytest.mark.parametrize("name", ["a", "web-1", "Büro 2", "x" * 64, "a.b_c"])
def test_good_names(name: str) -> None:
    """Letters of any language, digits, space, dot, underscore and hyphen are allowed."""
    assert make_spec(name=name).name == name


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"memory_bytes": 1 << 20}, "memory_bytes"),
        ({"memory_bytes": (512 << 20) + 1}, "multiple"),
        ({"memory_bytes": (1 << 40) + (1 << 20)}, "memory_bytes"),
        ({"cpu_count": 0}, "cpu_count"),
        ({"cpu_count": 256}, "cpu_count"),
        ({"firmware": "coreboot"}, "firmware"),
        ({"machine_type": "pc,accel=kvm"}, "machine_type"),
        ({"boot_order": ["disk", "disk"]}, "boot device disk is used twice"),
        ({"initrd": "/x"}, "require a kernel"),
        ({"memory": 5}, "memory"),
        ({"disks": [disk(0), disk(1, id="disk-0")]}, "disk id disk-0 is used twice"),
        ({"disks": [disk(0), disk(1, unit=0)]}, "ide0:0 is used twice"),
        ({"disks": [disk(0, serial="a"), disk(1, serial="a")]}, "serial a"),
        ({"disks": [disk(0, controller_index=2)]}, "ide2:0 does not exist"),
        ({"disks": [disk(0, unit=2)]}, "ide0:2 does not exist"),
        ({"disks": [disk(0), disk(1, controller="scsi", unit=64)]}, "scsi0:64 does not exist"),
        ({"disks": [disk(0), disk(1, controller="scsi", controller_index=4)]}, "scsi4:1 does not exist"),
        ({"disks": [disk(0, controller="scsi")]}, "cannot boot from SCSI"),
        ({"disks": [disk(0, sector_bytes=4096)]}, "sectors of 4096 bytes cannot be on IDE"),
        ({"disks": [disk(0, sector_bytes=1024)]}, "sector_bytes"),
        ({"disks": [disk(0, sector_bytes=4096, controller="virtio")]}, "the BIOS boots from"),
        ({"disks": [disk(0, kind="iso", controller="scsi")]}, "a drive for ISO images must be on IDE"),
        ({"disks": [disk(0, path=None)]}, "may be empty"),
        ({"disks": [disk(0, path="")]}, "must not be empty"),
        ({"disks": [disk(0, path="a\0b")]}, "zero byte"),
        ({"kernel": "/boot/vmlinuz", "append": "a\0b"}, "zero byte"),
        ({"disks": [disk(0, serial="x" * 21)]}, "serial"),
        ({"adapters": [{"id": f"nic-{n}"} for n in range(9)]}, "at most 8 synthetic"),
        ({"adapters": [{"id": f"nic-{n}", "kind": "legacy"} for n in range(5)]}, "at most 4 legacy"),
        ({"adapters": [{"id": "nic-0", "mac": "00:15:5D:00:00:01"}]}, "mac"),
        ({"automatic": {"stop": "pull the plug"}}, r"automatic\.stop"),
    ],
)
def test_impossible_settings(settings: dict[str, Any], words: str) -> None:
    """A setting beyond its limit is refused with its name and the reason, in one line."""
    with pytest.raises(InvalidSpec, match=words) as caught:
        make_spec(name="web", **settings)
    assert "\n" not in str(caught.value)
    assert caught.value.machine == "web"


def test_uefi_boots_from_large_sectors() -> None:
    """A disk with sectors of 4096 bytes may be the only one with UEFI, or if there is something else to boot from."""
    large = disk(0, sector_bytes=4096, controller="virtio")
    assert make_spec(name="web", disks=[large], firmware="uefi").disks[0].sector_bytes == 4096
    assert make_spec(name="web", disks=[large], kernel="/k").firmware == "bios"
    assert len(make_spec(name="web", disks=[disk(1), large]).disks) == 2


def test_changes_are_checked() -> None:
    """A change gives a new machine or an error; the old one is not modified."""
    spec = make_spec(name="web", disks=[disk(0)])
    assert spec.changed(cpu_count=2).cpu_count == 2
    bigger = spec.changed(disks=[*spec.disks, make_disk(id="disk-1", path="/d", unit=1)])
    assert [one.id for one in bigger.disks] == ["disk-0", "disk-1"]
    with pytest.raises(InvalidSpec):
        spec.changed(cpu_count=0)
    assert spec.cpu_count == 1


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"5", b"\xff", b"null", b"[" * 100000, b'{"name": 5}', b'{"name": "web", "extra": 1}'],
)
def test_malformed_definitions_are_clear_errors(content: bytes) -> None:
    """Whatever is in the file, it is a machine or an InvalidSpec with the path."""
    with pytest.raises(InvalidSpec, match="not a machine definition") as caught:
        read_spec(content, "/m/machine.json")
    assert caught.value.path == "/m/machine.json"


def test_a_newer_schema_is_refused() -> None:
    """A definition of a newer vmm is not interpreted in part."""
    with pytest.raises(InvalidSpec, match="newer vmm"):
        read_spec(b'{"schema_version": 2, "name": "web"}', "x")


@given(st.binary(max_size=200))
def test_any_bytes(content: bytes) -> None:
    """Any bytes are a machine or an InvalidSpec."""
    with contextlib.suppress(InvalidSpec):
        assert isinstance(read_spec(content, "x"), MachineSpec)


@pytest.mark.parametrize("controller", list(UNITS))
def test_free_places_until_all_are_taken(controller: Controller) -> None:
    """Places are assigned in order, each once, and the end is a clear error."""
    controllers, units = UNITS[controller]
    spec = make_spec(name="web", kernel="/k")
    for number in range(controllers * units):
        index, unit = spec.free_place(controller)
        assert (index, unit) == divmod(number, units)
        taken = make_disk(
            id=spec.free_disk_id(), path=f"/{number}", controller=controller, controller_index=index, unit=unit
        )
        spec = MachineSpec.model_construct(**{**dict(spec), "disks": (*spec.disks, taken)})
    with pytest.raises(InvalidSpec, match=f"all {controllers * units} places"):
        spec.free_place(controller)
