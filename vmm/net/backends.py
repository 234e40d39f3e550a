# SPDX-License-Identifier: Apache-2.0
"""What a switch requires of its back end on the running host, and the back end that is a process.

Decides what differs between the two ways to move frames: a process of our own without root (`UserBackend`), or a
bridge of the kernel (`BridgeBackend`, in `bridge_backend`). `HostSide` chooses one, and all other code uses the object
that it chose. What a back end can do in general is known without a host: `switch_spec.Capabilities`. Must not know
machines, QEMU, nor how switches are created and deleted.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from vmm.model import errors, paths
from vmm.model.waiting import looks
from vmm.net import ports
from vmm.net.enclosing import hint_for
from vmm.net.gateway import problem_of
from vmm.net.switch_process import SwitchProcess
from vmm.net.switch_spec import SwitchSpec

GATEWAY_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class AdapterPort:
    """A port with its names on both back ends: the tap, and the folder of the sockets."""

    interface: str
    folder: str
    setup: ports.PortSetup


@dataclass(frozen=True, slots=True)
class HostChanges:
    """What creating a switch would do to the host, in words: steps, warnings, and the reasons why it is impossible."""

    steps: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)


class Backend(Protocol):
    """One switch on the running host. Methods raise VmmError."""

    def ensure(self) -> None:
        """Make the switch run on the host. Idempotent."""

    def check(self) -> None:
        """Wait until a switch that was just created works. Raises VmmError with the reason if it does not."""

    def remove(self, *, give_up: bool = False) -> list[str]:
        """Restore the host; returns, in words, what could not be restored."""

    def is_up(self) -> bool:
        """True while its process runs, or its bridge exists."""

    def end_descriptor(self) -> int | None:
        """A descriptor that becomes readable when its process ends; None if it has no process."""

    def plan(self) -> HostChanges:
        """What `ensure` would change on the host. Changes nothing."""

    def in_the_way(self) -> list[str]:
        """Settings of other programs on the host that keep it from working, and the remedies."""

    def status(self) -> dict[str, Any] | None:
        """The status that its process reports; None if no process runs."""

    def state(self, status: dict[str, Any] | None) -> str:
        """A word for users that says whether it runs; `status` is what `status()` returned."""

    def mtu_bytes(self) -> int | None:
        """The MTU in bytes; None: it carries whatever guests choose, up to 9216."""

    def addresses(self) -> list[dict[str, Any]]:
        """The MAC addresses that it has learned. Raises Unsupported."""

    def refuse_capture(self, output: str) -> None:
        """Raise Unsupported if frames cannot be captured here; its hint has the command that captures them."""

    def port_status(self, *, with_drops: bool = True) -> list[dict[str, Any]]:
        """Its ports with counters, in the same form for both back ends."""

    def plug(self, port: AdapterPort) -> None:
        """Add or change a port."""

    def unplug(self, port: AdapterPort) -> None:
        """Remove a port; succeeds if it does not exist."""

    def fits(self, port: AdapterPort) -> bool:
        """True if the running machine has what this back end plugs in: a tap, or a pair of sockets."""

    def is_in(self, port: AdapterPort) -> bool:
        """False for a port that another program removed."""


@dataclass(frozen=True, slots=True)
class UserBackend:
    """A switch that is a process of our own. A `Backend`."""

    spec: SwitchSpec
    process: SwitchProcess

    def ensure(self) -> None:
        """Start its process; an internal switch also gets its gateway and its DHCP server."""
        self.process.ensure_running()
        if self.spec.type == "internal":
            self._ensure_way_out()

    def _ensure_way_out(self) -> None:
        """Set the gateway and the DHCP server as the switch's file defines them."""
        setup, dhcp = self.spec.gateway(), self.spec.dhcp_setup()
        gateway = {**asdict(setup), "forwards": list(setup.forwards)}
        lent = None if dhcp is None else dhcp.to_document()
        status = self.process.status() or {}
        present = status.get("gateway") or {}
        if {key: present.get(key) for key in gateway} != gateway or status.get("dhcp") != lent:
            self.process.ensure("set_gateway", gateway=gateway, dhcp=lent, leases=paths.switch_leases(self.spec.id))

    def check(self) -> None:
        """Wait until the gateway answers. Raises VmmError with its last message if it ended."""
        if self.spec.type != "internal":
            return
        for _ in looks(GATEWAY_SECONDS):
            status = self.process.status()
            if status is None or status["gateway"] is None or status["gateway"]["ready"]:
                return
            gateway = status["gateway"]
            if not gateway["running"]:
                problem = problem_of(str(gateway["said"]))
                raise errors.VmmError(
                    f"the gateway of switch {self.spec.name!r} did not start: {problem}", hint=hint_for(problem)
                )

    def remove(self, *, give_up: bool = False) -> list[str]:
        """End its process; nothing else is left of it."""
        del give_up
        self.process.stop()
        return []

    def is_up(self) -> bool:
        """True while its process runs."""
        return self.process.is_running()

    def end_descriptor(self) -> int | None:
        """The descriptor of its process."""
        return self.process.end_descriptor()

    def plan(self) -> HostChanges:
        """It changes nothing in the host's network."""
        return HostChanges()

    def in_the_way(self) -> list[str]:
        """Nothing: its frames do not pass through the host's rules."""
        return []

    def status(self) -> dict[str, Any] | None:
        """The status that its process reports; None if it does not run."""
        return self.process.status()

    def state(self, status: dict[str, Any] | None) -> str:
        """Whether the process runs, for people."""
        return "does not run (starts with the first machine on it)" if status is None else "runs"

    def mtu_bytes(self) -> int | None:
        """The MTU that was set."""
        return self.spec.mtu_bytes

    def addresses(self) -> list[dict[str, Any]]:
        """The addresses that its process has learned."""
        return self.process.addresses()

    def refuse_capture(self, output: str) -> None:
        """Raises nothing: its process captures frames itself."""

    def port_status(self, *, with_drops: bool = True) -> list[dict[str, Any]]:
        """The ports of its process; counting drops costs nothing here."""
        del with_drops
        status = self.status()
        return [] if status is None else list(status["ports"])

    def plug(self, port: AdapterPort) -> None:
        """Add or change a port; starts the process if it does not run."""
        self.process.plug(port.setup)

    def unplug(self, port: AdapterPort) -> None:
        """Remove a port, by its name."""
        self.process.unplug(port.setup.name)

    def fits(self, port: AdapterPort) -> bool:
        """True if the machine has the folder of the sockets."""
        return os.path.isdir(port.folder)

    def is_in(self, port: AdapterPort) -> bool:
        """True: no other program can remove its ports."""
        del port
        return True
