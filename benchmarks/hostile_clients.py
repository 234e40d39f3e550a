# SPDX-License-Identifier: Apache-2.0
"""Hostile NBD clients for `benchmarks/hostile.py`: storms of requests, and hoards of answers that are not collected.

Decides what an attack sends. Only the unix socket of a benchmark's own server is attacked, for as long as the process
runs; it prints "ready" when all its clients have sent their first requests.

    python -c 'from benchmarks.hostile_clients import main; main()' SOCKET KIND CLIENTS
"""

from __future__ import annotations

import os
import selectors
import socket
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass

KIB, MIB = 1 << 10, 1 << 20
SECONDS = 60.0  # for one answer
READ, WRITE, WRITE_ZEROES, BLOCK_STATUS = 0, 1, 6, 7
NO_HOLE = 2
_NICE = 19  # an attack takes only processor time that the server and the honest client leave
_REQUEST = struct.Struct(">IHHQQI")
_BUFFER = bytearray(MIB)


@dataclass(frozen=True, slots=True)
class Attack:
    """What each client keeps in flight: `depth` requests, made by `request(number, disk size)`."""

    depth: int
    request: Callable[[int, int], tuple[int, int, int, int]]  # (command, flags, offset, length)
    collects: bool = True  # reads its answers, and then asks again
    contexts: tuple[str, ...] = ()


def _listing(number: int, size: int) -> tuple[int, int, int, int]:
    return BLOCK_STATUS, 0, 0, min(size, (1 << 32) - 512)


def _unaligned(number: int, size: int) -> tuple[int, int, int, int]:
    return READ, 0, number * 64 * KIB % (size - MIB) + 1, 64 * KIB


def _unaligned_write(number: int, size: int) -> tuple[int, int, int, int]:
    return WRITE, 0, number * 64 * KIB % (size - MIB) + 1, 4 * KIB


def _zeroes(number: int, size: int) -> tuple[int, int, int, int]:
    return WRITE_ZEROES, 0, 0, min(size, 1 << 30)


def _written_zeroes(number: int, size: int) -> tuple[int, int, int, int]:
    return WRITE_ZEROES, NO_HOLE, 0, min(size, 1 << 30)


def _hoard(number: int, size: int) -> tuple[int, int, int, int]:
    return _unaligned(number, size) if number % 63 < 62 else (READ, 0, 0, min(size, 32 * MIB))


def _large(number: int, size: int) -> tuple[int, int, int, int]:
    return READ, 0, 0, MIB


def _idle(number: int, size: int) -> tuple[int, int, int, int]:
    return READ, 0, 0, 512


ATTACKS = {
    "status": Attack(8, _listing, contexts=("base:allocation", "qemu:allocation-depth")),
    "unaligned": Attack(16, _unaligned),
    "unaligned-write": Attack(16, _unaligned_write),
    "zeroes": Attack(4, _zeroes),
    "written-zeroes": Attack(4, _written_zeroes),
    "hoard": Attack(63, _hoard, collects=False),
    "hoard-status": Attack(8, _listing, collects=False, contexts=("base:allocation", "qemu:allocation-depth")),
    "hoard-large": Attack(64, _large, collects=False),
    "idle": Attack(1, _idle, collects=False),
}


class Client:
    """One connection. It never looks into an answer: it counts the bytes, or the answers of a known size."""

    def __init__(self, path: str, attack: Attack) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(SECONDS)
        self.sock.connect(path)
        self._attack = attack
        self._number = 0
        self._rest = bytearray()
        self._skip = 0
        self._structured = bool(attack.contexts)
        self._negotiate()

    def _negotiate(self) -> None:
        self._take(18)
        self.sock.sendall(struct.pack(">I", 3))
        if self._structured:
            self._option(8, b"")
            queries = b"".join(struct.pack(">I", len(one)) + one.encode() for one in self._attack.contexts)
            self._option(10, struct.pack(">II", 0, len(self._attack.contexts)) + queries)
        self.sock.sendall(b"IHAVEOPT" + struct.pack(">II", 1, 0))
        self.size, _ = struct.unpack(">QH", self._take(10))

    def _option(self, number: int, data: bytes) -> None:
        self.sock.sendall(b"IHAVEOPT" + struct.pack(">II", number, len(data)) + data)
        kind = 0
        while kind != 1:
            _, _, kind, length = struct.unpack(">QIII", self._take(20))
            self._take(length)
            assert not kind >> 31, hex(kind)

    def _take(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            piece = self.sock.recv(size - len(data))
            if not piece:
                raise SystemExit("the server closed a connection in the handshake")
            data += piece
        return data

    def ask(self, count: int) -> None:
        """Send that many requests."""
        raw = bytearray()
        for _ in range(count):
            command, flags, offset, length = self._attack.request(self._number, self.size)
            raw += _REQUEST.pack(0x25609513, flags, command, self._number << 8 | command, offset, length)
            if command == WRITE:
                raw += bytes(length)
            self._number += 1
        self.sock.sendall(raw)

    def collect(self) -> bool:
        """Receive once, and replace the requests that were answered; False at the end of the connection."""
        received = self.sock.recv_into(_BUFFER)
        if not received:
            return False
        answered = self._answers(memoryview(_BUFFER)[:received])
        if answered:
            self.ask(answered)
        return True

    def _answers(self, data: memoryview) -> int:
        count, position = 0, 0
        while position < len(data):
            if self._skip:
                step = min(self._skip, len(data) - position)
                self._skip -= step
                position += step
                continue
            size = 16
            if len(self._rest) >= 4 and self._rest[:4] == b"\x66\x8e\x33\xef":
                size = 20
            if len(self._rest) < size:
                step = min((size if len(self._rest) >= 4 else 4) - len(self._rest), len(data) - position)
                self._rest += data[position : position + step]
                position += step
            if len(self._rest) == 16 and self._rest[:4] == b"\x67\x44\x66\x98":
                _, error, cookie = struct.unpack(">IIQ", self._rest)
                assert not error, error
                if cookie & 0xFF == READ:
                    self._skip = self._attack.request(cookie >> 8, self.size)[3]
                count += 1
                self._rest.clear()
            elif len(self._rest) == 20:
                _, flags, _, _, self._skip = struct.unpack(">IHHQI", self._rest)
                count += flags & 1
                self._rest.clear()
        return count


def main() -> None:
    """Attack until the process is ended."""
    path, kind, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
    os.nice(_NICE)
    attack = ATTACKS[kind]
    clients = [Client(path, attack) for _ in range(count)]
    for client in clients:
        client.ask(attack.depth)
    print("ready", flush=True)
    if not attack.collects:
        sys.stdin.read()
        return
    with selectors.DefaultSelector() as selector:
        for client in clients:
            selector.register(client.sock, selectors.EVENT_READ, client)
        while True:
            for key, _ in selector.select():
                if not key.data.collect():
                    selector.unregister(key.fileobj)
