# SPDX-License-Identifier: Apache-2.0
"""What the keys of a configuration mean."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support import sample
from tests.vmm.hyperv.writing import tree
from vmm.hyperv.configuration import configuration
from vmm.hyperv.ids import ADAPTER, IDE, SCSI
from vmm.hyperv.keys import MAX_KEYS, Key
from vmm.hyperv.machine import HyperVDrive, HyperVMachine, HyperVMemory, SavedState
from vmm.hyperv.reading import read
from vmm.model.errors import BadConfiguration

ID = "11111111-2222-4333-8444-555555555501"
FIRST, SECOND = "5C510000-0000-4000-8000-000000000001", "5C510000-0000-4000-8000-000000000002"
CARD = "4E1C0000-0000-4000-8000-000000000001"


def parts(**more: Any) -> dict[str, Any]:
    """The least that a configuration says; `more` replaces or adds parts."""
    return {
        "properties": {"name": "web", "global_id": ID, "subtype": 0, "version": 1280},
        "settings": {"memory": {"bank": {"size": 1024}}, "processors": {"count": 2}},
        **more,
    }


def machine(**more: Any) -> HyperVMachine:
    """A machine whose configuration says that."""
    return configuration("a.vmcx", tree(configuration=parts(**more)))


def drives(*paths: str) -> dict[str, Any]:
    """A controller with disks at its first units."""
    return {"controller0": {f"drive{unit}": {"type": "VHD", "pathname": path} for unit, path in enumerate(paths)}}


def vdev(kind: str, instance: str, name: str = "") -> dict[str, Any]:
    """A device in a manifest."""
    return {"device": kind, "instance": instance, "name": name}


def of_sample(name: str) -> HyperVMachine:
    """What a sample says."""
    path = str(sample(f"hyperv-machines/{name}"))
    return configuration(path, read(path))


def test_a_real_machine_of_2012_r2() -> None:
    """Name, memory, one IDE disk, an empty DVD drive, one adapter with its MAC and switch, the guest's clock."""
    found = of_sample("packer-2012r2.xml")
    assert (found.name, found.generation, found.version, found.memory.start_mib) == ("2012R2", 1, "5.0", 1024)
    assert found.id == found.machine_id == "0AA394FA-7C4A-4070-BA32-773D43B28A68"
    assert found.created_seconds == 1_415_511_280 and found.clock_skew_seconds == -28_801
    places = [(one.bus, one.controller, one.unit, one.kind) for one in found.drives]
    assert places == [("ide", 0, 0, "VHD"), ("ide", 1, 0, "ISO"), ("floppy", 0, 0, "VFD")]
    assert found.drives[0].path.endswith(r"hyperv\disk.vhd") and not found.drives[1].path
    (adapter,) = found.adapters
    assert (adapter.mac, adapter.is_static, adapter.switch_name) == (
        "00:15:5d:01:07:dc",
        False,
        "Virtual External Switch",
    )
    assert found.doubts == () and ("settings/topology/low_mmio_gap_mb", "128") in found.unknown


def test_generation_2_of_2019() -> None:
    """Unit 63, dynamic memory, an adapter without a MAC; a TPM's class in the manifest alone is no TPM."""
    found = of_sample("2019-gen2.vmcx")
    assert (found.generation, found.version) == (2, "9.0")
    assert found.memory == HyperVMemory(4096, True, 1024, 8192) and found.processors.is_nested
    assert [(one.bus, one.unit) for one in found.drives] == [("scsi", 0), ("scsi", 63)]
    assert [one.mac for one in found.adapters] == [None, "00:15:5d:0a:0b:03"]
    assert found.firmware.secure_boot and not found.has_tpm
    assert any(one.name == "Microsoft Virtual TPM Device" for one in found.devices)


def test_a_checkpoint_names_its_machine() -> None:
    """Its own id, the machine's, its notes with LF, and its saved state."""
    found = of_sample("2012r2-live-tree/Snapshots/AAAAAAA2-0000-4000-8000-000000000002.xml")
    assert found.is_checkpoint and found.name == "update"
    assert (found.id, found.machine_id) == ("AAAAAAA2-0000-4000-8000-000000000002", ID)
    assert found.notes == "line one\nline two & <tags>"
    assert found.saved is not None and found.saved.kind == "Snapshot" and len(found.saved.places) == 1


def test_a_feature_of_a_port_is_named_and_not_interpreted() -> None:
    """The bytes of a VLAN are kept as they are."""
    (adapter,) = of_sample("2012r2-gen2.xml").adapters
    assert [(one.name, one.data) for one in adapter.features] == [("VLAN", bytes(4))]


def test_a_host_s_index_is_no_machine() -> None:
    """It is refused, and said to be one."""
    with pytest.raises(BadConfiguration, match="index of machines"):
        of_sample("host-index/data.vmcx")


def test_scsi_controllers_have_the_manifest_s_order() -> None:
    """And an empty one counts."""
    found = machine(
        manifest={"vdev001": vdev(SCSI, SECOND), "vdev002": vdev(SCSI, CARD), "vdev003": vdev(SCSI, FIRST)},
        **{f"_{FIRST.lower()}_": drives("C:\\a.vhdx"), f"_{SECOND.lower()}_": drives("C:\\b.vhdx", "C:\\c.vhdx")},
    )
    assert found.scsi_controllers == 3 and found.doubts == ()
    assert [(one.controller, one.unit, one.path[3]) for one in found.drives] == [(0, 0, "b"), (0, 1, "c"), (2, 0, "a")]


def test_names_have_no_case() -> None:
    """Keys are found in any case."""
    found = configuration(
        "a.xml",
        tree(Configuration={
            "PROPERTIES": {"Name": "web", "GLOBAL_ID": f"{{{ID.lower()}}}"},
            "Settings": {"Memory": {"Bank": {"SIZE": 512}}, "Processors": {"Count": 1}},
        }),
    )  # fmt: skip
    assert (found.id, found.name, found.memory.start_mib) == (ID, "web", 512)


def test_what_is_missing_has_hyper_v_s_value() -> None:
    """Only the name, the id, memory and processors have to be there."""
    found = machine()
    assert found.machine_id == ID and found.generation == 1 and found.drives == () and found.adapters == ()
    assert found.processors.limit == 100_000 and found.processors.weight == 100 and found.power.at_host_start is None
    assert found.saved is None and found.created_seconds is None and found.doubts == () and found.unknown == ()


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ({"properties": {"global_id": ID}}, "properties/name"),
        ({"properties": {"name": "a", "global_id": "web"}}, "properties/global_id"),
        ({"settings": {"processors": {"count": 1}}}, "settings/memory/bank/size"),
        ({"settings": {"memory": {"bank": {"size": 0}}, "processors": {"count": 1}}}, "settings/memory/bank/size"),
        ({"settings": {"memory": {"bank": {"size": 1}}, "processors": {"count": "2"}}}, "settings/processors/count"),
        ({"properties": {"name": "a", "global_id": ID, "subtype": 2}}, "generation 3"),
        ({"manifest": {f"v{n}": vdev(SCSI, f"{n}") for n in range(600)}}, "600 devices"),
    ],
)
def test_what_is_no_machine_is_refused(more: dict[str, Any], problem: str) -> None:
    """With the key."""
    with pytest.raises(BadConfiguration, match=problem):
        machine(**more)


@pytest.mark.parametrize(
    ("more", "doubt"),
    [
        ({f"_{SCSI}_": drives("C:\\a.vhdx")}, "does not list it as a controller"),
        ({"manifest": {"a": vdev(ADAPTER, CARD)}}, "has no settings"),
        ({"manifest": {"a": vdev(SCSI, FIRST), "b": vdev(SCSI, FIRST)}}, "more than once"),
        ({"manifest": {"a": vdev(ADAPTER, CARD)}, f"_{CARD}_": {"MacAddress": "00-15"}}, "MAC address '00-15'"),
        ({f"_{IDE}_": {"controller0": {"drive7": {"type": "VHD", "pathname": "C:\\a"}}}}, "a unit 7"),
        ({"global_settings": {"disk_merge_pending": "maybe"}}, "disk_merge_pending is maybe"),
        ({"properties": {"name": "a", "global_id": ID, "version": -1}}, "version is -1"),
    ],
)
def test_contradictions_are_reported(more: dict[str, Any], doubt: str) -> None:
    """With the machine, which is read all the same."""
    (found,) = machine(**more).doubts
    assert doubt in found


def test_a_key_that_occurs_twice_is_not_guessed() -> None:
    """Neither of two disks at one place is taken silently, and neither of two values."""
    twice = Key("drive0", None, (Key("type", "VHD"), Key("pathname", "C:\\a")))
    ide = Key(f"_{IDE}_", None, (Key("controller0", None, (twice, twice)),))
    root = tree(configuration=parts()).children[0]
    found = configuration("a", Key("", None, (Key("configuration", None, (*root.children, ide)),)))
    assert any("two drives 0" in one for one in found.doubts)
    pending = Key("disk_merge_pending", True)
    twice = Key("global_settings", None, (pending, Key("disk_merge_pending", False)))
    found = configuration("a", Key("", None, (Key("configuration", None, (*root.children, twice)),)))
    assert not found.merge_pending and any("occurs 2 times" in one for one in found.doubts)


def test_every_key_is_read_or_listed() -> None:
    """What means nothing here is not listed; a key that may mean something is, with its value."""
    found = machine(
        security={"settings": {"tpm_enabled": True, "data_protection_requested": True}},
        savedstate={"type": "Normal", "vsvlocation": "D:\\a.vsv"},
        _unknown_={"VDEVVersion": 256, "enabled": True, "raw": b"\1\2"},
    )
    assert found.has_tpm and found.saved == SavedState("Normal", ("D:\\a.vsv",))
    assert found.unknown == (
        ("security/settings/data_protection_requested", "True"),
        ("_unknown_/enabled", "True"),
        ("_unknown_/raw", "0102"),
    )


def test_as_many_keys_as_there_can_be() -> None:
    """They are read in bounded time wherever they lie."""
    many = tuple(Key(f"drive{n % 64}", None, (Key("type", "VHD"),)) for n in range(MAX_KEYS // 4))
    scsi = [Key(f"_{FIRST}_", None, (Key("controller0", None, many),))] * 3
    root = tree(configuration=parts(manifest={"a": vdev(SCSI, FIRST)})).children[0]
    found = configuration("a", Key("", None, (Key("configuration", None, (*root.children, *scsi)),)))
    assert found.drives == () and any("occurs 3 times" in one for one in found.doubts)
    found = configuration("a", Key("", None, (Key("configuration", None, (*root.children, scsi[0])),)))
    assert isinstance(found.drives[0], HyperVDrive)
