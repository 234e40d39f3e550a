# SPDX-License-Identifier: Apache-2.0
"""One switch on the running host: its process or its bridge, and its ports.

Decides which back end a switch has, and that everything on the host follows from the switch's file at any time
(`HostSide.ensure`). What the back ends do is decided in `backends` and `bridge_backend`. Must not know machines, nor
how switches are created and deleted: that is `switches`.
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
    """One switch on the running host."""

    spec: SwitchSpec

    @property
    def backend(self) -> Backend:
        """Its back end, chosen only here."""
        return self.bridge if self.spec.capabilities.in_kernel else UserBackend(self.spec, self.user)

    @property
    def user(self) -> SwitchProcess:
        """Its process; user back end only."""
        return SwitchProcess.of(self.spec.id, self.spec.name)

    @property
    def bridge(self) -> BridgeBackend:
        """Its bridge; bridge back end only."""
        return BridgeBackend(self.spec, self.folder)

    @property
    def folder(self) -> str:
        """Its runtime folder."""
        return self.user.folder

    @property
    def lease_path(self) -> str:
        """The file with the leases of an internal switch."""
        return paths.switch_leases(self.spec.id)

    def ensure(self) -> None:
        """Make the switch run on this host: rules, bridge and addresses, or its process. Idempotent."""
        self.backend.ensure()

    def remove(self, *, give_up: bool = False) -> list[str]:
        """Restore the host and end the process; returns what could not be restored, as `Applying.undo`."""
        return self.backend.remove(give_up=give_up)

    def mtu_bytes(self) -> int | None:
        """The MTU in bytes: what was set, but at most the card's; by default Ethernet's.

        None on the user back end if nothing was set: it carries whatever guests choose, up to 9216.
        """
        return self.backend.mtu_bytes()

    def guests(self) -> list[dict[str, Any]]:
        """The ports of machines, as `port_status` describes them."""
        return [one for one in self.port_status(with_drops=False) if one["name"] != PORT_NAME]

    def port_status(self, *, with_drops: bool = True) -> list[dict[str, Any]]:
        """All ports with counters, in the same form for both back ends.

        Cheap without the drops of a bridge's ports.
        """
        return self.backend.port_status(with_drops=with_drops)
