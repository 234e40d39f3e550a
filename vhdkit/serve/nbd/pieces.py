# SPDX-License-Identifier: Apache-2.0
"""Requests that are executed in pieces: how far each has come. Decides nothing."""

from __future__ import annotations

import time

from vhdkit.serve.nbd.protocol import Request
from vhdkit.units import SECTOR_SIZE, round_down


class Payload:
    """The outstanding part of a payload that did not arrive as a whole."""

    __slots__ = ("began", "left", "offset", "request")

    def __init__(self, request: Request) -> None:
        self.request = request
        self.began = time.perf_counter_ns()
        self.offset = request.offset
        self.left = request.payload_bytes


class LongRead:
    """A read that is sent in pieces: separate chunks, or the single body of a simple reply or a chunk."""

    __slots__ = ("began", "chunk_end", "in_chunks", "offset", "request")

    def __init__(self, request: Request, *, in_chunks: bool) -> None:
        self.request = request
        self.in_chunks = in_chunks
        self.began = time.perf_counter_ns()
        self.offset = request.offset  # of what was neither sent nor kept for sending
        self.chunk_end = request.offset if in_chunks else self.end  # of the data that the last header announced

    @property
    def end(self) -> int:
        return self.request.offset + self.request.length


def whole_part(offset: int, end: int, most: int) -> int:
    """The size of the next part of a range: at most `most`, and no sector lies in two parts."""
    return end - offset if end - offset <= most else round_down(offset + most, SECTOR_SIZE) - offset
