# SPDX-License-Identifier: Apache-2.0
"""Changing the adapters in a machine's definition, whether it runs or not: adding, changing, removing.

Decides which MAC address an adapter gets (from the host's pool, or the given one if it is free), and what a change of
its settings may be. How a change is made is decided in `local_machine`, how an adapter is plugged in in the worker's
`adapter_hotplug`.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from dataclasses import dataclass
from typing import Any

from vmm.host.proc import locked
from vmm.model import paths
from vmm.model.errors import AlreadyExists, InUse, InvalidSpec, NotFound, VmmError
from vmm.model.paths import write_whole
from vmm.model.spec import AdapterSpec, MachineSpec, make_adapter
from vmm.net import frames, mac, records, switches
from vmm.net.host_side import HostSide
from vmm.net.joining import is_plugged
from vmm.store import registry
from vmm.store.registry import Machine
from vmm.store.state import processes_of

_POOL_NAME = "mac-pool.json"


def host_pool() -> mac.Pool:
    """The host's MAC pool, stored at its first use: if the host's address changes later, adapters keep theirs."""
    path = os.path.join(paths.home(), _POOL_NAME)
    try:
        prefix = bytes.fromhex(records.read_object(path)["prefix"])
        if len(prefix) != mac.PREFIX_BYTES:
            raise ValueError(f"the prefix has {len(prefix)} bytes")
        return mac.Pool(prefix)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise VmmError(
            "is damaged: it must contain the prefix of the MAC pool",
            path=path,
            hint="remove it; new adapters then get addresses from a new pool, and old ones keep theirs",
        ) from error
    pool = mac.pool_of_host(_first_address(), _machine_id())
    paths.make_home()
    write_whole(path, json.dumps({"prefix": pool.prefix.hex()}).encode() + b"\n")
    return pool


def _first_address() -> str | None:
    """The IPv4 source address that packets to other networks would have; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(("192.0.2.1", 9))
        except OSError:
            return None
        address = str(sock.getsockname()[0])
    return None if address == "0.0.0.0" else address


def _machine_id() -> str:
    for path in ("/etc/machine-id", "/var/lib/dbus/machine-id"):
        try:
            with open(path, encoding="ascii") as file:
                return file.read().strip()
        except OSError:
            continue
    return socket.gethostname()


def choosing_macs() -> contextlib.AbstractContextManager[None]:
    """Lock the assignment of MAC addresses; hold it until the adapter with the new address is stored."""
    paths.make_home()
    return locked(os.path.join(paths.home(), ".mac.lock"))


def mac_owners() -> dict[bytes, str]:
    """Every MAC address in use on this host, with its owner in words."""
    owners: dict[bytes, str] = {}
    for machine in registry.load_all()[0]:
        for adapter in machine.spec.adapters:
            if adapter.mac is not None:
                owners[frames.parse_mac(adapter.mac)] = f"adapter {adapter.id} of machine {machine.name}"
    return owners


def fit(settings: dict[str, Any], spec: MachineSpec) -> AdapterSpec:
    """A new adapter for a machine from the user's settings, with an id and a MAC address. Raises VmmError."""
    owners = mac_owners() | {
        frames.parse_mac(one.mac): f"adapter {one.id} of this machine" for one in spec.adapters if one.mac is not None
    }
    wanted = settings.get("mac")
    address = mac.pick(host_pool(), owners) if wanted is None else mac.check_static(str(wanted), owners)
    settings = {**settings, "id": settings.get("id") or spec.free_adapter_id(), "mac": frames.format_mac(address)}
    adapter = make_adapter(**settings)
    if adapter.switch is not None:
        switch = switches.load(adapter.switch)
        if adapter.mirror != "none" and not switch.capabilities.mirrors:
            raise InvalidSpec("the bridge back end cannot mirror ports", hint="use a switch of the user back end")
    return adapter


def refuse_taken_macs(spec: MachineSpec) -> None:
    """Raise AlreadyExists if another machine has one of the definition's addresses. See `choosing_macs`."""
    owners = mac_owners()
    for one in spec.adapters:
        if one.mac is not None and (owner := owners.get(frames.parse_mac(one.mac))) is not None:
            raise AlreadyExists(f"the MAC address {one.mac} of {one.id} is that of {owner}", machine=spec.name)


def with_new_macs(spec: MachineSpec) -> MachineSpec:
    """The definition with new addresses from the host's pool, for a copy of a machine. See `choosing_macs`."""
    owners, fresh = mac_owners(), []
    for one in spec.adapters:
        address = mac.pick(host_pool(), owners)
        owners[address] = f"adapter {one.id} of machine {spec.name}"
        fresh.append(one.model_copy(update={"mac": frames.format_mac(address)}))
    return spec.changed(adapters=fresh)


def find(machine: Machine, adapter_id: str) -> AdapterSpec:
    """An adapter by its id or MAC address. Raises NotFound."""
    with contextlib.suppress(ValueError):  # an address in any spelling
        adapter_id = frames.format_mac(frames.parse_mac(adapter_id))
    for adapter in machine.spec.adapters:
        if adapter_id in (adapter.id, adapter.mac):
            return adapter
    known = ", ".join(one.id for one in machine.spec.adapters) or "none"
    raise NotFound(f"has no adapter {adapter_id!r}; its adapters: {known}", machine=machine.name)


def changed(before: AdapterSpec, settings: dict[str, Any]) -> AdapterSpec:
    """The adapter with the user's changes. Raises InvalidSpec, AlreadyExists for a MAC in use."""
    if settings.get("mac") is not None:
        owners = {key: owner for key, owner in mac_owners().items() if frames.format_mac(key) != before.mac}
        mac.check_static(str(settings["mac"]), owners)
        settings = {**settings, "mac": frames.format_mac(frames.parse_mac(str(settings["mac"])))}
    return make_adapter(**{**before.model_dump(), **settings})


def refuse_unknown_switch(adapter: AdapterSpec, before: AdapterSpec) -> None:
    """Raise NotFound where a changed adapter is to be plugged into a switch that does not exist."""
    if adapter.switch is not None and adapter.switch != before.switch:
        switches.load(adapter.switch)


def plugged_into(switch: str) -> list[str]:
    """The adapters of all machines, running or not, that are on the switch of that name, as "web/nic-0"."""
    known, _ = registry.load_all()
    found = [(one.name, adapter) for one in known for adapter in one.spec.adapters]
    return [f"{name}/{adapter.id}" for name, adapter in found if adapter.switch == switch]


@dataclass(frozen=True, slots=True)
class DeletedSwitch:
    """What deleting a switch did: which adapters are disconnected until a switch of that name exists again, and what
    could not be restored in the host's network, in words."""

    disconnected: list[str]
    not_put_back: list[str]


def delete_switch(name: str, *, force: bool = False) -> DeletedSwitch:
    """Delete a switch.

    Raises NotFound, InUse for a switch that machines are plugged into, unless `force`.
    """
    switches.load(name)
    users = plugged_into(name)
    if users and not force:
        raise InUse(
            f"machines are plugged into switch {name!r}: {', '.join(users)}",
            hint="plug them elsewhere (vmm nic set MACHINE ADAPTER --switch OTHER); with --force they are"
            " disconnected until a switch of that name exists again",
        )
    return DeletedSwitch(users, switches.delete(name, force=force))


@dataclass(frozen=True, slots=True)
class AdapterConnection:
    """Whether an adapter is connected to its switch, and the same in words. None for a machine that is off and whose
    switch exists.
    """

    is_connected: bool | None
    words: str


def connection(machine: Machine, adapter: AdapterSpec) -> AdapterConnection:
    """Whether an adapter is connected to its switch, as the host and the machine's processes show it."""
    if adapter.switch is None:
        return AdapterConnection(False, "not plugged into any switch")
    runs = "qemu" in processes_of(machine.runtime)
    try:
        host = HostSide(switches.load(adapter.switch))
        if not runs:
            return AdapterConnection(None, "machine is off")
        if is_plugged(adapter, machine.spec.id, host):
            return AdapterConnection(True, "connected")
        problem = f"disconnected from switch {adapter.switch!r}; vmm events {machine.name} says why"
        return AdapterConnection(False, problem)
    except NotFound as error:
        return AdapterConnection(False, f"disconnected: {error.problem}")
    except VmmError as error:
        return AdapterConnection(False if runs else None, f"disconnected: {error.problem}")
