# SPDX-License-Identifier: Apache-2.0
"""The adapters of a running machine: connected when it starts or while it runs, and disconnected when it is off.

Decides in which order an adapter reaches the switch, QEMU and the definition, and that the machines that use a switch
restart its process when it dies, and join it again when it was deleted and created anew. Connects `net`, which knows
switches, with `kvm`, which knows QEMU; neither knows the other. What an adapter consists of is decided in
`net.adapter`, which is imported only if the machine has adapters, so that others start without it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vmm.host.proc import is_locked
from vmm.kvm.cmdline import Adapter, adapter_slot, boot_indices
from vmm.kvm.drives import has_no_device
from vmm.kvm.process import Identity
from vmm.kvm.qmp import Qmp
from vmm.model.errors import AlreadyExists, InUse, NotFound, QemuFailed, TimedOut, VmmError, WrongState
from vmm.model.paths import MachinePaths
from vmm.model.spec import AdapterSpec, MachineSpec, make_adapter
from vmm.model.waiting import async_becomes
from vmm.processes.rpc import Method, Progress, parameter
from vmm.store import registry
from vmm.store.back_ends import last_back_ends, note_back_ends
from vmm.store.snapshots.store import holding
from vmm.store.state import MachineState
from vmm.worker.launch import Launch
from vmm.worker.running import Running
from vmm.worker.states import Verb

if TYPE_CHECKING:
    from vmm.net.adapter import Give, Owner, Plugged
    from vmm.net.joining import Joined

WATCH_SECONDS = 0.5  # an event ends the wait; this is between looks for what causes none, while the machine runs
UNPLUG_SECONDS = 20.0  # for the guest to release an adapter
_LIVE = (MachineState.RUNNING, MachineState.PAUSED)


def owner_of(spec: MachineSpec, runtime_folder: str, identity: Identity | None) -> Owner:
    """The machine as an owner of ports and devices in the network."""
    from vmm.net.adapter import Owner

    return Owner(spec.id, runtime_folder, None if identity is None else identity.owner)


def slot_of(adapter: AdapterSpec, spec: MachineSpec) -> int:
    """The adapter's slot on the bus, derived from its id, so that adding and removing others does not change it."""
    found = re.fullmatch(r"nic-(\d|1[01])", adapter.id)
    number = int(found[1]) if found else [one.id for one in spec.adapters].index(adapter.id)
    return adapter_slot(number)


def described(adapter: AdapterSpec, spec: MachineSpec, plugged: Plugged) -> Adapter:
    """The adapter's description for QEMU, with its slot on the bus and its place in the boot order."""
    device = {**plugged.device, "bus": "pci.0", "addr": f"{slot_of(adapter, spec):#x}"}
    if adapter.kind == "legacy" and (number := boot_indices(spec).get(adapter.id)) is not None:
        device["bootindex"] = number
    return Adapter(plugged.netdev, device)


def plug_all(spec: MachineSpec, machine: MachinePaths, runtime_folder: str, launch: Launch) -> dict[str, Plugged]:
    """Connect every adapter of a machine that is about to start; by id. Raises VmmError; then none is connected.

    One whose switch is gone is prepared for the next switch of that name, with the back end that it used last.
    """
    from vmm.net.adapter import prepare

    owner = owner_of(spec, runtime_folder, launch.identity)
    last = last_back_ends(machine)
    done: dict[str, Plugged] = {}
    try:
        for adapter in spec.adapters:
            try:
                done[adapter.id] = plugged_in(adapter, owner, launch.give)
            except NotFound as error:
                back_end = last.get(adapter.id, "user")
                done[adapter.id] = prepare(adapter, owner, launch.give, back_end=back_end, problem=error.problem)
        found = {name: one.back_end for name, one in done.items() if one.back_end and one.problem is None}
        note_back_ends(machine, found)
    except BaseException:
        unplug_all(spec, owner)
        raise
    return done


def plugged_in(adapter: AdapterSpec, owner: Owner, give: Give) -> Plugged:
    """Connect the adapter to its switch. Raises VmmError, which refers to other machines by their names."""
    from vmm.net.adapter import SameAddress, plug

    try:
        return plug(adapter, owner, give, lives=lives)
    except SameAddress as error:
        other = "/".join(filter(None, registry.machine_of_port(error.port)))
        raise InUse(
            f"{adapter.id} has the MAC address {adapter.mac}, which {other}, already on switch "
            f"{adapter.switch!r}, also has",
            hint="change one of the addresses: vmm nic set MACHINE ADAPTER mac=ADDRESS",
        ) from error  # fmt: skip


def lives(port: Mapping[str, Any]) -> bool:
    """True if the machine that a switch's port belongs to is running or starting; if it is unknown, if it answers."""
    with contextlib.suppress(VmmError):
        runtime = registry.load(registry.machine_of_port(port["name"])[0]).runtime
        return any(is_locked(runtime.lock(part)) for part in ("keeper", "worker"))
    return bool(port["connected"])


def unplug_all(spec: MachineSpec, owner: Owner) -> None:
    """Disconnect every adapter of a machine that is off; one that cannot be disconnected is skipped."""
    from vmm.net.adapter import unplug

    for adapter in spec.adapters:
        with contextlib.suppress(VmmError, OSError):
            unplug(adapter, owner)


async def announced_mtus(qmp: Qmp, spec: MachineSpec) -> dict[str, int]:
    """The MTU in bytes that each synthetic adapter of a running QEMU announced to its guest, by its id; 0 for none.

    It was set when QEMU started: the switch's MTU may have changed since.
    """
    found = {}
    for adapter in spec.adapters:
        with contextlib.suppress(QemuFailed):  # a legacy adapter announces none, and an adapter may be gone
            path = f"/machine/peripheral/{adapter.id}"
            found[adapter.id] = int(await qmp.execute("qom-get", path=path, property="host_mtu"))
    return found


class Wiring:
    """The adapters of a running machine, as its worker offers them."""

    def __init__(self, running: Running) -> None:
        self._running = running
        self._ends: dict[str, int] = {}  # by adapter id: readable once the process of its switch has ended
        self._woken = asyncio.Event()
        self._joined: dict[str, Joined] = {}  # by adapter id: its connection at the last check
        self._without_gateway: set[str] = set()  # names of switches whose gateway is not running
        self._changing = (
            asyncio.Lock()
        )  # held while an adapter is changed or checked: neither sees the other half done
        running.plug_adapters = self._plug_all

    @property
    def owner(self) -> Owner:
        """The machine as an owner of ports and devices in the network."""
        running = self._running
        return owner_of(running.spec, running.runtime.folder, running.identity)

    def _plug_all(self, launch: Launch) -> tuple[Adapter, ...]:
        """As `plug_all`. Runs in a thread, so `set_links` reports its events."""
        running, self._joined = self._running, {}
        if not running.spec.adapters:
            return ()
        done = plug_all(running.spec, running.machine, running.runtime.folder, launch)
        from vmm.net.joining import Joined

        self._joined = {name: Joined(None, one.problem) for name, one in done.items() if one.problem is not None}
        return tuple(described(adapter, running.spec, done[adapter.id]) for adapter in running.spec.adapters)

    def disconnected(self) -> list[dict[str, str | None]]:
        """The adapters that are connected to no switch although their definition names one, each with the reason."""
        found = [(one, self._joined.get(one.id)) for one in self._running.spec.adapters]
        return [
            {"adapter": one.id, "switch": one.switch, "problem": joined.problem}
            for one, joined in found
            if joined is not None and joined.switch_id is None
        ]

    def methods(self) -> dict[str, Method]:
        """The methods of the control socket that concern adapters."""
        return {"nic-add": self._add, "nic-remove": self._remove, "nic-set": self._set}

    def _adapter(self, params: dict[str, Any]) -> AdapterSpec:
        adapter_id = parameter(params, "adapter", str, "")
        adapter = self._running.spec.adapter(adapter_id)
        if adapter is None:
            known = ", ".join(one.id for one in self._running.spec.adapters) or "none"
            raise NotFound(f"has no adapter {adapter_id!r}; its adapters: {known}")
        return adapter

    async def _add(self, params: dict[str, Any], progress: Progress) -> object:
        """Add an adapter; {"adapter": an adapter's settings}."""
        adapter = make_adapter(**parameter(params, "adapter", dict, {}))
        self._running.need(Verb.ADD_ADAPTER)
        before = self._running.spec
        if before.adapter(adapter.id) is not None:
            raise AlreadyExists(f"the machine already has an adapter {adapter.id!r}")
        after = before.changed(adapters=[*before.adapters, adapter])
        with self._running.busy("nic-add"):
            given: list[tuple[str, int]] = []

            def give(ours: int) -> str:
                given.append((f"{adapter.id}.{len(given)}", ours))
                return given[-1][0]

            try:
                plugged = await asyncio.to_thread(plugged_in, adapter, self.owner, give)
                if plugged.back_end is not None:
                    note_back_ends(self._running.machine, {adapter.id: plugged.back_end})
                await self._tell_qemu(described(adapter, after, plugged), given)
                self._write_down(after)
            except BaseException:
                await asyncio.to_thread(unplug_all, after.changed(adapters=[adapter]), self.owner)
                raise
        self._running.tell("adapter-added", adapter=adapter.id, switch=adapter.switch)
        return {"adapter": adapter.model_dump(mode="json"), "data_path": plugged.data_path}

    async def _tell_qemu(self, one: Adapter, given: list[tuple[str, int]]) -> None:
        qmp = self._running.qmp
        try:
            for name, descriptor in given:
                await qmp.send_descriptor(name, descriptor)
            await qmp.execute("netdev_add", **one.netdev)
        except BaseException:
            for name, _ in given:  # a tap that QEMU holds open cannot be removed
                await qmp.forget_descriptor(name)
            raise
        finally:
            for _, descriptor in given:
                os.close(descriptor)
        try:
            await qmp.execute("device_add", **one.device)
            await self._set_link(str(one.device["id"]), True)
        except BaseException:
            with contextlib.suppress(VmmError):
                await qmp.execute("netdev_del", id=one.netdev["id"])
            raise

    async def _remove(self, params: dict[str, Any], progress: Progress) -> object:
        """Remove an adapter; {"adapter": id}."""
        from vmm.net.adapter import unplug, wire_id

        adapter = self._adapter(params)
        self._running.need(Verb.REMOVE_ADAPTER)
        after = self._running.spec.changed(
            adapters=[one for one in self._running.spec.adapters if one.id != adapter.id]
        )
        with self._running.busy("nic-remove"):
            qmp = self._running.qmp
            with contextlib.suppress(QemuFailed):  # gone already, after an attempt that timed out
                await qmp.execute("device_del", id=adapter.id)
            if not await async_becomes(lambda: has_no_device(qmp, adapter.id), UNPLUG_SECONDS):
                raise TimedOut(
                    f"the guest did not release {adapter.id} within {UNPLUG_SECONDS:.0f} s",
                    hint="try again when the guest has booted, or unplug its cable:"
                    " vmm nic set MACHINE ADAPTER link=down",
                )
            with contextlib.suppress(QemuFailed):
                await qmp.execute("netdev_del", id=wire_id(adapter.id))
            await asyncio.to_thread(unplug, adapter, self.owner)
            self._joined.pop(adapter.id, None)
            self._forget_end(adapter.id)
            self._write_down(after)
        self._running.tell("adapter-removed", adapter=adapter.id)
        return {"adapter": adapter.id}

    async def _set(self, params: dict[str, Any], progress: Progress) -> object:
        """Change the rules of an adapter that stays connected; {"adapter": its new settings}."""
        from vmm.net.adapter import replug

        adapter = make_adapter(**parameter(params, "adapter", dict, {}))
        before = self._adapter({"adapter": adapter.id})
        fixed = [key for key in ("switch", "kind", "mac", "queues") if getattr(adapter, key) != getattr(before, key)]
        if fixed:
            raise WrongState(
                f"is running: the {fixed[0]} of {adapter.id} cannot change now",
                hint="remove the adapter and add it again",
            )
        spec = self._running.spec
        after = spec.changed(adapters=[adapter if one.id == adapter.id else one for one in spec.adapters])
        with self._running.busy("nic-set"):
            async with self._changing:
                is_connected = all(one["adapter"] != adapter.id for one in self.disconnected())
                if is_connected:
                    with contextlib.suppress(NotFound):  # its switch was just deleted: the next one receives the rules
                        await asyncio.to_thread(replug, adapter, self.owner)
                    if adapter.link_up != before.link_up:
                        await self._set_link(adapter.id, adapter.link_up)
                self._write_down(after)
        self._running.tell("adapter-changed", adapter=adapter.id)
        return {"adapter": adapter.model_dump(mode="json")}

    async def _set_link(self, adapter_id: str, up: bool) -> None:
        """Show the guest whether the cable of this adapter is plugged in."""
        await self._running.qmp.execute("set_link", name=adapter_id, up=up)

    def _write_down(self, spec: MachineSpec) -> None:
        with holding(self._running.machine, self._running.spec.name) as held:
            registry.update(held, lambda stored: stored.changed(adapters=list(spec.adapters)))
        self._running.redefine(spec)

    # -- keeping switches alive -----------------------------------------------------------------------------------

    async def set_links(self) -> None:
        """After a start: set the link of each adapter. Restored memory contains its state at the time of saving."""
        for one in self.disconnected():
            self._running.tell("adapter-disconnected", **one)
        without = {one["adapter"] for one in self.disconnected()}
        for adapter in self._running.spec.adapters:
            await self._set_link(adapter.id, adapter.link_up and adapter.id not in without)

    async def watch(self) -> None:
        """As long as the machine runs, keep its adapters connected to their switches."""
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._woken.wait(), WATCH_SECONDS)
            self._woken.clear()
            for adapter_id in [one.id for one in self._running.spec.adapters]:
                async with self._changing:
                    adapter = self._running.spec.adapter(adapter_id)
                    if adapter is None or adapter.switch is None:
                        continue
                    if self._running.state in (*_LIVE, MachineState.CRITICAL):
                        with contextlib.suppress(VmmError, OSError):  # the next check tries again
                            await self._look_at(adapter)

    async def _look_at(self, adapter: AdapterSpec) -> None:
        """Keep an adapter on its switch, and set its link in the guest when the switch appears or disappears."""
        from vmm.net.joining import join

        assert adapter.switch is not None
        before = self._joined.get(adapter.id)
        now = await asyncio.to_thread(join, adapter, self.owner, None if before is None else before.switch_id, lives)
        self._joined[adapter.id] = now
        await self._watch_end(adapter)
        if now.was_restarted:
            self._running.tell("switch-restarted", switch=adapter.switch)
        for what in now.mended:
            self._running.tell("switch-mended", switch=adapter.switch, what=what)
        for fault in now.failed:
            self._running.tell("switch-impaired", switch=adapter.switch, what=fault.what, problem=fault.problem)
        if now.switch_id is not None:
            self._note_gateway(adapter.switch, now.gateway_problem)
        if now.switch_id is None and (before is None or before.problem != now.problem):
            self._running.tell("adapter-disconnected", adapter=adapter.id, switch=adapter.switch, problem=now.problem)
            await self._set_link(adapter.id, False)
        elif now.has_come:
            self._running.tell("adapter-connected", adapter=adapter.id, switch=adapter.switch)
            await self._set_link(adapter.id, adapter.link_up)

    def _note_gateway(self, switch: str, problem: str | None) -> None:
        """Record when the gateway of a switch ends and when it is restarted, but no failed attempts between."""
        if problem is not None and switch not in self._without_gateway:
            self._without_gateway.add(switch)
            self._running.tell("switch-impaired", switch=switch, what="gateway", problem=problem)
        elif problem is None and switch in self._without_gateway:
            self._without_gateway.remove(switch)
            self._running.tell("switch-mended", switch=switch, what="gateway")

    async def _watch_end(self, adapter: AdapterSpec) -> None:
        """Wake `watch` when the process of the switch ends: guests are cut off until it is restarted."""
        from vmm.net.joining import end_descriptor

        if adapter.id not in self._ends:
            descriptor = await asyncio.to_thread(end_descriptor, adapter)
            if descriptor is not None:
                self._ends[adapter.id] = descriptor
                asyncio.get_running_loop().add_reader(descriptor, self._switch_ended, adapter.id)

    def _switch_ended(self, adapter_id: str) -> None:
        self._forget_end(adapter_id)
        self._woken.set()

    def _forget_end(self, adapter_id: str) -> None:
        descriptor = self._ends.pop(adapter_id, None)
        if descriptor is not None:
            asyncio.get_running_loop().remove_reader(descriptor)
            os.close(descriptor)

    async def put_away(self) -> None:
        """Disconnect the adapters: the machine is off."""
        for adapter_id in list(self._ends):
            self._forget_end(adapter_id)
        if self._running.spec.adapters:
            await asyncio.to_thread(unplug_all, self._running.spec, self.owner)
