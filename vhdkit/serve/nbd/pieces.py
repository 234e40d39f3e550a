# SPDX-License-Identifier: Apache-2.0
"""Requests that are executed in pieces: how far each has come. Decides nothing."""

from __future__ import annotations

import time

from vhdkit.serve.nbd.protocol import Request


class Payload:
    """The outstanding part of a payload that did not arrive as a whole."""

    __slots__ = ("began", "left", "offset", "request")

    def __init__(self, request: Request) -> None:
        self.request = request
        self.began = time.perf_counter_ns()
        self.offset = request.offset
        self.left = request.payload_bytes


class LongRead:
    """A read that is sent in pieces: separate chunks, or the single body of a simple reply."""

    __slots__ = ("began", "offset", "request")

    def __init__(self, request: Request) -> None:
        self.request = request
        self.began = time.perf_counter_ns()
        self.offset = request.offset

    @property
    def end(self) -> int:
        return self.request.offset + self.request.length
