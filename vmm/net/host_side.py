# SPDX-License-Identifier: Apache-2.0
"""What there is of one switch on the running host: its process or its bridge, and the ports on it.

Decides which back end a switch has, and that all of it follows from the switch's file at any time
(`HostSide.ensure`). What the back ends do is decided in `backends` and `bridge_backend`. Must not know machines, nor
how switches are made and deleted: that is `switches`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vmm.model import paths
from vmm.net.backends import Backend, UserBackend
from vmm.net.bridge_backend import BridgeBackend
from vmm.net.gateway import PORT_NAME
from vmm.net.switch_process import SwitchProcess
from vmm.net.switch_spec import SwitchSpec


@dataclass(frozen=True, slots=True)
class HostSide:
    """What there is of a switch on the running host."""

    spec: SwitchSpec

    @property
    def backend(self) -> Backend:
        """Its back end: chosen here and nowhere else."""
        return self.bridge if self.spec.capabilities.in_kernel else UserBackend(self.spec, self.user)

    @property
    def user(self) -> SwitchProcess:
        """Its process; of the user back end."""
        return SwitchProcess.of(self.spec.id, self.spec.name)

    @property
    def bridge(self) -> BridgeBackend:
        """Its bridge; of the bridge back end."""
        return BridgeBackend(self.spec, self.folder)

    @property
    def folder(self) -> str:
        """Its runtime folder."""
        return self.user.folder

    @property
    def lease_path(self) -> str:
        """Where the leases of an internal switch are kept."""
        return paths.switch_leases(self.spec.id)

    def ensure(self) -> None:
        """Have the switch on this host now: rules, bridge and addresses, or its process. Doing it twice is fine."""
        self.backend.ensure()

    def remove(self, *, give_up: bool = False) -> list[str]:
        """Put the host back, end the process; what could not be put back, as `Applying.undo`."""
        return self.backend.remove(give_up=give_up)

    def mtu_bytes(self) -> int | None:
        """The most bytes of a frame behind its header: what was set, but no more than the card's; else Ethernet's.

        None on the user back end where nothing was set: it carries whatever guests choose, up to 9216.
        """
        return self.backend.mtu_bytes()

    def guests(self) -> list[dict[str, Any]]:
        """The ports of machines, as `port_status` describes them."""
        return [one for one in self.port_status(with_drops=False) if one["name"] != PORT_NAME]

    def port_status(self, *, with_drops: bool = True) -> list[dict[str, Any]]:
        """What is plugged where, with counters, in one form for both back ends.

        Without the drops of a bridge's ports it is cheap.
        """
        return self.backend.port_status(with_drops=with_drops)
