# SPDX-License-Identifier: Apache-2.0
"""A switch that is a bridge of the kernel: creating it, its ports, and its state on the host.

Decides that one process at a time changes a bridge, and the order in which a tap is added: its rules come first. Must
not know machines, processes of switches, nor how switches are created and deleted.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vmm.host.proc import is_locked, locked
from vmm.model import errors, paths
from vmm.net import cards, ipv6_settings, nft, plan, port_files, ports, records, switch_spec
from vmm.net.backends import AdapterPort, HostChanges
from vmm.net.switch_spec import SwitchSpec

_CHANGE_LOCK = "change.lock"


@dataclass(frozen=True, slots=True)
class BridgeBackend:
    """The bridge of one switch, with its rules, addresses and taps. A `Backend`."""

    spec: SwitchSpec
    folder: str

    @property
    def _lease_path(self) -> str:
        return paths.switch_leases(self.spec.id)

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Hold the lock with which one process at a time changes the bridge."""
        paths.make_private(self.folder)
        with locked(os.path.join(self.folder, _CHANGE_LOCK)):
            yield

    def ensure(self) -> None:
        """Create rules, bridge and addresses; existing taps are added to a bridge that had to be created again."""
        with self.changing():
            was_made = self._apply()
            self.follow_mtu()
        if was_made:  # the bridge had been removed
            self.plug_again()

    def check(self) -> None:
        """Nothing to wait for: a bridge works once it exists."""

    def remove(self, *, give_up: bool = False) -> list[str]:
        """Restore the host; returns what could not be restored, as `Applying.undo`."""
        from vmm.net.applying import Applying

        need_root(self.spec)
        with self.changing():
            left = Applying(self.spec, self.folder, self._lease_path).undo(give_up=give_up)
        shutil.rmtree(self.folder, ignore_errors=True)
        return left

    def is_up(self) -> bool:
        """True while the bridge exists."""
        return os.path.isdir(f"/sys/class/net/{self.spec.bridge_name}")

    def end_descriptor(self) -> int | None:
        """None: it has no process."""
        return None

    def status(self) -> dict[str, Any] | None:
        """None: it has no process to ask."""
        return None

    def state(self, status: dict[str, Any] | None) -> str:
        """The bridge's name, for people."""
        return self.spec.bridge_name if self.is_up() else "does not exist now"

    def addresses(self) -> list[dict[str, Any]]:
        """Raises Unsupported: the kernel learns the addresses."""
        hint = f"bridge fdb show br {self.spec.bridge_name}"
        raise errors.Unsupported("the kernel keeps a bridge's addresses", hint=hint)

    def refuse_capture(self, output: str) -> None:
        """Raises Unsupported: frames are captured with the kernel's tools."""
        hint = f"tcpdump -i {self.spec.bridge_name} -w {output}"
        raise errors.Unsupported("vmm does not capture frames of a bridge", hint=hint)

    def mtu_bytes(self) -> int | None:
        """The MTU that was set, but at most the card's; by default Ethernet's."""
        card = None if self.spec.uplink is None else cards.mtu_bytes(self.spec.uplink)
        return min((one for one in (self.spec.mtu_bytes, card) if one), default=switch_spec.USUAL_MTU_BYTES)

    def _apply(self) -> bool:
        from vmm.net.applying import Applying

        need_root(self.spec)
        applying = Applying(self.spec, self.folder, self._lease_path, self.bridge_ports())
        if not applying.is_applied() and (spec := cards.found(self.spec)) != self.spec:  # its card has been renamed
            paths.write_whole(paths.switch_file(spec.name), spec.to_json())
            applying = Applying(spec, self.folder, paths.switch_leases(spec.id), self.bridge_ports())
        return applying.apply()

    def follow_mtu(self) -> None:
        """Set the bridge and taps to the MTU that the switch has now. The caller holds its lock. Raises VmmError."""
        from vmm.net import bridge

        wanted = self.mtu_bytes() or switch_spec.USUAL_MTU_BYTES
        names = [self.spec.bridge_name, *(one.interface for one in self.bridge_ports())]
        if any(cards.mtu_bytes(name) not in (None, wanted) for name in names):
            with bridge.Kernel() as kernel:
                for name in reversed(names):
                    kernel.set_mtu(name, wanted)

    def is_half_made(self) -> bool:
        """True if some change to the host could not be undone."""
        return bool(self._journal().get("done"))

    def is_half_done(self) -> bool:
        """True while a command creates or removes the bridge, and after one that was killed meanwhile."""
        return self._journal().get("complete") is False

    def is_unfinished(self) -> bool:
        """True after a command that was killed while it created or removed the bridge, until another one completes
        that.
        """
        return self.is_half_done() and not is_locked(os.path.join(self.folder, _CHANGE_LOCK))

    def _journal(self) -> dict[str, Any]:
        """The recorded changes to the host; one made-up step if the record cannot be read."""
        from vmm.net.applying import JOURNAL_NAME

        try:
            return records.read_object(os.path.join(self.folder, JOURNAL_NAME))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError):
            return {"done": ["unreadable"]}  # it may have contained something

    def plan(self) -> HostChanges:
        """What `ensure` would do. Changes nothing."""
        from vmm.net.bridge import Kernel

        need_root(self.spec)
        with Kernel() as kernel:
            facts = kernel.facts(self.spec)
        reasons = plan.refusals(self.spec, facts)
        words = [] if reasons else [step.words for step in plan.steps(self.spec, facts)]
        return HostChanges(words, [*plan.warnings(self.spec, facts), *self.in_the_way()], reasons)

    def in_the_way(self) -> list[str]:
        """The rules of other programs that drop its frames, and the remedies; for root."""
        from vmm.net import firewalls

        if os.geteuid() != 0:
            return []
        return [str(one) for one in firewalls.obstacles(self.spec, firewalls.present())]

    # -- ports ----------------------------------------------------------------------------------------------------

    def _ports_folder(self) -> str:
        return os.path.join(self.folder, "ports")

    def bridge_ports(self) -> list[nft.GuestPort]:
        """The ports whose taps exist; a port with a damaged record may send nothing. Removes records of other taps.

        The caller holds the lock of `changing`.
        """
        return [
            nft.GuestPort(one.interface, port_files.CLOSED)
            if one.setup is None
            else nft.GuestPort(one.interface, one.setup.rules, one.setup.rate_bits_per_second)
            for one in port_files.read_all(self._ports_folder(), remove_stale=True)
            if one.setup is not None or self.has_tap(one.interface)
        ]

    def damaged_ports(self) -> list[str]:
        """The taps with a damaged record, in words."""
        found = [one for one in port_files.read_all(self._ports_folder()) if one.setup is None]
        return [f"{one.path} is damaged: {one.problem}" for one in found if self.has_tap(one.interface)]

    def plug_tap(self, interface: str, setup: ports.PortSetup) -> None:
        """Add an existing tap to the bridge, its rules first. Raises VmmError."""
        from vmm.net import bridge, enforcing
        from vmm.net.engine import VlanMode

        with self.changing():
            rules = setup.rules
            filters = os.path.exists(f"/sys/class/net/{self.spec.bridge_name}/bridge/vlan_filtering")
            if rules.mode is not VlanMode.UNTAGGED and not filters:
                raise errors.Unsupported(plan.VLAN_REFUSAL, hint=plan.VLAN_HINT)
            if rules.mirror_source or rules.mirror_destination:
                raise errors.Unsupported("the bridge back end cannot mirror ports", hint="use the user back end")
            port_files.write(self._ports_folder(), interface, setup)
            enforcing.enforce(self.spec, self.bridge_ports())
            ipv6_settings.close_tap(interface)
            with bridge.Kernel() as kernel:
                kernel.set_mtu(interface, self.mtu_bytes() or switch_spec.USUAL_MTU_BYTES)
                kernel.set_master(interface, self.spec.bridge_name)
                if filters:  # even without a VLAN: the port may have had one
                    kernel.set_vlans(interface, *plan.port_vlans(rules.vlan, rules.allowed))
                kernel.set_up(interface, setup.link_up)

    def plug_again(self) -> None:
        """Add the existing taps to the bridge, which was created again. Raises VmmError."""
        for one in port_files.read_all(self._ports_folder()):
            if one.setup is not None:
                self.plug_tap(one.interface, one.setup)

    def has_record(self, interface: str) -> bool:
        """True while a tap of the bridge has a valid record."""
        return port_files.is_readable(self._ports_folder(), interface)

    def has_tap(self, interface: str) -> bool:
        """True while a tap is part of the bridge; any program of root's may remove it."""
        try:
            return os.path.basename(os.readlink(f"/sys/class/net/{interface}/master")) == self.spec.bridge_name
        except OSError:
            return False

    def unplug_tap(self, interface: str) -> None:
        """Forget a port; its tap disappears with its descriptors."""
        from vmm.net import enforcing

        with self.changing():
            port_files.remove(self._ports_folder(), interface)
            if os.path.exists(f"/sys/class/net/{self.spec.bridge_name}"):
                enforcing.enforce(self.spec, self.bridge_ports())

    # -- ports, in the form of every back end ----------------------------------------------------------------------

    def plug(self, port: AdapterPort) -> None:
        """Add its existing tap to the bridge."""
        self.plug_tap(port.interface, port.setup)

    def unplug(self, port: AdapterPort) -> None:
        """Forget the port, if the switch is on the host."""
        if os.path.isdir(self.folder):
            self.unplug_tap(port.interface)

    def fits(self, port: AdapterPort) -> bool:
        """True if its tap exists."""
        return os.path.isdir(f"/sys/class/net/{port.interface}")

    def is_in(self, port: AdapterPort) -> bool:
        """False for a tap that was removed from its bridge, or whose record is damaged or gone."""
        return self.has_tap(port.interface) and self.has_record(port.interface)

    def port_status(self, *, with_drops: bool = True) -> list[dict[str, Any]]:
        """Its ports with the kernel's counters; cheap without the drops."""
        drops: dict[str, dict[str, int]] = {}
        if with_drops and os.geteuid() == 0:  # only root may query the kernel
            from vmm.net import enforcing

            drops = enforcing.drops(self.spec)
        return [
            _tap_status(one.interface, one.setup, drops.get(one.interface, {}), self.has_tap(one.interface))
            for one in port_files.read_all(self._ports_folder())
            if one.setup is not None
        ]


def _tap_status(interface: str, setup: ports.PortSetup, drops: dict[str, int], is_in: bool) -> dict[str, Any]:
    """Counters from the guest's point of view, which is the reverse of the kernel's."""

    def counter(name: str) -> int:
        try:
            with open(f"/sys/class/net/{interface}/statistics/{name}", encoding="ascii") as file:
                return int(file.read())
        except OSError:
            return 0

    return {
        **ports.to_document(setup),
        "interface": interface,
        "connected": is_in,
        "received_frames": counter("rx_packets"),
        "received_bytes": counter("rx_bytes"),
        "transmitted_frames": counter("tx_packets"),
        "transmitted_bytes": counter("tx_bytes"),
        "backlog_frames": 0,
        "drops": {**drops, **({"full": dropped} if (dropped := counter("tx_dropped")) else {})},
    }


def need_root(spec: SwitchSpec) -> None:
    """Raise AccessDenied if the bridge back end cannot work without root."""
    if os.geteuid() != 0:
        raise errors.AccessDenied(
            f"switch {spec.name!r} is on the bridge back end, which needs root",
            hint="use sudo" + ("" if spec.type == "external" else ", or create it with --backend user"),
        )
