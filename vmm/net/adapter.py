# SPDX-License-Identifier: Apache-2.0
"""One adapter of a machine, plugged into its switch: its description for QEMU, and the switch's side of it.

Decides which data path an adapter gets (and reports why), the names of its port on either back end, and that the
switch runs before QEMU connects to it. All that this module knows about QEMU is that it takes a description (`netdev`,
`device`) and descriptors. Synchronous: not for a thread that runs an event loop.

    user      runtime/MACHINE/ADAPTER/  guest.sock (QEMU's)  switch.sock (the switch's)    a folder of QEMU's user
    bridge    a tap, named by machine and adapter; its descriptors are QEMU's, one per queue, vhost's beside them
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from vmm.model import errors, paths
from vmm.model.spec import AdapterSpec
from vmm.net import frames, switches, taps
from vmm.net.backends import AdapterPort
from vmm.net.engine import PortRules, VlanMode
from vmm.net.host_side import HostSide
from vmm.net.ports import PortSetup
from vmm.net.switch_spec import USUAL_MTU_BYTES, BackendName

SYNTHETIC_DRIVER, LEGACY_DRIVER = "virtio-net-pci", "rtl8139"
GUEST_SOCKET, SWITCH_SOCKET = "guest.sock", "switch.sock"
PORT_ID_CHARACTERS = 12

Lives = Callable[[Mapping[str, Any]], bool]
Give = Callable[[int], int | str]  # our descriptor -> QEMU's name for it; ours is closed for us


@dataclass(frozen=True, slots=True)
class Owner:
    """The machine that owns an adapter: its id, its runtime folder, and QEMU's user and group (None: ours)."""

    machine_id: str
    runtime_folder: str
    user: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Plugged:
    """The description of an adapter for QEMU. `data_path` says in words which path the frames take, and why.

    `back_end`: the kind of switch that the adapter can join. `problem`: why it is on no switch now, although its
    definition names one.
    """

    netdev: dict[str, Any]
    device: dict[str, Any]
    data_path: str
    back_end: BackendName | None = None
    problem: str | None = None


def port_name(machine_id: str, adapter_id: str) -> str:
    """The name of the adapter's port on a switch. It is made from ids, because machines can be renamed."""
    return f"{machine_id.replace('-', '')[:PORT_ID_CHARACTERS]}.{adapter_id}"


def interface_name(machine_id: str, adapter_id: str) -> str:
    """The adapter's tap on the host."""
    return "vt" + hashlib.sha256(f"{machine_id}.{adapter_id}".encode()).hexdigest()[:12]


def wire_id(adapter_id: str) -> str:
    """QEMU's name for the other end of the adapter."""
    return f"{adapter_id}.wire"


def rules_of(adapter: AdapterSpec) -> PortRules:
    """The rules that the switch enforces for this adapter. Pure."""
    mode, vlan = VlanMode.UNTAGGED, 0
    if adapter.vlan is not None:
        mode, vlan = VlanMode.ACCESS, adapter.vlan
    elif adapter.trunk:
        mode, vlan = VlanMode.TRUNK, adapter.native_vlan
    return PortRules(
        addresses=frozenset() if adapter.mac is None else frozenset({frames.parse_mac(adapter.mac)}),
        spoofing=adapter.spoofing,
        mode=mode,
        vlan=vlan,
        allowed=frozenset(adapter.trunk),
        dhcp_guard=adapter.dhcp_guard,
        router_guard=adapter.router_guard,
        storm_frames_per_second=adapter.storm_frames_per_second,
        mirror_source=adapter.mirror == "source",
        mirror_destination=adapter.mirror == "destination",
    )


def setup_of(adapter: AdapterSpec, owner: Owner) -> PortSetup:
    """The adapter's port. Pure."""
    folder = folder_of(adapter, owner)
    return PortSetup(
        name=port_name(owner.machine_id, adapter.id),
        address=os.path.join(folder, SWITCH_SOCKET),
        peer=os.path.join(folder, GUEST_SOCKET),
        rules=rules_of(adapter),
        rate_bits_per_second=adapter.bandwidth_bits_per_second,
        owner=None if owner.user is None else owner.user[0],
        link_up=adapter.link_up,
    )


def port_of(adapter: AdapterSpec, owner: Owner) -> AdapterPort:
    """The adapter's port under its names on either back end. Pure."""
    return AdapterPort(
        interface_name(owner.machine_id, adapter.id), folder_of(adapter, owner), setup_of(adapter, owner)
    )


def folder_of(adapter: AdapterSpec, owner: Owner) -> str:
    """The folder of the adapter's sockets."""
    return os.path.join(owner.runtime_folder, adapter.id)


def device_of(adapter: AdapterSpec, queues: int = 1, mtu_bytes: int | None = None) -> dict[str, Any]:
    """The guest's side. Only a legacy adapter boots from the network, and only a synthetic one reports the MTU to the
    guest. Pure.
    """
    device: dict[str, Any] = {"id": adapter.id, "netdev": wire_id(adapter.id)}
    if adapter.kind == "legacy":
        device = {"driver": LEGACY_DRIVER, **device}
    else:
        device = {"driver": SYNTHETIC_DRIVER, **device, "romfile": ""}
        if mtu_bytes is not None:
            device["host_mtu"] = mtu_bytes
        if queues > 1:  # two vectors a queue, one for configuration, one for control
            device |= {"mq": True, "vectors": 2 * queues + 2}
    if adapter.mac is not None:
        device["mac"] = adapter.mac
    return device


def is_connected(port: Mapping[str, Any]) -> bool:
    """True if the other end of a port is connected."""
    return bool(port["connected"])


def plug(adapter: AdapterSpec, owner: Owner, give: Give, *, lives: Lives = is_connected) -> Plugged:
    """Plug the adapter into its switch. Raises VmmError, and then leaves nothing behind.

    `lives` says whether the machine of another port is running; if it is, it must not have this adapter's MAC address.
    """
    if adapter.switch is None:
        return _unplugged(adapter)
    with switches.staying(adapter.switch) as host:
        refuse_same_address(adapter, owner, host, lives)
        host.ensure()
        return _PLUGS[host.spec.backend](adapter, owner, host, give)


def prepare(adapter: AdapterSpec, owner: Owner, give: Give, *, back_end: BackendName, problem: str) -> Plugged:
    """Prepare an adapter whose switch does not exist or does not run (`problem` says why), so that it can join a
    switch of that back end later.

    If the host has no taps, the adapter gets what the `user` back end plugs in. Raises VmmError.
    """
    with contextlib.suppress(errors.Unsupported, errors.AccessDenied):
        return replace(_PLUGS[back_end](adapter, owner, None, give), problem=problem)
    return replace(_sockets(adapter, owner, None, give), problem=problem)


class SameAddress(errors.InUse):
    """The adapter of another machine on the switch, at the port `port`, has the same MAC address."""

    port = ""


def refuse_same_address(adapter: AdapterSpec, owner: Owner, host: HostSide, lives: Lives) -> None:
    """Raise SameAddress if another port of the switch, whose machine is running, has the adapter's MAC address.

    A switch sends frames for the address to the port that sent last, so both guests would lose most of them.
    """
    own = port_name(owner.machine_id, adapter.id)
    for one in host.guests():
        if one["name"] != own and adapter.mac in one["macs"] and lives(one):
            error = SameAddress(f"{one['name']} on switch {host.spec.name!r} also has the MAC address {adapter.mac}")
            error.port = one["name"]
            raise error


def _unplugged(adapter: AdapterSpec) -> Plugged:
    """An adapter without a cable: QEMU requires a peer for it, so it gets a hub with no other port."""
    number = int(hashlib.sha256(adapter.id.encode()).hexdigest()[:6], 16)
    netdev = {"type": "hubport", "id": wire_id(adapter.id), "hubid": number}
    return Plugged(netdev, device_of(adapter), "not plugged into any switch")


def _sockets(adapter: AdapterSpec, owner: Owner, host: HostSide | None, give: Give) -> Plugged:
    del give  # QEMU opens its socket by name
    setup = setup_of(adapter, owner)
    folder = folder_of(adapter, owner)
    try:
        paths.make_private(folder)
        if owner.user is not None:
            os.chown(folder, *owner.user, follow_symlinks=False)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(setup.peer)
    except OSError as error:
        raise errors.of_os_error(error, "make the adapter's folder", path=folder) from error
    if host is not None:
        host.user.plug(setup)
    netdev = {
        "type": "dgram",
        "id": wire_id(adapter.id),
        "local": {"type": "unix", "path": setup.peer},
        "remote": {"type": "unix", "path": setup.address},
    }
    device = device_of(adapter, mtu_bytes=None if host is None else host.mtu_bytes())
    return Plugged(netdev, device, data_path(adapter, "user"), "user")


def _tap(adapter: AdapterSpec, owner: Owner, host: HostSide | None, give: Give) -> Plugged:
    name = interface_name(owner.machine_id, adapter.id)
    descriptors = taps.open_tap(name, adapter.queues)
    vhost: list[int] = []
    try:
        if host is not None:
            host.bridge.plug_tap(name, setup_of(adapter, owner))
        if adapter.kind == "synthetic":
            vhost = taps.open_vhost(adapter.queues)
    except BaseException:
        taps.close_all(descriptors)
        if host is not None:
            with contextlib.suppress(errors.VmmError):
                host.bridge.unplug_tap(name)
        raise
    netdev: dict[str, Any] = {"type": "tap", "id": wire_id(adapter.id), "vhost": bool(vhost)}
    many = adapter.queues > 1
    netdev["fds" if many else "fd"] = ":".join(str(give(one)) for one in descriptors)
    if vhost:
        netdev["vhostfds" if many else "vhostfd"] = ":".join(str(give(one)) for one in vhost)
    device = device_of(adapter, adapter.queues, USUAL_MTU_BYTES if host is None else host.mtu_bytes())
    return Plugged(netdev, device, data_path(adapter, "bridge"), "bridge")


_PLUGS: dict[BackendName, Callable[[AdapterSpec, Owner, HostSide | None, Give], Plugged]] = {
    "user": _sockets,
    "bridge": _tap,
}


def data_path(adapter: AdapterSpec, backend: BackendName) -> str:
    """Which path the adapter's frames take, and why, in words."""
    return _DATA_PATHS[backend](adapter)


def _path_of_sockets(adapter: AdapterSpec) -> str:
    words = "user switch: datagrams to the switch's process, one queue"
    return words + (f" ({adapter.queues} requested: only a bridge supports several)" if adapter.queues > 1 else "")


def _path_of_tap(adapter: AdapterSpec) -> str:
    queues = "one queue" if adapter.queues == 1 else f"{adapter.queues} queues"
    if adapter.kind == "legacy":
        return f"bridge: tap, {queues}, moved by QEMU (an emulated card has no vhost)"
    if os.path.exists(taps.VHOST_PATH):
        return f"bridge: tap, {queues}, moved by the kernel (vhost)"
    return f"bridge: tap, {queues}, moved by QEMU (this kernel has no {taps.VHOST_PATH})"


_DATA_PATHS: dict[BackendName, Callable[[AdapterSpec], str]] = {"user": _path_of_sockets, "bridge": _path_of_tap}


def replug(adapter: AdapterSpec, owner: Owner) -> None:
    """Pass the new rules and link state of a plugged-in adapter to the switch. Raises VmmError."""
    if adapter.switch is None:
        return
    with switches.staying(adapter.switch) as host:
        host.backend.plug(port_of(adapter, owner))


def unplug(adapter: AdapterSpec, owner: Owner) -> None:
    """Unplug the adapter on the switch's side; succeeds if it is already unplugged."""
    if adapter.switch is not None:
        with contextlib.suppress(errors.NotFound):
            HostSide(switches.load(adapter.switch)).backend.unplug(port_of(adapter, owner))
    shutil.rmtree(folder_of(adapter, owner), ignore_errors=True)
