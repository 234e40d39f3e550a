# SPDX-License-Identifier: Apache-2.0
"""From a definition to QEMU's command line: one machine word by word, and rules that hold for all machines."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support import require_tool
from vmm.kvm.cmdline import (
    Adapter,
    Medium,
    Sockets,
    StartFacts,
    adapter_slot,
    boot_indices,
    disk_device,
    file_node,
    qemu_arguments,
)
from vmm.model.spec import UNITS, MachineSpec, make_disk, make_spec

ID = "01234567-89ab-cdef-0123-456789abcdef"


def spec_of(**settings: Any) -> MachineSpec:
    """A machine whose command line never changes."""
    fixed = {"id": ID, "name": "web 1", "machine_type": "pc-i440fx-7.2", "cpu_model": "qemu64-v1"}
    return make_spec(**{**fixed, **settings})


def facts_of(**settings: Any) -> StartFacts:
    """The facts that a host would add."""
    usual = {"accelerator": "tcg", "nbd_socket": "/r/nbd.sock", "sockets": Sockets(10, 11, 12, 13)}
    return StartFacts(**{**usual, **settings})


def devices(words: list[str]) -> dict[str, dict[str, Any]]:
    """Every device by its id."""
    texts = [words[place + 1] for place, word in enumerate(words) if word == "-device"]
    return {one["id"]: one for one in map(json.loads, texts)}


def nodes(words: list[str]) -> dict[str, dict[str, Any]]:
    """Every block node by its name."""
    texts = [words[place + 1] for place, word in enumerate(words) if word == "-blockdev"]
    return {one["node-name"]: one for one in map(json.loads, texts)}


GOLDEN = """
-name guest=web 1,debug-threads=on
-uuid 01234567-89ab-cdef-0123-456789abcdef
-nodefaults
-no-user-config
-no-shutdown
-sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny
-machine type=pc-i440fx-7.2,accel=tcg,vmport=off
-cpu qemu64-v1
-smp cpus=2
-m size=256M
-rtc base=utc,driftfix=slew
-boot strict=on
-device {"driver":"VGA","id":"screen","bus":"pci.0","addr":"0x2","vgamem_mb":16}
-vnc unix:/r/display/vnc.sock,share=ignore
-chardev socket,id=qmp,fd=10,server=on,wait=off
-mon chardev=qmp,mode=control
-chardev socket,id=serial,fd=11,server=on,wait=on
-device {"driver":"isa-serial","id":"serial0","chardev":"serial"}
-device {"driver":"virtio-serial-pci","id":"serialbus","bus":"pci.0","addr":"0x3","ioeventfd":false}
-chardev socket,id=agent,fd=12,server=on,wait=off
-device {"driver":"virtserialport","id":"agent","bus":"serialbus.0","nr":1,"chardev":"agent","name":"org.qemu.guest_agent.0"}
-chardev socket,id=kvp,fd=13,server=on,wait=off
-device {"driver":"virtserialport","id":"kvp","bus":"serialbus.0","nr":2,"chardev":"kvp","name":"org.vmm.kvp.0"}
-device {"driver":"virtio-scsi-pci","id":"scsi0","bus":"pci.0","addr":"0x4"}
-device {"driver":"virtio-scsi-pci","id":"scsi2","bus":"pci.0","addr":"0x6"}
-blockdev {"driver":"nbd","node-name":"disk-0","server":{"type":"unix","path":"/r/nbd.sock"},"export":"disk-0","reconnect-delay":5,"read-only":false,"discard":"unmap"}
-device {"id":"disk-0","driver":"ide-hd","bus":"ide.0","unit":0,"drive":"disk-0","serial":"S0","werror":"stop","rerror":"stop","bootindex":2}
-blockdev {"driver":"nbd","node-name":"disk-1","server":{"type":"unix","path":"/r/nbd.sock"},"export":"disk-1","reconnect-delay":5,"read-only":true,"discard":"unmap"}
-device {"id":"disk-1","driver":"scsi-hd","bus":"scsi2.0","channel":0,"scsi-id":63,"lun":0,"drive":"disk-1","serial":"S1","werror":"stop","rerror":"stop"}
-blockdev {"driver":"nbd","node-name":"disk-2","server":{"type":"unix","path":"/r/nbd.sock"},"export":"disk-2","reconnect-delay":5,"read-only":false,"discard":"unmap"}
-device {"id":"disk-2","driver":"virtio-blk-pci","bus":"pci.0","addr":"0xd","drive":"disk-2","serial":"S2","werror":"stop","rerror":"stop","bootindex":3}
-add-fd set=1,fd=14,opaque=disk-3
-blockdev {"driver":"raw","node-name":"disk-3","read-only":true,"file":{"driver":"file","filename":"/dev/fdset/1","read-only":true,"locking":"off"}}
-device {"id":"disk-3","driver":"ide-cd","bus":"ide.1","unit":1,"drive":"disk-3","serial":"S3","bootindex":1}
-netdev {"type":"user","id":"nic-0"}
-device {"driver":"virtio-net-pci","id":"nic-0","netdev":"nic-0"}
"""  # noqa: E501


def full_machine() -> tuple[MachineSpec, StartFacts]:
    """A machine with one of each."""
    spec = spec_of(
        cpu_count=2, memory_bytes=256 << 20,
        disks=[
            {"id": "disk-0", "path": "/0.vhd", "serial": "S0"},
            {"id": "disk-1", "path": "/1.vhd", "serial": "S1", "controller": "scsi", "controller_index": 2, "unit": 63,
             "read_only": True},
            {"id": "disk-2", "path": "/2.vhd", "serial": "S2", "controller": "virtio", "unit": 5},
            {"id": "disk-3", "path": "/3.iso", "serial": "S3", "kind": "iso", "controller_index": 1, "unit": 1,
             "read_only": True},
        ],
    )  # fmt: skip
    facts = facts_of(
        vnc_socket="/r/display/vnc.sock",
        media={"disk-3": Medium(file_node("disk-3", 1, read_only=True), ((1, 14),))},
        adapters=(
            Adapter({"type": "user", "id": "nic-0"}, {"driver": "virtio-net-pci", "id": "nic-0", "netdev": "nic-0"}),
        ),
    )
    return spec, facts


def test_the_command_line_word_by_word() -> None:
    """Saved memory fits only the same devices, so a change here makes existing saved machines unusable."""
    words = qemu_arguments(*full_machine())
    lines = [words[0]]
    for word in words[1:]:
        lines += [word] if word.startswith("-") else [f"{lines.pop()} {word}"]
    assert "\n".join(lines) == GOLDEN.strip()


def test_a_machine_with_local_time() -> None:
    """A machine whose hardware clock shows local time, as Windows expects, gets only that option in addition."""
    utc, local = (qemu_arguments(spec_of(rtc=rtc), facts_of()) for rtc in ("utc", "local"))
    assert [(one, other) for one, other in zip(utc, local, strict=True) if one != other] == [
        ("base=utc,driftfix=slew", "base=localtime,driftfix=slew")
    ]


def test_real_qemu_accepts_the_command_line() -> None:
    """QEMU itself finds no fault in the devices and their places."""
    program = require_tool("qemu-system-x86_64")
    spec, facts = full_machine()
    words = qemu_arguments(spec, facts)
    kept: list[str] = []
    for option, value in zip(words, [*words[1:], ""], strict=True):
        if option in ("-device", "-machine", "-cpu", "-smp", "-m"):
            device = json.loads(value) if option == "-device" else {}
            device.pop("drive", None)
            if device.get("driver") in ("ide-hd", "scsi-hd", "virtio-blk-pci", "virtserialport", "virtio-net-pci"):
                continue  # they need what this test does not provide
            device.pop("chardev", None)
            if device.get("driver") != "isa-serial":
                kept += [option, json.dumps(device) if device else value]
    command = [program, "-nodefaults", "-no-user-config", "-display", "none", "-S", "-monitor", "stdio", *kept]
    done = subprocess.run(command, input="quit\n", capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_channels_that_are_switched_off() -> None:
    """Without their sockets there are no ports; without a screen there is no display, and no VNC."""
    words = qemu_arguments(spec_of(screen=False), facts_of(sockets=Sockets(10, 11)))
    assert {"agent", "kvp", "screen"} & set(devices(words)) == set()
    assert "-vnc" not in words and words[words.index("-display") + 1] == "none"


def test_kernel_firmware_and_saved_state() -> None:
    """A kernel with its arguments, UEFI from two flash devices, and a start that waits for memory."""
    spec = spec_of(kernel="/k", initrd="/i", append="console=ttyS0,115200 quiet", firmware="uefi")
    variables = Medium(file_node("uefi-variables", 1, read_only=False), ((1, 14),))
    facts = facts_of(
        kernel_path="/r/kernel", initrd_path="/r/initrd", uefi_code_path="/code.fd", uefi_variables=variables,
        incoming=True,
    )  # fmt: skip
    words = qemu_arguments(spec, facts)
    assert words[words.index("-kernel") + 1] == "/r/kernel" and words[words.index("-initrd") + 1] == "/r/initrd"
    assert words[words.index("-append") + 1] == "console=ttyS0,115200 quiet"
    assert "pflash0=uefi-code,pflash1=uefi-variables" in words[words.index("-machine") + 1]
    assert nodes(words)["uefi-code"]["read-only"] and not nodes(words)["uefi-variables"]["read-only"]
    assert words[-3:] == ["-S", "-incoming", "defer"]


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        (["disk", "cdrom"], ["a", "d", "b"]),
        (["cdrom", "disk"], ["b", "a", "d"]),
        (["network"], ["nic-0"]),
        ([], []),
    ],
)
def test_boot_order(order: list[str], expected: list[str]) -> None:
    """Kinds appear in the requested order, IDE before virtio, and never SCSI."""
    disks = [
        {"id": "d", "path": "/d", "controller": "virtio"},
        {"id": "a", "path": "/a"},
        {"id": "b", "path": "/b", "kind": "iso", "unit": 1},
        {"id": "c", "path": "/c", "controller": "scsi"},
    ]
    spec = spec_of(disks=disks, adapters=[{"id": "nic-0"}], boot_order=order)
    found = boot_indices(spec)
    assert sorted(found, key=lambda one: found[one]) == expected


@given(st.data())
def test_every_disk_has_its_own_place(data: st.DataObject) -> None:
    """Two devices never share a slot or an address, whatever the disks."""
    places = st.sampled_from([(kind, index, unit) for kind, (count, units) in UNITS.items() for index in range(count)
                              for unit in range(units)])  # fmt: skip
    chosen = data.draw(st.lists(places, unique=True, max_size=40))
    disks = [
        make_disk(id=f"disk-{number}", path=f"/{number}", controller=kind, controller_index=index, unit=unit)
        for number, (kind, index, unit) in enumerate(chosen)
    ]
    spec = spec_of(disks=disks, kernel="/k")
    found = devices(qemu_arguments(spec, facts_of())).values()
    addresses = [
        (one["bus"], one.get("addr"), one.get("unit"), one.get("scsi-id"), one.get("nr"))
        for one in found
        if "bus" in one
    ]
    assert len(set(addresses)) == len(addresses)
    slots = [int(one["addr"], 16) for one in found if "addr" in one]
    assert max(slots) < adapter_slot(0) and adapter_slot(11) < 32
    controllers = {one["id"] for one in found if one["driver"] == "virtio-scsi-pci"}
    assert {one["bus"].removesuffix(".0") for one in found if one["driver"] == "scsi-hd"} <= controllers


@pytest.mark.parametrize("controller", ["scsi", "virtio"])
def test_the_guest_sees_the_sectors_of_the_disk(controller: str) -> None:
    """Sector sizes other than 512 bytes are given to QEMU, which takes them; others are its default."""
    usual = make_disk(id="disk-0", path="/d", controller=controller)
    large = make_disk(id="disk-0", path="/d", controller=controller, sector_bytes=4096, physical_sector_bytes=4096)
    added = {"logical_block_size": 4096, "physical_block_size": 4096}
    assert disk_device(large) == {**disk_device(usual), "serial": large.serial, **added}


def test_empty_drive() -> None:
    """A drive without a medium has no node."""
    assert "drive" not in disk_device(make_disk(id="disk-0", kind="iso", path=None))


def test_a_passed_through_device_is_a_disk_like_others() -> None:
    """Its descriptors and its secret come before its node, and errors that the guest sees stop the machine."""
    lun = make_disk(id="disk-1", kind="pass-through", path="iscsi://h/t/1", controller="scsi")
    node = {"driver": "iscsi", "node-name": "disk-1"}
    medium = Medium(node, ((3, 17),), ({"qom-type": "secret", "id": "disk-1-password"},))
    spec = spec_of(disks=[lun], kernel="/k")
    words = qemu_arguments(spec, facts_of(media={"disk-1": medium}))
    at = [words.index(one) for one in (
        "set=3,fd=17,opaque=disk-1",
        '{"qom-type":"secret","id":"disk-1-password"}',
        '{"driver":"iscsi","node-name":"disk-1"}',
    )]  # fmt: skip
    assert at == sorted(at)
    assert disk_device(lun)["werror"] == "stop" and disk_device(lun)["serial"] == lun.serial
