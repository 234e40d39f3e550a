# SPDX-License-Identifier: Apache-2.0
"""The process of one `user` switch: `python -m vmm.net.user_switch FOLDER NAME CONTROL_FD`.

Decides when frames are moved, when a port that sends too fast must wait, when addresses age, and when the process
ends: on request, or after IDLE_SECONDS without ports and clients. Needs no privileges; root's process drops them at
once. How it is started, found and restarted is decided in `switch_process`; what happens to a frame in `engine`.

    port sockets ──> Mover ──> port sockets          FOLDER/control.sock   requests, captures
                      │  asks                        FOLDER/ports.json     the ports, for a restart
                    Engine                           FOLDER/switch.log     what went wrong

`INV-SWITCH-RESTART`: a switch that is killed and started again in its folder has the same ports at the same addresses;
its guests lose frames, and nothing else.
"""

from __future__ import annotations

import heapq
import itertools
import json
import logging
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any

from vmm.model import errors, paths
from vmm.net import enclosed, engine, frames, ports, records
from vmm.net.capture import MAX_SNAP_BYTES, PacketCapture
from vmm.net.dhcp_server import DhcpSetup
from vmm.net.gateway import PORT_NAME, GatewaySetup
from vmm.net.gateway_process import KEPT_CAPABILITIES, ForkedStarter, Gateway, LocalStarter, Starter
from vmm.net.host_loopback import LoopbackFilter
from vmm.net.kept_dhcp import KeptDhcp
from vmm.net.mover import Mover
from vmm.net.port_socket import PortSocket
from vmm.net.ports import PortSetup
from vmm.net.switch_control import ControlServer, Loop, Method

IDLE_SECONDS = 10.0
TICK_SECONDS = 1.0
CONGESTION_SECONDS = 0.001  # the longest that a sender waits, each time, for a receiver that is behind
AGEING_TICKS = 10  # between two checks for old addresses
MAX_CAPTURES = 8
LOCK_DESCRIPTOR = 4  # the lock that shows that we run: our parent leaves it open
STATE_NAME, CONTROL_NAME, PID_NAME = "ports.json", "control.sock", "pid"
_log = logging.getLogger(__name__)


class UserSwitch:
    """The switch of a folder, from its start to its end."""

    def __init__(self, folder: str, name: str, listener: socket.socket, starter: Starter | None = None) -> None:
        self.folder = folder
        self.name = name
        self.started = time.time()
        self.loop = Loop()
        self.mover = Mover(engine.Engine())
        self._stopping = False
        self._ticks = 0
        self._idle_since = time.monotonic()
        self._resume: list[tuple[float, int, PortSocket]] = []
        self._order = itertools.count()
        self._waiting: list[PortSocket] = []  # ports that wait for a congested receiver
        self._captures: list[PacketCapture] = []
        self._gateway: Gateway | None = None
        self._starter = starter or LocalStarter(folder)
        self._dhcp: KeptDhcp | None = None
        methods: dict[str, Method] = {
            "status": self._status,
            "addresses": self._addresses,
            "add_port": self._add_port,
            "remove_port": self._remove_port,
            "set_link": self._set_link,
            "set_gateway": self._set_gateway,
            "stop": self._stop,
        }
        self._control = ControlServer(self.loop, listener, methods, self._start_capture, self._stop_capture)
        self._load()

    # -- the loop -----------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Move frames until asked to stop, or idle."""
        tick_at = time.monotonic() + TICK_SECONDS
        while not self._stopping:
            now = time.monotonic()
            if now >= tick_at:
                self._tick(now)
                tick_at = now + TICK_SECONDS
            due = min(tick_at, self._resume[0][0] if self._resume else tick_at)
            self.loop.run_once(max(0.0, due - now))
            if self._resume:
                self._resume_due(time.monotonic())
            if self._captures:
                self._control.pump_captures()

    def _guests(self) -> Iterator[PortSocket]:
        """Every port except the gateway's."""
        return (sock for name, sock in self.mover.sockets.items() if name != PORT_NAME)

    def _tick(self, now: float) -> None:
        self._ticks += 1
        for sock in self.mover.sockets.values():
            sock.check_peer()
        if self._ticks % AGEING_TICKS == 0:
            self.mover.engine.age(now)
        if self._gateway is not None:
            self._gateway.keep_alive(self._is_connected(PORT_NAME))
        if self._starter.is_lost:
            self._stopping = True  # the machines on it start it again, with all its ports
        if any(True for _ in self._guests()) or self._control.clients:
            self._idle_since = now
        elif now - self._idle_since > IDLE_SECONDS:
            self._stopping = True

    def _watch(self, sock: PortSocket) -> None:
        events = (0 if sock.waits_until else select.EPOLLIN) | (select.EPOLLOUT if sock.backlog else 0)

        def ready(happened: int) -> None:
            if happened & select.EPOLLOUT:
                sock.flush(time.monotonic())
                if not sock.backlog:
                    self._watch(sock)
                    self._let_go_on()
            if happened & select.EPOLLIN:
                self._pump(sock)

        self.loop.watch(sock.descriptor, events, ready)

    def _pump(self, sock: PortSocket) -> None:
        now = time.monotonic()
        mover = self.mover
        try:
            mover.pump(sock, now)
        except OSError as error:
            _log.warning("port %s: %s", sock.port.name, error)
            sock.connect()
        if mover.questions:
            self._answer(now)
        if mover.full:
            for full in mover.full:
                self._watch(full)
            mover.full.clear()
        wait = 0.0 if sock.rate is None else sock.rate.wait_seconds(now)
        if mover.congested and wait < CONGESTION_SECONDS:
            wait = CONGESTION_SECONDS
            self._waiting.append(sock)
        if wait:
            sock.waits_until = now + wait
            self._watch(sock)
            heapq.heappush(self._resume, (sock.waits_until, next(self._order), sock))

    def _answer(self, now: float) -> None:
        """Answer DHCP clients."""
        for port, message in self.mover.questions:
            frame = b"" if self._dhcp is None else self._dhcp.answer(port, message)
            if frame:
                self.mover.send_own(port, frame, now)
        self.mover.questions.clear()

    def _let_go_on(self) -> None:
        """A receiver has caught up: ports that waited for one may send again."""
        for sock in self._waiting:
            self._end_wait(sock)
        self._waiting.clear()

    def _resume_due(self, now: float) -> None:
        while self._resume and self._resume[0][0] <= now:
            sock = heapq.heappop(self._resume)[2]
            if sock.waits_until <= now:  # otherwise it continued meanwhile, and waits again
                self._end_wait(sock)

    def _end_wait(self, sock: PortSocket) -> None:
        sock.waits_until = 0.0
        if self.mover.sockets.get(sock.port.name) is sock:
            self._watch(sock)

    # -- requests -----------------------------------------------------------------------------------------------

    def _port(self, params: dict[str, Any]) -> str:
        name = params.get("name")
        if not isinstance(name, str) or name not in self.mover.sockets:
            raise errors.NotFound(f"switch {self.name} has no port {name}")
        return name

    def _add_port(self, params: dict[str, Any]) -> object:
        """Add a port, or change the rules of an existing one; then look for its peer again."""
        setup = ports.from_document(params)
        present = self.mover.sockets.get(setup.name)
        if present is not None and (present.setup.address, present.setup.peer) != (setup.address, setup.peer):
            self._take_out(setup.name)
            present = None
        if present is not None:
            self.mover.change(setup.name, setup)
            present.check_peer()
        else:
            if len(self.mover.sockets) >= engine.MAX_PORTS:
                raise errors.NoSpace(f"switch {self.name} has all its {engine.MAX_PORTS} ports")
            self._watch(self.mover.add(setup))
        self._save()
        return {"connected": self.mover.sockets[setup.name].connected}

    def _take_out(self, name: str) -> None:
        self.loop.unwatch(self.mover.sockets[name].descriptor)
        self.mover.remove(name)

    def _remove_port(self, params: dict[str, Any]) -> object:
        self._take_out(self._port(params))
        self._save()
        return {}

    def _set_link(self, params: dict[str, Any]) -> object:
        self.mover.set_link(self._port(params), bool(params.get("up")))
        self._save()
        return {}

    def _set_gateway(self, params: dict[str, Any], *, starts_later: bool = False) -> object:
        """Set or remove the way out of an internal switch, and its DHCP server with the file of its leases.

        `starts_later`: if the helper does not start now, `keep_alive` tries again.
        """
        wanted = params.get("gateway")
        gateway = None
        if wanted is not None:
            gateway = Gateway(GatewaySetup.from_document(wanted), self.folder, self._starter)
        dhcp = None
        if params.get("dhcp") is not None:
            dhcp = KeptDhcp(DhcpSetup.from_document(params["dhcp"]), str(params.get("leases", "")))
        if self._gateway is not None and (gateway is None or gateway.setup != self._gateway.setup):
            self.mover.engine.set_dhcp(None, None)
            self._gateway.stop()
            self._gateway = None
            self._take_out(PORT_NAME)
        if self._gateway is None and gateway is not None:
            # Its own user-mode network also answers DHCP; this cannot be switched off.
            rules = engine.PortRules(dhcp_guard=True)
            try:
                gateway.start()  # this creates the folder for both sockets
            except errors.VmmError as error:
                if not starts_later:
                    raise
                _log.error("the gateway did not start: %s", error)
            setup = PortSetup(PORT_NAME, gateway.address, gateway.peer, rules, owner=gateway.owner)
            self._add_port(ports.to_document(setup))
            self._gateway = gateway
        self._dhcp = dhcp
        server = None if dhcp is None else dhcp.server
        self.mover.engine.set_dhcp(server, None if self._gateway is None else PORT_NAME)
        is_closed = self._gateway is not None and not self._gateway.setup.host_loopback
        self.mover.engine.loopback = LoopbackFilter(self._gateway.setup) if self._gateway and is_closed else None
        self._save()
        return {}

    def _status(self, params: dict[str, Any]) -> object:
        del params
        if (way_out := self.mover.sockets.get(PORT_NAME)) is not None and not way_out.connected:
            way_out.connect()  # it may have started since the last tick, and a command waits for it
        return {
            "name": self.name,
            "pid": os.getpid(),
            "started": self.started,
            "address_count": len(self.mover.engine.addresses(time.monotonic())),
            "capture_count": len(self._captures),
            "gateway": None if self._gateway is None else self._gateway.status(self._is_connected(PORT_NAME)),
            "dhcp": self._dhcp_document(),
            "ports": [_port_status(sock) for sock in self.mover.sockets.values()],
        }

    def _is_connected(self, name: str) -> bool:
        return name in self.mover.sockets and self.mover.sockets[name].connected

    def _dhcp_document(self) -> dict[str, Any] | None:
        return None if self._dhcp is None else self._dhcp.server.setup.to_document()

    def _addresses(self, params: dict[str, Any]) -> object:
        del params
        known = self.mover.engine.addresses(time.monotonic())
        return [
            {"vlan": vlan, "mac": frames.format_mac(address), "port": port, "age_seconds": round(age, 1)}
            for vlan, address, port, age in known
        ]

    def _stop(self, params: dict[str, Any]) -> object:
        del params
        self._stopping = True
        return {}

    def _start_capture(self, params: dict[str, Any]) -> PacketCapture:
        port = self._port({"name": params["port"]}) if params.get("port") is not None else None
        snap = params.get("snap_bytes", MAX_SNAP_BYTES)
        if not isinstance(snap, int) or not frames.HEADER_BYTES <= snap <= MAX_SNAP_BYTES:
            raise errors.InvalidSpec(f"a captured frame has {frames.HEADER_BYTES} to {MAX_SNAP_BYTES} bytes")
        if len(self._captures) >= MAX_CAPTURES:
            raise errors.NoSpace(f"switch {self.name} already has {MAX_CAPTURES} captures")
        capture = PacketCapture(port, snap_bytes=snap)
        self._captures.append(capture)
        self.mover.add_capture(capture)
        return capture

    def _stop_capture(self, capture: PacketCapture) -> None:
        self._captures.remove(capture)
        self.mover.remove_capture(capture)

    # -- the state for a restart --------------------------------------------------------------------------------

    def _save(self) -> None:
        document = {
            "ports": [ports.to_document(sock.setup) for sock in self._guests()],
            "gateway": None if self._gateway is None else self._gateway.setup.to_document(),
            "dhcp": self._dhcp_document(),
            "leases": None if self._dhcp is None else self._dhcp.path,
        }
        content = json.dumps(document, indent=1).encode()
        paths.write_whole(os.path.join(self.folder, STATE_NAME), content, durable=False)

    def _load(self) -> None:
        """Restore the ports; one that cannot be restored is skipped and named in the log."""
        try:
            document = records.read_object(os.path.join(self.folder, STATE_NAME))
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            _log.error("the ports of the last run are lost, %s cannot be read: %s", STATE_NAME, error)
            return
        known = document.get("ports")
        for one in known if isinstance(known, list) else []:
            try:
                self._watch(self.mover.add(ports.from_document(one)))
            except errors.VmmError as error:
                _log.error("a port of the last run is lost: %s", error)
        if document.get("gateway"):
            try:
                setup = {key: document.get(key) for key in ("gateway", "dhcp", "leases")}
                self._set_gateway(setup, starts_later=True)
            except errors.VmmError as error:  # guests can reach each other without it
                _log.error("the gateway is lost: %s", error)

    def close(self) -> None:
        """Remove everything; the state for a restart stays."""
        if self._gateway is not None:
            self._gateway.stop()
        self._control.close()
        for name in list(self.mover.sockets):
            self._take_out(name)
        self.loop.close()

    def ask_to_stop(self) -> None:
        """End soon; for signal handlers."""
        self._stopping = True


def _port_status(sock: PortSocket) -> dict[str, Any]:
    counters = sock.port.counters
    return {
        **ports.to_document(sock.setup),
        "connected": sock.connected,
        "received_frames": counters.received_frames,
        "received_bytes": counters.received_bytes,
        "transmitted_frames": counters.transmitted_frames,
        "transmitted_bytes": counters.transmitted_bytes,
        "backlog_frames": len(sock.backlog),
        "drops": {str(reason): count for reason, count in counters.drops.items()},
    }


def main() -> None:
    """Run the switch whose folder, name and listening control socket are given."""
    folder, name, descriptor = sys.argv[1], sys.argv[2], int(sys.argv[3])
    paths.write_whole(os.path.join(folder, PID_NAME), str(os.getpid()).encode(), durable=False)
    starter: Starter | None = None
    if os.geteuid() == 0:
        starter = ForkedStarter(folder, (descriptor, LOCK_DESCRIPTOR))
        enclosed.limit_capabilities(KEPT_CAPABILITIES)
    switch = UserSwitch(folder, name, socket.socket(fileno=descriptor), starter)
    signal.signal(signal.SIGTERM, lambda number, frame: switch.ask_to_stop())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it comes from a terminal
    try:
        switch.run()
    finally:
        switch.close()


if __name__ == "__main__":
    main()
