# SPDX-License-Identifier: Apache-2.0
"""One client's jobs in progress, and how their answers are sent.

Decides when the answer of a job is sent: not inside the data of a long read, and not before a flush that it needs.
Must not know which requests become jobs (`serving`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from vhdkit.serve.nbd.channel import Channel
from vhdkit.serve.nbd.export import Export, error_reply
from vhdkit.serve.nbd.host import Host
from vhdkit.serve.nbd.memory import JOB_BYTES
from vhdkit.serve.nbd.pieces import LongRead
from vhdkit.serve.nbd.protocol import Request, Transmission
from vhdkit.serve.nbd.wire import Command

_log = logging.getLogger(__name__)


class Answering:
    """The part of `Serving` that answers. All methods run on the loop's thread."""

    def __init__(
        self,
        host: Host,
        channel: Channel,
        rules: Transmission,
        export: Export,
        *,
        peer: str,
        proceed: Callable[[], None],
    ) -> None:
        """`proceed` is called when a job is done: more can be served, or the connection can end."""
        self.export = export
        self.jobs = 0
        self._job_bytes = 0
        self._host = host
        self._channel = channel
        self._rules = rules
        self._peer = peer
        self._proceed = proceed
        self._late: list[bytes | bytearray] = []  # answers that wait for the end of a long read
        self._late_bytes = 0
        self._long_read: LongRead | None = None

    def _flush_then(self, answer: bytes | bytearray, request: Request) -> None:
        """Send `answer` when everything written so far is durable."""
        rules, export = self._rules, self.export
        self._job_begins()
        export.jobs += 1
        began = time.perf_counter_ns()

        def done(failure: BaseException | None) -> None:
            self._job_ends()
            export.jobs -= 1
            if export.held and not export.jobs:
                self._host.drained(export)
            if request.command == Command.FLUSH:
                self._host.stats.batch(1, time.perf_counter_ns() - began)
            if failure is not None:
                self._log_failure(request, failure)
            self._answer(answer if failure is None else error_reply(rules, request, failure))

        export.flush(self._host.loop, done)

    def _job_begins(self, size_bytes: int = 0) -> None:
        self._job_bytes += size_bytes + JOB_BYTES
        self.jobs += 1

    def _job_ends(self, size_bytes: int = 0) -> None:
        self._job_bytes -= size_bytes + JOB_BYTES
        self.jobs -= 1

    def is_gone(self) -> bool:
        """True when the client has been disconnected."""
        return self._channel.is_closed()

    def _answer(self, answer: bytes | bytearray) -> None:
        """Send an answer from a job, but never inside the chunk of a long read."""
        if self._channel.is_closed():
            self._proceed()
            return
        if self._long_read is not None:
            self._late.append(answer)
            self._late_bytes += len(answer)
        else:
            self._channel.send(answer)
        self._proceed()

    def _send_late(self) -> None:
        """The long read has ended."""
        late = self._late
        self._forget_late()
        for answer in late:
            self._channel.send(answer)

    def _forget_late(self) -> None:
        self._late, self._late_bytes = [], 0

    def _log_failure(self, request: Request, problem: BaseException) -> None:
        self._host.stats.errors += 1
        name = Command(request.command).name if request.command in list(Command) else str(request.command)
        _log.warning("%s: %s of %d bytes at byte %d: %s", self._peer, name, request.length, request.offset, problem)
