# SPDX-License-Identifier: Apache-2.0
"""One client from accept to close: handshake, TLS, transmission, end.

Decides when the server reads from a client, in which phase its input is processed, and when the connection is closed.
Must not know the meaning of options (`nbd.options`) or requests (`serving`). While a client does not read its answers,
the server does not read from it.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Hashable

from vhdkit.serve.nbd.channel import Channel
from vhdkit.serve.nbd.export import Export
from vhdkit.serve.nbd.host import Host
from vhdkit.serve.nbd.loop import READABLE, WRITABLE
from vhdkit.serve.nbd.memory import SOCKET_BYTES, TIGHT
from vhdkit.serve.nbd.options import Handshake, HandshakeState
from vhdkit.serve.nbd.protocol import BrokenClient, Transmission
from vhdkit.serve.nbd.serving import Serving

# Of a client's turn: each serves input that was kept, sends one piece of a long read, or takes one of a long write.
_STEPS = 4
_log = logging.getLogger(__name__)


class Connection:
    """A client. All methods run on the loop's thread."""

    def __init__(self, host: Host, sock: socket.socket, peer: str, left: Callable[[Connection], None]) -> None:
        """Take over a connected, non-blocking socket; `left` is called once the connection is closed."""
        self.peer = peer
        self.number = 0  # of this client, unique in this server
        self.peer_key: Hashable = None  # see `admission`
        self.used = False
        self.opened = time.time()
        self._began = self._active = time.monotonic()
        self._host = host
        self._left = left
        self._channel = Channel(host.loop, sock, self.proceed, host.stats)
        self._handshake = Handshake(host.catalog, tls=host.tls_mode)
        self._serving: Serving | None = None  # set when transmission begins
        self._securing = False
        self._is_plain = True  # no TLS, which may keep input that the loop cannot see
        self._kept = b""  # received, but not served yet
        self._held_bytes = 0  # what this client makes the server keep, as `Host.memory` knows it
        self._has_large_socket = False
        self._has_large_input = False
        self._goes_on = False  # `proceed` is posted
        self._ending = False  # the connection is closed when the requests in flight are finished
        self._send_handshake()

    @property
    def is_secure(self) -> bool:
        """True once the connection is encrypted."""
        return self._channel.is_secure

    @property
    def export(self) -> Export | None:
        """The export that the client has chosen, or None."""
        return self._serving.export if self._serving is not None else None

    def is_undecided(self, seconds: float) -> bool:
        """True if it has been connected longer than that without choosing an export."""
        return self._serving is None and time.monotonic() - self._began >= seconds

    def is_idle(self) -> bool:
        """True if nothing is in flight: no job, no answer that was not collected, no part of a request."""
        return not (self._held_bytes or self._kept or self._channel.unsent or self._serving is None) and (
            self._serving.is_idle()
        )

    def silent_seconds(self) -> float:
        """How long ago the client last sent or accepted something."""
        return time.monotonic() - self._active

    # -- moving on ----------------------------------------------------------------------------------------------

    def proceed(self, events: int = 0) -> None:
        """Continue as far as possible, then wait for what is needed next. `events`: what the socket is ready for.

        Not at once while a request is being served, which may end the jobs of any client: what is in the host's
        buffer is still needed.
        """
        if self._host.served is not None:
            if self._host.served is not self:  # else it goes on anyway
                self._go_on_later()
            return
        try:
            self._react(events)
            if self._rests():
                if self._held_bytes:
                    self._report_memory()
                self._channel.watch(reading=True)
                return
            steps = 1
            while self._step():
                if steps == _STEPS:  # others have their turn
                    self._go_on_later()
                    break
                steps += 1
        except BrokenClient as problem:
            _log.info("%s: %s", self.peer, problem)
            self.close()
        except OSError as error:
            _log.debug("%s: %s", self.peer, error)
            self.close()
        except Exception:  # a bug in our code must not end the other connections
            _log.exception("%s: disconnecting", self.peer)
            self.close()
        if self._channel.is_closed() or self._is_left_behind():
            self.close()
        elif not self._securing:
            if self._is_done() and not self._channel.unsent and not self._in_progress():
                self.close()
            else:
                self._channel.watch(reading=not self._blocked())
        if self._held_bytes or self._kept or self._channel.unsent or self._serving is None or self._serving.jobs:
            self._report_memory()

    def _rests(self) -> bool:
        """True if all was answered, and only new input can change that: after nearly every event, so asked first."""
        serving, channel = self._serving, self._channel
        return not (
            serving is None
            or self._kept
            or channel.unsent
            or serving.ended
            or serving.export.held
            or not self._is_plain
            or self._ending
            or channel.is_closed()
            or not serving.is_idle()
        )

    def _report_memory(self) -> None:
        held = len(self._kept) + self._channel.unsent_bytes
        if not self._channel.is_closed():
            held += self._handshake.kept_bytes
        if self._serving is not None:
            held += self._serving.kept_bytes
        is_large = len(self._kept) > TIGHT.input_bytes
        if is_large is not self._has_large_input:
            self._has_large_input = is_large
            self._host.memory.large_inputs += 1 if is_large else -1
        if held != self._held_bytes:
            self._host.memory.change(held - self._held_bytes)
            self._held_bytes = held

    def _go_on_later(self) -> None:
        if not self._goes_on:
            self._goes_on = True
            self._host.loop.post(self._go_on)

    def _go_on(self) -> None:
        self._goes_on = False
        self.proceed()

    def _react(self, events: int) -> None:
        if self._channel.is_closed():
            return
        if self._securing:
            self._secure()
            return
        self._channel.ready_to_send(events)
        if (
            self._channel.late_bytes
            and not self._has_large_socket
            and self._host.memory.gets_large_socket(self._channel.late_bytes)
        ):
            self._has_large_socket = True
            self._channel.enlarge(SOCKET_BYTES)
        self._active = time.monotonic()
        if events & ~WRITABLE and not self._blocked():
            self._receive()

    def _is_left_behind(self) -> bool:
        """True if the client hung up with all the jobs it may have: the first answer would end the connection."""
        return self._channel.hung_up and self._serving is not None and self._serving.has_enough_jobs()

    def _is_done(self) -> bool:
        return self._ending or (self._serving is not None and self._serving.ended)

    def _in_progress(self) -> int:
        """How many requests are not answered yet."""
        return self._serving.in_progress() if self._serving is not None else 0

    def _blocked(self) -> bool:
        """True while nothing more is accepted from this client."""
        if self._ending or self._channel.unsent:
            return True
        return self._handshake.is_held_back if self._serving is None else self._serving.blocked()

    def _step(self) -> bool:
        """Do one thing that needs no new input from the client; False if there is none."""
        if self._securing or self._channel.is_closed():
            return False
        if self._serving is not None and self._serving.step():
            return True
        if self._handshake.is_held_back and not self._ending and not self._channel.unsent:
            self._handshake.receive(b"")
            self._send_handshake()
            return True
        if self._blocked():
            return False
        if self._serving is not None and self._serving.payload is not None and self._receive():
            return True  # more of a payload has often arrived while a piece of it was written
        if self._kept:
            size = len(self._kept)
            self._host.buffer[:size] = self._kept
            self._kept = b""
            self._process(size)
            if len(self._kept) != size:
                return True
        if self._channel.has_pending():
            return self._receive()
        return False

    def _receive(self) -> bool:
        """Receive and process what there is; False if there is nothing."""
        buffer, kept = self._host.buffer, len(self._kept)
        is_payload = self._serving is not None and self._serving.payload is not None
        room = buffer[kept : kept + self._host.memory.input_bytes(is_payload=is_payload)]
        if not room:  # what was kept is served first; nothing received here would look like the end of the stream
            return False
        received = self._channel.receive_into(room)
        if received is None:
            return False
        if not received:
            self.end()
            return False
        buffer[:kept] = self._kept
        self._kept = b""
        self._process(kept + received)
        return True

    def _process(self, size: int) -> None:
        """Process what is in the host's buffer, and keep what cannot be served yet."""
        self._host.served = self
        try:
            self._process_buffer(self._host.buffer, size)
        finally:
            self._host.served = None

    def _process_buffer(self, buffer: memoryview, size: int) -> None:
        if self._serving is None:
            self._handshake.max_output_bytes = self._host.memory.limits.option_bytes
            self._handshake.receive(buffer[:size])
            self._send_handshake()
            return
        self.used = True
        position = self._serving.serve(buffer, size)
        if position < size:
            self._kept = bytes(buffer[position:size])

    # -- handshake ----------------------------------------------------------------------------------------------

    def _send_handshake(self) -> None:
        handshake = self._handshake
        self._channel.send(handshake.take_output())
        if handshake.state is HandshakeState.CLOSED:
            self.end()
        elif handshake.state is HandshakeState.TLS:
            self._start_tls()
        elif handshake.state is HandshakeState.TRANSMISSION:
            session = handshake.session
            assert session is not None
            self._kept = handshake.take_rest()
            export = self._host.enter(session)
            rules = Transmission(session)
            self._serving = Serving(self._host, self._channel, rules, export, peer=self.peer, proceed=self.proceed)
            _log.info("%s: export %r%s", self.peer, session.export.name, " over TLS" if self.is_secure else "")

    def _start_tls(self) -> None:
        context = self._host.tls_context
        assert context is not None
        if self._channel.unsent:  # the plaintext answer, twenty bytes, must be sent first
            raise BrokenClient("the client does not read the answer to STARTTLS")
        self._is_plain = False
        self._channel.start_tls(context)
        self._securing = True
        self._secure()

    def _secure(self) -> None:
        if self._channel.shake_hands():
            self._securing = False
            self._handshake.secured()

    # -- ending -------------------------------------------------------------------------------------------------

    def end(self) -> None:
        """Accept nothing more from the client; close when every request in flight is answered."""
        self._ending = True

    def shut_down(self) -> None:
        """`end`, when the server ends: options that have arrived are first answered with ERR_SHUTDOWN (row 41)."""
        self._handshake.shut_down()
        if self._securing:
            self.close()
            return
        if self._serving is None:
            self.proceed(READABLE)
        self.end()
        self.proceed()

    def close(self) -> None:
        """Close the connection. Results of jobs that are still running are dropped."""
        self._channel.close()
        self._kept = b""
        if self._serving is not None:
            self._serving.drop()
        if self._has_large_socket:
            self._has_large_socket = False
            self._host.memory.large_sockets -= 1
        self._report_memory()
        left, self._left = self._left, _forgotten
        left(self)


def _forgotten(connection: Connection) -> None:
    """The callback of a connection that is already closed."""
