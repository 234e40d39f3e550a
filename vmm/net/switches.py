# SPDX-License-Identifier: Apache-2.0
"""The switches of this host, as files, and what is done with whole switches.

Decides how a switch is added, found and taken away: it is there whole or not at all, one command changes it at a time,
and one with ports in use is not deleted. What it is on the host follows from its file at any time (`ensure`), so
nothing is lost by a reboot. Must not know machines.

    home/switches/NAME.json    home/switches/ID.leases    runtime/sw-FIRST-12-OF-ID/
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import ValidationError

from vmm import errors, paths
from vmm.complaints import words_of
from vmm.net import cards, guest_addresses, ipv6_settings, nft, plan, ports
from vmm.net.enclosing import hint_for
from vmm.net.gateway import PORT_NAME, QEMU
from vmm.net.plan import SwitchSpec
from vmm.net.user_backend import UserBackend
from vmm.proc import locked

MAX_FILE_BYTES = 1 << 20
GATEWAY_SECONDS = 10.0
_LOOK_SECONDS = 0.02


def _folder() -> str:
    return os.path.join(paths.home(), "switches")


def _path(name: str) -> str:
    if "/" in name or name.startswith("."):
        raise errors.NotFound(f"there is no switch {name!r}")
    return os.path.join(_folder(), f"{name}.json")


# -- files ------------------------------------------------------------------------------------------------------


def names() -> list[str]:
    """The names of all switches, sorted."""
    try:
        return sorted(one.removesuffix(".json") for one in os.listdir(_folder()) if one.endswith(".json"))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise errors.of_os_error(error, "list the switches", path=_folder()) from error


def load(name: str) -> SwitchSpec:
    """A switch by its name. Raises NotFound, InvalidSpec."""
    path = _path(name)
    try:
        with open(path, "rb") as file:
            document = json.loads(file.read(MAX_FILE_BYTES))
        return SwitchSpec.model_validate(document)
    except FileNotFoundError as error:
        known = ", ".join(names()) or "none"
        hint = f"make one: vmm switch create {name} --type private"
        raise errors.NotFound(f"there is no switch {name!r}; there are: {known}", hint=hint) from error
    except OSError as error:
        raise errors.of_os_error(error, "read the switch", path=path) from error
    except ValidationError as error:
        raise errors.InvalidSpec(f"is no switch: {words_of(error)}", path=path) from error
    except ValueError as error:
        raise errors.InvalidSpec("is no switch: it holds no JSON", path=path) from error


def load_all() -> list[SwitchSpec]:
    """All switches that can be read."""
    found = []
    for name in names():
        with contextlib.suppress(errors.VmmError):
            found.append(load(name))
    return found


def create(spec: SwitchSpec) -> None:
    """Add a switch, and have it on the host when it is one of the bridge back end. All of it, or nothing.

    Raises AlreadyExists, InvalidSpec for a network that another switch has or too long names of sockets, and as
    `ensure` does.
    """
    UserBackend.of(spec.id, spec.name)
    if spec.type == "internal":
        guest_addresses.refuse_range(spec)
    spec = cards.with_address(spec)
    paths.make_home()
    try:
        paths.make_folders(_folder())
    except OSError as error:
        raise errors.of_os_error(error, "make the folder", path=_folder()) from error
    with locked(os.path.join(_folder(), ".lock")):
        path = _path(spec.name)
        if os.path.exists(path):
            raise errors.AlreadyExists(f"there is a switch {spec.name!r} already")
        for other in load_all():
            if spec.uplink is not None and other.uplink == spec.uplink:
                raise errors.InUse(f"{spec.uplink} is the uplink of switch {other.name!r} already")
            if spec.address and other.address and spec.network.overlaps(other.network):
                raise errors.InvalidSpec(f"the network {spec.network} overlaps with switch {other.name!r}'s")
        paths.write_whole(path, spec.to_json())
        try:
            ensure(spec)
            if spec.type == "internal" and spec.backend == "user":
                HostSide(spec).check_way_out()
        except BaseException:
            host = HostSide(spec)
            with contextlib.suppress(errors.VmmError):
                host.remove()
            if not host.is_half_made():  # else `delete` must find it, to put the rest back
                _forget(spec)
            raise


def delete(name: str, *, force: bool = False) -> list[str]:
    """Take a switch away, and put the host back; what could not be put back, in words: of a card that is gone.

    Raises InUse while guests are plugged in, VmmError for what resists. Forced it ends with neither.
    """
    load(name)  # said before a folder for a lock is missed
    with locked(os.path.join(_folder(), ".lock")):
        spec = load(name)
        host = HostSide(spec)
        try:
            in_use = [one["name"] for one in host.guests() if one["connected"]]
        except errors.TimedOut as error:  # its process hangs, and is killed in the end
            if not force:
                error.hint = error.hint or "with --force it is ended and deleted, whoever is plugged in"
                raise
            in_use = []
        if in_use and not force:
            raise errors.InUse(
                f"switch {name!r} has guests on it: {', '.join(in_use)}", hint="unplug them first, or use --force"
            )
        try:
            left = host.remove(give_up=force)
        except errors.VmmError as error:
            if spec.backend == "bridge" and error.hint is None:
                error.hint = "what cannot be put back is left as it is, and told, with --force"
            raise
        _forget(spec)
    return left


def _forget(spec: SwitchSpec) -> None:
    """Its files; last the one by which it is found."""
    for path in (lease_path(spec), _path(spec.name)):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def change(name: str, changed: Callable[[SwitchSpec], SwitchSpec]) -> SwitchSpec:
    """Other leases or names for a switch: what `changed` makes of what it is by then. Raises NotFound."""
    load(name)
    with locked(os.path.join(_folder(), ".lock")):
        spec = changed(load(name))
        paths.write_whole(_path(name), spec.to_json())
        ensure(spec)
    return spec


@contextlib.contextmanager
def staying(name: str) -> Iterator[HostSide]:
    """The switch of that name, which nobody deletes or changes while the block runs. Raises NotFound, InvalidSpec.

    For whoever plugs something into it: starting its process is what would bring a deleted one back.
    """
    load(name)  # said before a folder for a lock is missed
    with locked(os.path.join(_folder(), ".lock")):
        yield HostSide(load(name))


def set_uplink(name: str, interface: str) -> SwitchSpec:
    """Give an external switch another network card, or its own under another name; what it is then.

    The old card gets back what it had; where it is gone, the new one gets that. Raises NotFound, InvalidSpec, InUse,
    Unsupported, AccessDenied, and as `ensure` does; then it is on the old card, where that is possible.
    """
    from vmm.net.applying import Applying

    with staying(name) as host:
        spec = host.spec
        if spec.type != "external":
            raise errors.InvalidSpec(f"switch {name!r} is {spec.type}: only an external one has a network card")
        if any(one.name != name and one.uplink == interface for one in load_all()):
            raise errors.InUse(f"{interface} is the uplink of another switch already")
        changed = cards.with_address(plan.make_switch(**{**spec.model_dump(), "uplink": interface}))
        _, _, reasons = HostSide(changed).plan()
        if reasons:
            raise errors.Unsupported("; ".join(reasons))
        with host.changing():
            Applying(spec, host.folder, lease_path(spec)).undo(heir=interface)
        paths.write_whole(_path(name), changed.to_json())
        try:
            HostSide(changed).ensure()
        except BaseException:
            paths.write_whole(_path(name), spec.to_json())
            with contextlib.suppress(errors.VmmError):
                host.ensure()
                host.plug_again()
            raise
        HostSide(changed).plug_again()
        return changed


def set_mtu(name: str, mtu_bytes: int) -> tuple[SwitchSpec, list[str]]:
    """Have a switch carry other frames; it, and the ports whose guests keep theirs until they start again.

    Raises NotFound, InvalidSpec, Unsupported for more than the card carries, and as `ensure` does: all is as before.
    """
    with staying(name) as host:
        changed = plan.make_switch(**{**host.spec.model_dump(), "mtu_bytes": mtu_bytes})
        if changed.backend == "bridge" and (reasons := HostSide(changed).plan()[2]):
            raise errors.Unsupported("; ".join(reasons))
        paths.write_whole(_path(name), changed.to_json())
        try:
            HostSide(changed).ensure()
        except BaseException:
            paths.write_whole(_path(name), host.spec.to_json())
            with contextlib.suppress(errors.VmmError):
                host.ensure()
            raise
        return changed, [one["name"] for one in host.guests() if one["connected"]]


def lease_path(spec: SwitchSpec) -> str:
    """Where the leases of a switch are kept."""
    return os.path.join(_folder(), f"{spec.id}.leases")


def free_address() -> str:
    """The host's address for a new internal switch, in a network that nobody here uses."""
    from vmm.net.bridge import Kernel

    taken = [spec.network for spec in load_all() if spec.address]
    with Kernel() as kernel:
        taken += [ipaddress.IPv4Interface(one).network for one in (*kernel.networks(), *kernel.routed())]
    return str(plan.free_network(taken))


def ensure(spec: SwitchSpec) -> None:
    """Have the switch on this host now: rules, bridge and addresses, or its process. Doing it twice is fine."""
    HostSide(spec).ensure()


# -- the host's side --------------------------------------------------------------------------------------------


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

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Nobody else changes its bridge meanwhile."""
        paths.make_private(self.folder)
        with locked(os.path.join(self.folder, "change.lock")):
            yield

    def ensure(self) -> None:
        """As `switches.ensure`."""
        if self.spec.backend == "bridge":
            with self.changing():
                was_made = self._apply()
                self._follow_mtu()
            if was_made:  # somebody had removed it: taps that are still there go into the new one
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
            self.user.ensure("set_gateway", gateway=gateway, dhcp=lent, leases=lease_path(self.spec))

    def check_way_out(self) -> None:
        """Wait until the gateway of a `user` switch answers. Raises VmmError with what it said when it ended."""
        deadline = time.monotonic() + GATEWAY_SECONDS
        while time.monotonic() < deadline:
            status = self.user.status()
            if status is None or status["gateway"] is None or status["gateway"]["ready"]:
                return
            gateway = status["gateway"]
            if not gateway["running"]:
                said = str(gateway["said"]).strip().splitlines() or ["it says nothing"]
                problem = said[-1].removeprefix(f"{QEMU}: ").rpartition("}: ")[2]  # of the option that it is about
                raise errors.VmmError(
                    f"the gateway of switch {self.spec.name!r} does not start: {problem}", hint=hint_for(problem)
                )
            time.sleep(_LOOK_SECONDS)

    def _apply(self) -> bool:
        from vmm.net.applying import Applying

        need_root(self.spec)
        applying = Applying(self.spec, self.folder, lease_path(self.spec), self.bridge_ports())
        if not applying.is_applied() and (spec := cards.found(self.spec)) != self.spec:  # its card has another name
            paths.write_whole(_path(spec.name), spec.to_json())
            applying = Applying(spec, self.folder, lease_path(spec), self.bridge_ports())
        return applying.apply()

    def mtu_bytes(self) -> int | None:
        """The most bytes of a frame behind its header: what was set, the card's, or Ethernet's.

        None on the user back end where nothing was set: it carries whatever guests choose, up to 9216.
        """
        if self.spec.mtu_bytes is not None or self.spec.backend == "user":
            return self.spec.mtu_bytes
        card = None if self.spec.uplink is None else cards.mtu_bytes(self.spec.uplink)
        return card or plan.USUAL_MTU_BYTES

    def _follow_mtu(self) -> None:
        """Have bridge and taps carry what the switch does by now."""
        from vmm.net import bridge

        wanted = self.mtu_bytes() or plan.USUAL_MTU_BYTES
        names = [self.spec.bridge_name, *(one.interface for one in self.bridge_ports())]
        if any(cards.mtu_bytes(name) not in (None, wanted) for name in names):
            with bridge.Kernel() as kernel:
                for name in reversed(names):
                    kernel.set_mtu(name, wanted)

    def is_half_made(self) -> bool:
        """True when something on the host could not be put back."""
        from vmm.net.applying import JOURNAL_NAME

        try:
            with open(os.path.join(self.folder, JOURNAL_NAME), encoding="utf-8") as file:
                return bool(json.load(file)["done"])
        except (OSError, ValueError, KeyError):
            return False

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
                left = Applying(self.spec, self.folder, lease_path(self.spec)).undo(give_up=give_up)
            shutil.rmtree(self.folder, ignore_errors=True)
            return left
        self.user.stop()
        return []

    # -- ports of a bridge: a file each, so that the rules can be made anew at any time ---------------------------

    def _ports_folder(self) -> str:
        return os.path.join(self.folder, "ports")

    def bridge_ports(self) -> list[nft.GuestPort]:
        """The ports whose taps are there; files of others are removed."""
        found = []
        for document in self._port_documents():
            interface = str(document["interface"])
            if not os.path.exists(f"/sys/class/net/{interface}"):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(os.path.join(self._ports_folder(), f"{interface}.json"))
                continue
            setup = ports.from_document(document["port"])
            found.append(nft.GuestPort(interface, setup.rules, setup.rate_bits_per_second))
        return found

    def _port_documents(self) -> list[dict[str, Any]]:
        documents = []
        with contextlib.suppress(FileNotFoundError):
            for name in sorted(os.listdir(self._ports_folder())):
                if name.endswith(".json"):
                    with open(os.path.join(self._ports_folder(), name), encoding="utf-8") as file:
                        documents.append(json.load(file))
        return documents

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
                raise errors.Unsupported("the bridge back end mirrors no ports", hint="use the user back end")
            paths.make_private(self._ports_folder())
            document = {"interface": interface, "port": ports.to_document(setup)}
            path = os.path.join(self._ports_folder(), f"{interface}.json")
            paths.write_whole(path, json.dumps(document).encode(), durable=False)
            enforcing.enforce(self.spec, self.bridge_ports())
            ipv6_settings.close_tap(interface)
            with bridge.Kernel() as kernel:
                kernel.set_mtu(interface, self.mtu_bytes() or plan.USUAL_MTU_BYTES)
                kernel.set_master(interface, self.spec.bridge_name)
                if filters:  # also without a VLAN: it may have had one
                    kernel.set_vlans(interface, *plan.port_vlans(rules.vlan, rules.allowed))
                kernel.set_up(interface, setup.link_up)

    def plug_again(self) -> None:
        """Put the taps that are there into the bridge, which was made anew. Raises VmmError."""
        for document in self._port_documents():
            if _is_there(document):
                self.plug_tap(str(document["interface"]), ports.from_document(document["port"]))

    def has_tap(self, interface: str) -> bool:
        """True while a tap is part of the bridge, which anybody with the right to may remove."""
        try:
            return os.path.basename(os.readlink(f"/sys/class/net/{interface}/master")) == self.spec.bridge_name
        except OSError:
            return False

    def unplug_tap(self, interface: str) -> None:
        """Forget a port; its tap goes with its descriptors."""
        from vmm.net import enforcing

        with self.changing():
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(self._ports_folder(), f"{interface}.json"))
            if os.path.exists(f"/sys/class/net/{self.spec.bridge_name}"):
                enforcing.enforce(self.spec, self.bridge_ports())

    def guests(self) -> list[dict[str, Any]]:
        """The ports of machines, as `port_status` tells them."""
        return [one for one in self.port_status(with_drops=False) if one["name"] != PORT_NAME]

    def port_status(self, *, with_drops: bool = True) -> list[dict[str, Any]]:
        """What is plugged where, with counters, in one form for both back ends.

        Without the drops of a bridge's ports it is cheap.
        """
        if self.spec.backend == "user":
            status = self.user.status()
            return [] if status is None else list(status["ports"])
        drops: dict[str, dict[str, int]] = {}
        if with_drops and os.geteuid() == 0:  # nobody else may ask the kernel
            from vmm.net import enforcing

            drops = enforcing.drops(self.spec)
        return [
            _tap_status(one["interface"], one["port"], drops.get(one["interface"], {}), self.has_tap(one["interface"]))
            for one in self._port_documents()
            if _is_there(one)
        ]


def _is_there(document: dict[str, Any]) -> bool:
    return os.path.exists(f"/sys/class/net/{document['interface']}")


def _tap_status(interface: str, port: dict[str, Any], drops: dict[str, int], is_in: bool) -> dict[str, Any]:
    """Counters as the guest sees them: the kernel's are the other way round."""

    def counter(name: str) -> int:
        try:
            with open(f"/sys/class/net/{interface}/statistics/{name}", encoding="ascii") as file:
                return int(file.read())
        except OSError:
            return 0

    return {
        **port,
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
            f"switch {spec.name!r} is of the bridge back end, which needs root",
            hint="use sudo" + ("" if spec.type == "external" else ", or make it with --backend user"),
        )
