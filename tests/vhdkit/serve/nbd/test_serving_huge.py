# SPDX-License-Identifier: Apache-2.0
"""The largest requests to a server process: their content and their cost."""

from __future__ import annotations

import random
import re
import socket
import threading
from pathlib import Path

import pytest

from benchmarks.nbd import MEMORY_LIMIT_MIB
from tests.nbd_client import PATIENCE_SECONDS, READ, WRITE, Client
from tests.servers import serving
from vhdkit import create_image, open_disk
from vhdkit.units import MIB

LARGEST_BYTES = 64 * MIB
CLIENTS = 8


def check_read(client: Client, content: bytes) -> None:
    """Read everything in one request and compare every chunk."""
    answer = client.call(READ, 0, len(content))
    assert answer.error == 0, answer
    assert sum(len(piece) for _, piece in answer.data) == len(content)
    assert all(content.startswith(piece, start) for start, piece in answer.data)


def connected(path: str, number: int) -> Client:
    """A client in its transmission phase; the three kinds of framing alternate."""
    sock = socket.socket(socket.AF_UNIX)
    client = Client(sock)
    sock.connect(path)
    client.start(structured=number % 3 == 1, extended=number % 3 == 2)
    client.go()
    return client


@pytest.mark.timeout(120)
def test_eight_clients_with_the_largest_requests(tmp_path: Path) -> None:
    """Row 35: eight clients write and read 64 MiB each in one request at once, within the benchmark's memory limit."""
    image, path = tmp_path / "disk.vhd", tmp_path / "socket"
    create_image(image, LARGEST_BYTES)
    block = random.Random(1).randbytes(MIB)
    content = b"".join(bytes([number]) + block[1:] for number in range(LARGEST_BYTES // MIB))
    with open_disk(image, writable=True) as disk:
        disk.write(0, content)
    failures = list[str]()
    with serving(image, "--socket", path) as server:
        clients = [connected(str(path), number) for number in range(CLIENTS)]
        at_once = threading.Barrier(CLIENTS, timeout=PATIENCE_SECONDS)

        def work(number: int) -> None:
            try:
                with clients[number] as client:
                    at_once.wait()
                    if number < CLIENTS // 2:
                        assert client.call(WRITE, 0, payload=content).error == 0
                    else:
                        check_read(client, content)
            except Exception as problem:
                failures.append(repr(problem))

        threads = [threading.Thread(target=work, args=(number,)) for number in range(CLIENTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures, failures[0]
        status = Path(f"/proc/{server.process.pid}/status").read_text()
        found = re.search(r"VmHWM:\s+(\d+) kB", status)
        assert found is not None and int(found[1]) * 1024 < MEMORY_LIMIT_MIB * MIB
        assert server.stop()[0] == 0
