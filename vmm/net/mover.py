# SPDX-License-Identifier: Apache-2.0
"""The I/O side of a `user` switch: moves frames from one port's socket to others, as the engine decides.

Decides nothing about a frame; decides how little work is spent on each. A batch is received into slots; the headers of
all slots are read with two strided copies; a batch of one flow (the common case under load) costs one look-up, frames
of several flows one each; frames with the same destination leave with one system call.

`INV-MOVER-IS-ENGINE`: for any frames, the receivers get what `Engine.forward` returns, in the same order per flow.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

from vmm.net import dhcp_message, frames
from vmm.net.batch import Batch
from vmm.net.capture import Direction, PacketCapture
from vmm.net.dhcp_message import Message
from vmm.net.engine import Decision, Drop, Engine, Output, Port, PortRules
from vmm.net.port_socket import PortSocket
from vmm.net.ports import PortSetup

MAX_FLOWS = 4096  # of a port; a guest that invents headers only empties its own table
DHCP_WORD = int.from_bytes(dhcp_message.SERVER_PORT.to_bytes(2, "big"), sys.byteorder)  # as `Batch.words` returns it
_SAFE_BYTES = frames.HEADER_BYTES + frames.TAG_BYTES


class Mover:
    """All ports of one switch, and the one batch that they share. Not thread-safe."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.sockets: dict[str, PortSocket] = {}
        self._by_port: dict[Port, PortSocket] = {}
        self._batch = Batch()
        self._captures: list[PacketCapture] = []
        self.questions: list[tuple[Port, Message]] = []  # of DHCP clients: the caller answers and empties this list
        self.full: list[PortSocket] = []  # ports whose backlog began: the caller empties this list
        self.congested = False  # the last `pump` sent to a receiver that takes frames more slowly than they arrive

    def add(self, setup: PortSetup) -> PortSocket:
        """Add a port, connected if its peer exists. Raises VmmError."""
        port = self.engine.add_port(setup.name, setup.rules)
        try:
            sock = PortSocket(port, setup)
        except BaseException:
            self.engine.remove_port(setup.name)
            raise
        self.sockets[setup.name] = sock
        self._by_port[port] = sock
        sock.captures += [one for one in self._captures if one.port in (None, setup.name)]
        self.engine.set_link(setup.name, setup.link_up)
        sock.connect()
        return sock

    def change(self, name: str, setup: PortSetup) -> None:
        """Change the rules and limits of a port."""
        self.sockets[name].apply(setup)
        self.engine.set_rules(name, setup.rules)
        self.engine.set_link(name, setup.link_up)

    def set_link(self, name: str, up: bool) -> None:
        """Disconnect the port, or connect it again."""
        sock = self.sockets[name]
        sock.setup = replace(sock.setup, link_up=up)
        self.engine.set_link(name, up)

    def remove(self, name: str) -> None:
        """Remove a port."""
        sock = self.sockets.pop(name)
        self._by_port.pop(sock.port)
        self.engine.remove_port(name)
        sock.close()

    # -- the hot path -------------------------------------------------------------------------------------------

    def pump(self, source: PortSocket, now: float) -> int:
        """Move one batch that arrived at `source`; returns the number of frames. Raises OSError if its socket is
        broken.
        """
        batch = self._batch
        self.congested = False
        count = batch.receive(source.descriptor, source.batch_limit)
        if not count:
            return 0
        port, lengths = source.port, batch.lengths
        counters = port.counters
        counters.received_frames += count
        total = sum(lengths)
        counters.received_bytes += total
        if source.captures:
            self._capture(source, range(count), Direction.IN)
        if source.rate is not None:
            source.rate.overdraw(total, now)
        if not source.connected:
            source.connect()
        if min(lengths) < _SAFE_BYTES or max(lengths) > frames.MAX_FRAME_BYTES:
            self._pump_odd(port, count, now)
            return count
        first, second = batch.keys(count)
        key = (first[0], second[0])
        if first.count(key[0]) == count and second.count(key[1]) == count:
            decision = port.flows.get(key) or self._decide(port, 0, key, now)
            self._carry(port, decision, range(count), now)
            return count
        self._pump_mixed(port, list(zip(first, second, strict=True)), now)
        return count

    def _pump_mixed(self, port: Port, keys: list[tuple[int, int]], now: float) -> None:
        ways: dict[Decision, list[int]] = {}
        flows = port.flows
        for slot, key in enumerate(keys):
            decision = flows.get(key) or self._decide(port, slot, key, now)
            slots = ways.get(decision)
            if slots is None:
                ways[decision] = [slot]
            else:
                slots.append(slot)
        for decision, slots in ways.items():
            self._carry(port, decision, slots, now)

    def _pump_odd(self, port: Port, count: int, now: float) -> None:
        """A batch with a frame that is too long, or so short that its key would include part of another frame."""
        for slot in range(count):
            header = self._batch.beginning(slot, frames.KEY_BYTES)
            if frames.is_malformed(header, self._batch.lengths[slot]):
                port.counters.drops[Drop.MALFORMED] += 1
            else:
                self._carry(port, self.engine.decide(port, header, now), [slot], now)

    def _decide(self, port: Port, slot: int, key: tuple[int, int], now: float) -> Decision:
        header = self._batch.beginning(slot, frames.KEY_BYTES)
        if frames.is_malformed(header, self._batch.lengths[slot]):
            decision = MALFORMED
        else:
            decision = self.engine.decide(port, header, now)
        if len(port.flows) >= MAX_FLOWS:
            port.flows.clear()
        port.flows[key] = decision
        return decision

    def _carry(self, port: Port, decision: Decision, slots: Sequence[int], now: float) -> None:
        if decision.drop is not None:
            port.counters.drops[decision.drop] += len(slots)
            return
        if decision.inspect:
            slots = self._not_refused(port, decision, slots)
        if decision.flooded and port.storm is not None:
            granted = port.storm.take(len(slots), now)
            if granted < len(slots):
                port.counters.drops[Drop.STORM] += len(slots) - granted
                slots = slots[:granted]
        if decision.asks and slots:  # in two steps, because little of what goes to a gateway is DHCP
            tag_bytes = frames.TAG_BYTES if decision.must_be_last else 0  # tagged
            if DHCP_WORD in self._batch.words(dhcp_message.PORT_AT + tag_bytes):
                slots = self._asked(port, decision, slots, now)
        if slots:
            may_wait = not decision.flooded
            for output in decision.outputs:
                if output.port is self.engine.way_out and self.engine.loopback is not None:
                    self._send_out(port, output, slots, now, may_wait=may_wait)
                else:
                    self._send(output, slots, now, may_wait=may_wait)
                may_wait = False  # the other receivers get flooded frames or mirrors: no sender waits for a slow one

    def _send_out(self, port: Port, output: Output, slots: Sequence[int], now: float, *, may_wait: bool) -> None:
        """Send frames to the gateway, except those that would reach the host's loopback there."""
        leads, beginning = self.engine.leads_to_loopback, self._batch.beginning
        passed = [slot for slot in slots if not leads(output.port, beginning(slot, frames.INSPECT_BYTES))]
        if len(passed) < len(slots):
            port.counters.drops[Drop.LOOPBACK] += len(slots) - len(passed)
            slots = passed
        if slots:
            self._send(output, slots, now, may_wait=may_wait)

    def _asked(self, port: Port, decision: Decision, slots: Sequence[int], now: float) -> Sequence[int]:
        """Have DHCP clients answered, and send their frames to all receivers except the gateway; returns the other
        slots.
        """
        asked: list[int] = []
        for slot in slots:
            message = self.engine.asked(self._batch.beginning(slot, dhcp_message.MAX_FRAME_BYTES + 1))
            if message is not None:
                asked.append(slot)
                self.questions.append((port, message))
        for output in decision.outputs if asked else ():
            if output.port is not self.engine.way_out:
                self._send(output, asked, now, may_wait=False)
        return [slot for slot in slots if slot not in asked] if asked else slots

    def send_own(self, port: Port, frame: bytes, now: float) -> None:
        """Send one of the switch's own frames to a port."""
        target = self._by_port.get(port)
        if target is None or not port.link_up:
            return
        had_backlog = bool(target.backlog)
        if not target.send_own(frame):
            port.counters.drops[Drop.FULL if target.connected else Drop.LINK_DOWN] += 1
            return
        port.counters.transmitted_frames += 1
        port.counters.transmitted_bytes += len(frame)
        for capture in target.captures:
            capture.take(port.name, Direction.OUT, frame)
        if target.backlog and not had_backlog:
            target.taken_at = now
            self.full.append(target)

    def _not_refused(self, port: Port, decision: Decision, slots: Sequence[int]) -> Sequence[int]:
        passed = []
        for slot in slots:
            drop = self.engine.refuses(port, decision, self._batch.beginning(slot, frames.INSPECT_BYTES))
            if drop is None:
                passed.append(slot)
            else:
                port.counters.drops[drop] += 1
        return slots if len(passed) == len(slots) else passed

    def _send(self, output: Output, slots: Sequence[int], now: float, *, may_wait: bool) -> None:
        port, change = output
        target = self._by_port[port]
        had_backlog = bool(target.backlog)
        sent = target.send(self._batch, slots, change)
        counters = port.counters
        count = len(slots)
        if sent < count:
            counters.drops[Drop.FULL if target.connected else Drop.LINK_DOWN] += count - sent
            slots = slots[:sent]
        counters.transmitted_frames += sent
        lengths = self._batch.lengths
        counters.transmitted_bytes += sum(lengths) if len(slots) == len(lengths) else sum(lengths[s] for s in slots)
        if change is not None:
            counters.transmitted_bytes += sent * (len(change.tag) + frames.ADDRESSES_BYTES - change.skip_bytes)
        if target.captures:
            self._capture(target, slots, Direction.OUT, output)
        if target.backlog:
            if not had_backlog:
                target.taken_at = now
                self.full.append(target)
            self.congested = self.congested or (may_wait and target.is_congested(now))

    # -- captures -----------------------------------------------------------------------------------------------

    def add_capture(self, capture: PacketCapture) -> None:
        """Copy frames to `capture` from now on, including those of ports that are added later."""
        self._captures.append(capture)
        for name, sock in self.sockets.items():
            if capture.port in (None, name):
                sock.captures.append(capture)

    def remove_capture(self, capture: PacketCapture) -> None:
        """Stop."""
        self._captures.remove(capture)
        for sock in self.sockets.values():
            if capture in sock.captures:
                sock.captures.remove(capture)

    def _capture(self, sock: PortSocket, slots: Sequence[int], way: Direction, output: Output | None = None) -> None:
        for slot in slots:
            frame = self._batch.frame(slot)
            if output is not None and output.change is not None:
                change = output.change
                frame = frame[: frames.ADDRESSES_BYTES] + change.tag + frame[change.skip_bytes :]
            for capture in sock.captures:
                capture.take(sock.port.name, way, frame)


MALFORMED = Decision((), Drop.MALFORMED)
__all__ = ["MAX_FLOWS", "Mover", "PortRules"]
