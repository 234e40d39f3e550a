# SPDX-License-Identifier: Apache-2.0
"""What there is of one switch on the running host: its process or its bridge, and the ports on it.

Decides that all of it follows from the switch's file at any time (`HostSide.ensure`), that one process at a time
changes a bridge, and in which order a tap is put into it: its rules come first. Must not know machines, nor how
switches are made and deleted: that is `switches`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from vmm.host.proc import is_locked, locked
from vmm.model import errors, paths
from vmm.net import cards, ipv6_settings, nft, plan, port_files, ports, records, switch_spec
from vmm.net.enclosing import hint_for
from vmm.net.gateway import PORT_NAME, problem_of
from vmm.net.switch_spec import SwitchSpec
from vmm.net.user_backend import UserBackend

GATEWAY_SECONDS = 10.0
_LOOK_SECONDS = 0.02
_CHANGE_LOCK = "change.lock"


@dataclass(frozen=True, slots=True)
class HostSide:
    """What there is of a switch on the running host."""

    spec: SwitchSpec

    @property
    def user(self) -> UserBackend:
        """Its process; of the user back end."""
        return UserBackend.of(self.spec.id, self.spec.name)

    @property
    def folder(self) -> str:
        """Its runtime folder."""
        return self.user.folder

    @property
    def lease_path(self) -> str:
        """Where the leases of an internal switch are kept."""
        return paths.switch_leases(self.spec.id)

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """One process at a time changes its bridge."""
        paths.make_private(self.folder)
        with locked(os.path.join(self.folder, _CHANGE_LOCK)):
            yield

    def ensure(self) -> None:
        """Have the switch on this host now: rules, bridge and addresses, or its process. Doing it twice is fine."""
        if self.spec.backend == "bridge":
            with self.changing():
                was_made = self._apply()
                self.follow_mtu()
            if was_made:  # it had been removed: taps that are still there go into the new one
                self.plug_again()
            return
        self.user.ensure_running()
        if self.spec.type == "internal":
            self._ensure_way_out()

    def _ensure_way_out(self) -> None:
        """Its gateway and its DHCP server, as its file has them."""
        setup, dhcp = self.spec.gateway(), self.spec.dhcp_setup()
        gateway = {**asdict(setup), "forwards": list(setup.forwards)}
        lent = None if dhcp is None else dhcp.to_document()
        status = self.user.status() or {}
        present = status.get("gateway") or {}
        if {key: present.get(key) for key in gateway} != gateway or status.get("dhcp") != lent:
            self.user.ensure("set_gateway", gateway=gateway, dhcp=lent, leases=self.lease_path)

    def check_way_out(self) -> None:
        """Wait until the gateway of a `user` switch answers. Raises VmmError with what it said when it ended."""
        deadline = time.monotonic() + GATEWAY_SECONDS
        while time.monotonic() < deadline:
            status = self.user.status()
            if status is None or status["gateway"] is None or status["gateway"]["ready"]:
                return
            gateway = status["gateway"]
            if not gateway["running"]:
                problem = problem_of(str(gateway["said"]))
                raise errors.VmmError(
                    f"the gateway of switch {self.spec.name!r} does not start: {problem}", hint=hint_for(problem)
                )
            time.sleep(_LOOK_SECONDS)

    def _apply(self) -> bool:
        from vmm.net.applying import Applying

        need_root(self.spec)
        applying = Applying(self.spec, self.folder, self.lease_path, self.bridge_ports())
        if not applying.is_applied() and (spec := cards.found(self.spec)) != self.spec:  # its card has another name
            paths.write_whole(paths.switch_file(spec.name), spec.to_json())
            applying = Applying(spec, self.folder, paths.switch_leases(spec.id), self.bridge_ports())
        return applying.apply()

    def mtu_bytes(self) -> int | None:
        """The most bytes of a frame behind its header: what was set, but no more than the card's; else Ethernet's.

        None on the user back end where nothing was set: it carries whatever guests choose, up to 9216.
        """
        if self.spec.backend == "user":
            return self.spec.mtu_bytes
        card = None if self.spec.uplink is None else cards.mtu_bytes(self.spec.uplink)
        return min((one for one in (self.spec.mtu_bytes, card) if one), default=switch_spec.USUAL_MTU_BYTES)

    def follow_mtu(self) -> None:
        """Have bridge and taps carry what the switch does by now. The caller holds its lock. Raises VmmError."""
        from vmm.net import bridge

        wanted = self.mtu_bytes() or switch_spec.USUAL_MTU_BYTES
        names = [self.spec.bridge_name, *(one.interface for one in self.bridge_ports())]
        if any(cards.mtu_bytes(name) not in (None, wanted) for name in names):
            with bridge.Kernel() as kernel:
                for name in reversed(names):
                    kernel.set_mtu(name, wanted)

    def is_half_made(self) -> bool:
        """True when something on the host could not be put back."""
        return bool(self._journal().get("done"))

    def is_half_done(self) -> bool:
        """True while a command makes or takes back the bridge, and after one that was killed meanwhile."""
        return self._journal().get("complete") is False

    def is_unfinished(self) -> bool:
        """True after a command that was killed while it made or took back the bridge, until another one ends that."""
        return self.is_half_done() and not is_locked(os.path.join(self.folder, _CHANGE_LOCK))

    def _journal(self) -> dict[str, Any]:
        """What was noted of the host; some step where that cannot be read."""
        from vmm.net.applying import JOURNAL_NAME

        try:
            return records.read_object(os.path.join(self.folder, JOURNAL_NAME))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError):
            return {"done": ["unreadable"]}  # not known to be nothing

    def plan(self) -> tuple[list[str], list[str], list[str]]:
        """(steps, warnings, refusals) in words; of the bridge back end. Changes nothing."""
        from vmm.net.bridge import Kernel

        need_root(self.spec)
        with Kernel() as kernel:
            facts = kernel.facts(self.spec)
        reasons = plan.refusals(self.spec, facts)
        words = [] if reasons else [step.words for step in plan.steps(self.spec, facts)]
        return words, [*plan.warnings(self.spec, facts), *self.in_the_way()], reasons

    def in_the_way(self) -> list[str]:
        """Which rules of other programs drop what it needs, and what helps; of the bridge back end, for root."""
        from vmm.net import firewalls

        if self.spec.backend != "bridge" or os.geteuid() != 0:
            return []
        return [str(one) for one in firewalls.obstacles(self.spec, firewalls.present())]

    def remove(self, *, give_up: bool = False) -> list[str]:
        """Put the host back, end the process; what could not be put back, as `Applying.undo`."""
        if self.spec.backend == "bridge":
            from vmm.net.applying import Applying

            need_root(self.spec)
            with self.changing():
                left = Applying(self.spec, self.folder, self.lease_path).undo(give_up=give_up)
            shutil.rmtree(self.folder, ignore_errors=True)
            return left
        self.user.stop()
        return []

    # -- ports ----------------------------------------------------------------------------------------------------

    def _ports_folder(self) -> str:
        return os.path.join(self.folder, "ports")

    def bridge_ports(self) -> list[nft.GuestPort]:
        """The ports whose taps are there; one with a damaged record may send nothing. Removes records of other taps.

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
        """Which of its taps have a damaged record, in words."""
        found = [one for one in port_files.read_all(self._ports_folder()) if one.setup is None]
        return [f"{one.path} is damaged: {one.problem}" for one in found if self.has_tap(one.interface)]

    def plug_tap(self, interface: str, setup: ports.PortSetup) -> None:
        """Put a tap that is there into the bridge, with its rules first. Raises VmmError."""
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
                if filters:  # also without a VLAN: it may have had one
                    kernel.set_vlans(interface, *plan.port_vlans(rules.vlan, rules.allowed))
                kernel.set_up(interface, setup.link_up)

    def plug_again(self) -> None:
        """Put the taps that are there into the bridge, which was made anew. Raises VmmError."""
        for one in port_files.read_all(self._ports_folder()):
            if one.setup is not None:
                self.plug_tap(one.interface, one.setup)

    def has_record(self, interface: str) -> bool:
        """True while a tap of the bridge has a sound record."""
        return port_files.is_readable(self._ports_folder(), interface)

    def has_tap(self, interface: str) -> bool:
        """True while a tap is part of the bridge, which any program of root's may remove."""
        try:
            return os.path.basename(os.readlink(f"/sys/class/net/{interface}/master")) == self.spec.bridge_name
        except OSError:
            return False

    def unplug_tap(self, interface: str) -> None:
        """Forget a port; its tap goes with its descriptors."""
        from vmm.net import enforcing

        with self.changing():
            port_files.remove(self._ports_folder(), interface)
            if os.path.exists(f"/sys/class/net/{self.spec.bridge_name}"):
                enforcing.enforce(self.spec, self.bridge_ports())

    def guests(self) -> list[dict[str, Any]]:
        """The ports of machines, as `port_status` describes them."""
        return [one for one in self.port_status(with_drops=False) if one["name"] != PORT_NAME]

    def port_status(self, *, with_drops: bool = True) -> list[dict[str, Any]]:
        """What is plugged where, with counters, in one form for both back ends.

        Without the drops of a bridge's ports it is cheap.
        """
        if self.spec.backend == "user":
            status = self.user.status()
            return [] if status is None else list(status["ports"])
        drops: dict[str, dict[str, int]] = {}
        if with_drops and os.geteuid() == 0:  # only root may ask the kernel
            from vmm.net import enforcing

            drops = enforcing.drops(self.spec)
        return [
            _tap_status(one.interface, one.setup, drops.get(one.interface, {}), self.has_tap(one.interface))
            for one in port_files.read_all(self._ports_folder())
            if one.setup is not None
        ]


def _tap_status(interface: str, setup: ports.PortSetup, drops: dict[str, int], is_in: bool) -> dict[str, Any]:
    """Counters as the guest sees them: the kernel's are the other way round."""

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
    """Raise AccessDenied where the bridge back end cannot work."""
    if os.geteuid() != 0:
        raise errors.AccessDenied(
            f"switch {spec.name!r} is on the bridge back end, which needs root",
            hint="use sudo" + ("" if spec.type == "external" else ", or make it with --backend user"),
        )
