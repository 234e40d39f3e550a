# SPDX-License-Identifier: Apache-2.0
"""The memory that clients make the server keep: one budget for all of them.

Decides how much one client may make the server keep at once, in view of what all of them do: input that is not served
yet, data of jobs, answers that were not collected. Must not know requests or sockets; each connection reports how much
it keeps. Pure. All methods run on the loop's thread.

A client has the limits of `AMPLE` as long as all clients together keep less than `TIGHT_BYTES`, and those of `TIGHT`
beyond that. A client within its limits is always served, however much the others keep, so deaf clients lock nobody
out: they only make the others' pieces smaller. The most that is kept is thus `TIGHT_BYTES`, what one more client may
have with `AMPLE`, for each client what `TIGHT` allows, and the input of a few that write (`input_bytes`).

When clients leave, what they made the server keep is free, but in pieces all over the heap, from which the C library
gives nothing back by itself: `NbdServer` trims the heap when `should_trim` says so.
"""

from __future__ import annotations

from dataclasses import dataclass

from vhdkit.units import KIB, MIB

TIGHT_BYTES = 24 * MIB
_AMPLE_BYTES = 16 * MIB  # less than the other, so that the limits do not change with every request
_TRIM_BYTES = 8 * MIB  # less than once was kept: worth a few milliseconds
SOCKET_BYTES = 2 * MIB  # of a large socket buffer; the kernel takes twice that, or less where the system limits it
_LARGE_SOCKETS = 32  # the others have the system's default
_PROVEN_BYTES = MIB  # collected after the socket was full: only such clients get one, which deaf ones never are
_LARGE_INPUTS = 8  # kept, at most, of clients that write one long payload
JOB_BYTES = 2 * KIB  # of each job, besides its data
MISS_BYTES = 256  # of each read that waits for a device


@dataclass(frozen=True, slots=True)
class Limits:
    """For one client."""

    input_bytes: int  # received at once
    kept_bytes: int  # payloads up to this size are kept until they are complete
    piece_bytes: int  # of data, in one job or one answer
    offer_bytes: int  # of a long read, offered to a socket: what it does not accept is not kept, but read again
    reply_bytes: int  # of answers, sent at once
    jobs_bytes: int  # in jobs: with that much, it gets no more
    option_bytes: int  # of answers to options
    descriptors: int  # in an answer to BLOCK_STATUS


AMPLE = Limits(MIB // 2, 64 * KIB, MIB, MIB, MIB + 64 * KIB, 4 * MIB, 256 * KIB, 1 << 15)
TIGHT = Limits(32 * KIB, 16 * KIB, 16 * KIB, 256 * KIB, 32 * KIB, 16 * KIB, 16 * KIB, 1 << 10)


class ClientMemory:
    """The budget of one server."""

    def __init__(self) -> None:
        self.limits = AMPLE
        self.used_bytes = 0
        self.large_sockets = 0
        self.large_inputs = 0  # clients of which more input is kept than `TIGHT` allows
        self._most_bytes = 0  # since the heap was trimmed

    def change(self, by_bytes: int) -> None:
        """A client keeps that much more, or less."""
        self.used_bytes += by_bytes
        self._most_bytes = max(self._most_bytes, self.used_bytes)
        if self.used_bytes > TIGHT_BYTES:
            self.limits = TIGHT
        elif self.used_bytes < _AMPLE_BYTES:
            self.limits = AMPLE

    def gets_large_socket(self, late_bytes: int) -> bool:
        """Whether a client that has collected that much from a full socket gets a large buffer, which then counts."""
        if late_bytes < _PROVEN_BYTES or self.large_sockets >= _LARGE_SOCKETS:
            return False
        self.large_sockets += 1
        return True

    def input_bytes(self, *, is_payload: bool) -> int:
        """How much of a client's input may be received now. `is_payload`: all of it will be written as it arrives.

        Of that usually nothing is kept, so it is received in large parts also when memory is tight. Only while another
        writer holds the disk's lock it has to be kept.
        """
        return (AMPLE if is_payload and self.large_inputs < _LARGE_INPUTS else self.limits).input_bytes

    def should_trim(self) -> bool:
        """Asked after a client has left: whether that is worth it. If so, the heap counts as trimmed."""
        if self._most_bytes - self.used_bytes < _TRIM_BYTES:
            return False
        self._most_bytes = self.used_bytes
        return True
