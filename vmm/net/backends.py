# SPDX-License-Identifier: Apache-2.0
"""What a switch asks of its back end on the running host, and the back end that is a process.

Decides what differs between the two ways to move frames: a process of our own without root (`UserBackend`), or a
bridge of the kernel's (`BridgeBackend`, in `bridge_backend`). `HostSide` chooses one, and everything else asks the
object that it chose. What a back end can do at all is known without a host: `switch_spec.Capabilities`. Must not know
machines, QEMU, nor how switches are made and deleted.
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
    """A port under the names that either back end has for it: the tap's, and the folder of the sockets."""

    interface: str
    folder: str
    setup: ports.PortSetup


@dataclass(frozen=True, slots=True)
class HostChanges:
    """What making a switch would do to the host, in words: steps, warnings, and the reasons why it is impossible."""

    steps: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)


class Backend(Protocol):
    """One switch on the running host. Methods raise VmmError."""

    def ensure(self) -> None:
        """Have it on the host; doing it twice is fine."""

    def check(self) -> None:
        """Wait until a switch that was just made works. Raises VmmError with the reason when it does not."""

    def remove(self, *, give_up: bool = False) -> list[str]:
        """Put the host back; what could not be put back, in words."""

    def is_up(self) -> bool:
        """True while its process runs, or its bridge is there."""

    def end_descriptor(self) -> int | None:
        """A descriptor that is readable once its process has ended; None where there is none."""

    def plan(self) -> HostChanges:
        """What `ensure` would change on the host. Changes nothing."""

    def in_the_way(self) -> list[str]:
        """What other programs configured on the host that stops it from working, and what helps."""

    def status(self) -> dict[str, Any] | None:
        """The answer of its process; None where none runs."""

    def state(self, status: dict[str, Any] | None) -> str:
        """Whether it is there, for people; `status` is what `status()` returned."""

    def mtu_bytes(self) -> int | None:
        """The most bytes of a frame behind its header; None: it carries whatever guests choose, up to 9216."""

    def addresses(self) -> list[dict[str, Any]]:
        """The MAC addresses that it has learned. Raises Unsupported."""

    def refuse_capture(self, output: str) -> None:
        """Raise Unsupported where frames cannot be captured, with the command that writes them to `output`."""

    def port_status(self, *, with_drops: bool = True) -> list[dict[str, Any]]:
        """Its ports with counters, in one form for both back ends."""

    def plug(self, port: AdapterPort) -> None:
        """Add a port, or change it."""

    def unplug(self, port: AdapterPort) -> None:
        """Remove a port; one that is not there is fine."""

    def fits(self, port: AdapterPort) -> bool:
        """True when the running machine has what is plugged in here: a tap, or a pair of sockets."""

    def is_in(self, port: AdapterPort) -> bool:
        """False for a port that another program removed."""


@dataclass(frozen=True, slots=True)
class UserBackend:
    """A switch that is a process of our own. A `Backend`."""

    spec: SwitchSpec
    process: SwitchProcess

    def ensure(self) -> None:
        """Start its process; an internal one has its gateway and its DHCP server, too."""
        self.process.ensure_running()
        if self.spec.type == "internal":
            self._ensure_way_out()

    def _ensure_way_out(self) -> None:
        """Its gateway and its DHCP server, as its file has them."""
        setup, dhcp = self.spec.gateway(), self.spec.dhcp_setup()
        gateway = {**asdict(setup), "forwards": list(setup.forwards)}
        lent = None if dhcp is None else dhcp.to_document()
        status = self.process.status() or {}
        present = status.get("gateway") or {}
        if {key: present.get(key) for key in gateway} != gateway or status.get("dhcp") != lent:
            self.process.ensure("set_gateway", gateway=gateway, dhcp=lent, leases=paths.switch_leases(self.spec.id))

    def check(self) -> None:
        """Wait until the gateway answers. Raises VmmError with what it said when it ended."""
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
                    f"the gateway of switch {self.spec.name!r} does not start: {problem}", hint=hint_for(problem)
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
        """Of its process."""
        return self.process.end_descriptor()

    def plan(self) -> HostChanges:
        """It changes nothing of the host's network."""
        return HostChanges()

    def in_the_way(self) -> list[str]:
        """Nothing can be: its frames do not pass the host's rules."""
        return []

    def status(self) -> dict[str, Any] | None:
        """The answer of its process; None where none runs."""
        return self.process.status()

    def state(self, status: dict[str, Any] | None) -> str:
        """Whether the process runs, for people."""
        return "does not run (starts with the first machine on it)" if status is None else "runs"

    def mtu_bytes(self) -> int | None:
        """What was set."""
        return self.spec.mtu_bytes

    def addresses(self) -> list[dict[str, Any]]:
        """What its process has learned."""
        return self.process.addresses()

    def refuse_capture(self, output: str) -> None:
        """Its process captures frames itself."""

    def port_status(self, *, with_drops: bool = True) -> list[dict[str, Any]]:
        """The ports of its process; drops cost nothing."""
        del with_drops
        status = self.status()
        return [] if status is None else list(status["ports"])

    def plug(self, port: AdapterPort) -> None:
        """Starting the process where it does not run."""
        self.process.plug(port.setup)

    def unplug(self, port: AdapterPort) -> None:
        """By the port's name."""
        self.process.unplug(port.setup.name)

    def fits(self, port: AdapterPort) -> bool:
        """True when the machine has the folder of the sockets."""
        return os.path.isdir(port.folder)

    def is_in(self, port: AdapterPort) -> bool:
        """No other program removes its ports."""
        del port
        return True
