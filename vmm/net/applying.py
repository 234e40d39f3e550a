# SPDX-License-Identifier: Apache-2.0
"""Creating a switch of the bridge back end, and undoing it: steps with a journal.

Decides that the host is changed one step at a time, and that each step is recorded, together with the previous state,
before it is made. Whenever a process is killed, `undo` therefore restores exactly the previous state. Applying a
switch that is already applied changes nothing. An external switch whose gateway stops answering is undone at once. The
steps themselves are decided in `plan`.

    runtime/sw-ID/journal.json   {"boot_id": ..., "complete": false, "done": [{"kind": ..., "before": {...}}, ...]}

`INV-NET-UNDONE`: after `undo`, links, addresses, routes, settings and rules are as they were before, whatever happened
in between. A journal from an earlier boot is ignored: the kernel has forgotten everything that it describes.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from vmm.model import errors, paths
from vmm.net import enforcing, forwarding, ipv6, ipv6_settings, nft, plan, records, restoring, settings
from vmm.net.bridge import Kernel
from vmm.net.dhcp import Dnsmasq
from vmm.net.plan import HostFacts, Step
from vmm.net.restoring import Resisted
from vmm.net.switch_spec import SwitchSpec

GATEWAY_SECONDS = 5.0
JOURNAL_NAME = "journal.json"


class Applying:
    """The host's side of one switch. Not concurrently: the caller holds the switch's lock."""

    def __init__(self, spec: SwitchSpec, folder: str, lease_path: str, ports: Sequence[nft.GuestPort] = ()) -> None:
        self.spec = spec
        self.ports = ports
        self._journal_path = os.path.join(folder, JOURNAL_NAME)
        self._folder = folder
        self._shared = os.path.dirname(os.path.abspath(folder))
        self._dhcp = Dnsmasq(spec, folder, lease_path)
        self._heir: str | None = None

    # -- the journal --------------------------------------------------------------------------------------------

    def _journal(self) -> dict[str, Any]:
        empty = {"boot_id": settings.boot_id(), "complete": False, "done": []}
        try:
            journal = records.read_object(self._journal_path)
        except FileNotFoundError:
            return empty
        except (OSError, ValueError) as error:
            raise errors.VmmError(f"the journal cannot be read: {error}", path=self._journal_path) from error
        boot_id, done = journal.get("boot_id"), journal.get("done")
        if isinstance(boot_id, str) and boot_id != empty["boot_id"]:
            return empty
        is_sound = isinstance(done, list) and all(isinstance(one, dict) for one in done)
        if not isinstance(boot_id, str) or not is_sound:
            raise errors.VmmError("the journal is damaged: it does not list the steps", path=self._journal_path)
        return {**journal, "complete": journal.get("complete") is True}

    def _write(self, journal: dict[str, Any]) -> None:
        paths.write_whole(self._journal_path, json.dumps(journal, indent=1).encode(), durable=False)

    # -- there and back -----------------------------------------------------------------------------------------

    def is_applied(self) -> bool:
        """True if every step was made and the bridge exists."""
        if not self._journal()["complete"]:
            return False
        return os.path.isdir(f"/sys/class/net/{self.spec.bridge_name}/bridge")

    def apply(self) -> bool:
        """Create the switch on this host; True if anything had to be done. Raises VmmError, with everything undone."""
        if self.is_applied():
            if not self.spec.moves_host:  # another program may have enabled forwarding on all interfaces
                ipv6_settings.write(self.spec.bridge_name, ipv6_settings.NONE)
            enforcing.enforce(self.spec, self.ports)
            if self.spec.type == "internal" and self.spec.dhcp:
                self._dhcp.ensure()
            return False
        paths.make_private(self._folder)
        self.undo()
        with Kernel() as kernel:
            facts = kernel.facts(self.spec)
            if reasons := plan.refusals(self.spec, facts):
                raise errors.Unsupported("; ".join(reasons), hint=_hint(reasons))
            gateways = self._gateways(kernel, facts)
            journal = self._journal()
            try:
                for step in plan.steps(self.spec, facts):
                    journal["done"].append({"kind": step.kind, "before": self._before(kernel, step)})
                    self._write(journal)
                    self._do(kernel, step)
                self._ask_again(kernel, gateways)
            except BaseException:
                self._take_back(kernel, journal, Resisted())
                raise
        journal["complete"] = True
        self._write(journal)
        return True

    def undo(self, *, heir: str | None = None, give_up: bool = False) -> list[str]:
        """Undo everything; returns, in words, what could not be restored: the settings of a card that is gone, and
        with `give_up` also whatever fails. Succeeds if nothing is left to undo. Raises VmmError for a failure
        otherwise.

        `heir` is the card that receives the addresses and routes of a card that is gone; without it they are lost.
        """
        self._heir = heir
        resisted = Resisted(give_up)
        journal: dict[str, Any] = {"done": []}
        with resisted.trying("read the previous state"):
            journal = self._journal()
        if journal["done"]:
            with Kernel() as kernel:
                self._take_back(kernel, journal, resisted)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._journal_path)
        return resisted.words

    def _take_back(self, kernel: Kernel, journal: dict[str, Any], resisted: Resisted) -> None:
        """Undo the steps in reverse order. Each is removed from the journal once it is undone, so a kill here is
        harmless, too.
        """
        journal["complete"] = False
        while journal["done"]:
            entry = journal["done"][-1]
            with resisted.trying(f"undo {entry.get('kind')!r}"):
                self._undo(kernel, entry["kind"], entry["before"], resisted)
            journal["done"].pop()
            self._write(journal)

    def _gateways(self, kernel: Kernel, facts: HostFacts) -> list[str]:
        """The neighbours that must answer afterwards: one each of IPv4 and IPv6 that answers now."""
        if facts.uplink is None or not self.spec.host or not facts.uplink.is_up:
            return []
        found: dict[bool, str] = {}
        for route in facts.uplink.routes:
            if route.gateway is None or not route.destination.endswith("/0"):
                continue
            is_six = ":" in route.gateway
            if is_six not in found and kernel.answers(facts.uplink.name, route.gateway, 1.0):
                found[is_six] = route.gateway
        return list(found.values())

    def _ask_again(self, kernel: Kernel, gateways: Sequence[str]) -> None:
        deadline = time.monotonic() + GATEWAY_SECONDS
        for gateway in gateways:
            if not kernel.answers(self.spec.bridge_name, gateway, max(deadline - time.monotonic(), 0)):
                raise errors.VmmError(
                    f"the gateway {gateway} does not answer through the switch, so everything was undone",
                    hint=f"does the network behind {self.spec.uplink} allow several MAC addresses on one port?",
                )

    # -- the steps ----------------------------------------------------------------------------------------------

    def _before(self, kernel: Kernel, step: Step) -> dict[str, Any]:
        """The state that is needed to undo the step."""
        arguments = step.arguments
        match step.kind:
            case "sysctl":
                return {"setting": arguments["setting"]}  # its previous value is kept by `settings`, for all switches
            case "bridge":
                if kernel.link(arguments["name"]) is not None:
                    raise errors.AlreadyExists(f"an interface {arguments['name']} already exists")
                return {"name": arguments["name"]}
            case "up":
                link = kernel.link(arguments["name"])
                return {**kernel.mark(arguments["name"]), "was_up": link is not None and link["is_up"]}
            case "enslave":
                return kernel.mark(arguments["name"])
            case "quiet":
                return {**kernel.mark(arguments["name"]), "was": ipv6.is_off(arguments["name"])}
            case "keep":
                addresses, routes = kernel.addresses(arguments["name"]), kernel.routes(arguments["name"])
                document = {"addresses": [asdict(one) for one in addresses], "routes": [asdict(one) for one in routes]}
                return {**kernel.mark(arguments["name"]), "at": time.time(), **document}
        return {}  # what was added to the bridge disappears with it; the card's state was recorded before

    def _do(self, kernel: Kernel, step: Step) -> None:
        arguments = step.arguments
        match step.kind:
            case "rules":
                enforcing.enforce(self.spec, self.ports)
            case "bridge":
                kernel.add_bridge(**arguments)
            case "sysctl":
                settings.hold(self._shared, arguments["setting"], arguments["value"], self.spec.id)
            case "forward":
                forwarding.begin(self._shared, self.spec.id)
            case "ipv6":
                ipv6_settings.write(**arguments)
            case "up":
                kernel.set_up(arguments["name"])
            case "quiet":
                ipv6.switch_off(arguments["name"])
            case "enslave":
                kernel.set_master(arguments["name"], arguments["bridge"])
            case "vlans":
                kernel.set_vlans(**arguments)
            case "address":
                kernel.add_address(**arguments)
            case "drop-address":
                kernel.remove_address(**arguments)
            case "route":
                kernel.add_route(arguments["name"], arguments["route"])
            case "dhcp":
                self._dhcp.ensure()

    def _undo(self, kernel: Kernel, kind: str, before: dict[str, Any], resisted: Resisted) -> None:
        """Undo a step, whether it was made, half made or not made at all."""
        match kind:
            case "rules":
                enforcing.end(self.spec)
            case "bridge":
                kernel.remove_bridge(before["name"])
            case "sysctl":
                settings.release(self._shared, before["setting"], self.spec.id)
            case "forward":
                forwarding.end(self._shared, self.spec.id)
            case "up":
                if not before["was_up"]:
                    kernel.set_up(kernel.name_now(before) or before["name"], False)
            case "quiet":
                if (name := kernel.name_now(before)) is not None and before["was"] is False:
                    ipv6.switch_on(name)
            case "enslave":
                if (name := kernel.name_now(before)) is not None:
                    kernel.set_master(name, None)
            case "keep":
                name = kernel.name_now(before) or self._heir
                if name is not None:
                    restoring.put_back(kernel, {**before, "name": name}, self.spec.bridge_name, resisted)
                else:  # the card was removed, and its settings with it
                    resisted.words += restoring.lost(before)
            case "dhcp":
                self._dhcp.stop()


def _hint(reasons: Sequence[str]) -> str | None:
    return plan.VLAN_HINT if plan.VLAN_REFUSAL in reasons else None
