# SPDX-License-Identifier: Apache-2.0
"""The switches that `net.py` compares, how two sockets are plugged into each, and what sends and counts.

Sender and receiver are the same for all contestants, each a separate process, and use the switch's own batches.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.common import start_beside
from vmm.net.batch import BATCH_FRAMES, Batch
from vmm.net.ports import PortSetup
from vmm.net.switch_process import SwitchProcess

SENDER, RECEIVER = b"\x02\0\0\0\0\x0a", b"\x02\0\0\0\0\x0b"
_NAIVE_HUB = """
import os, socket, sys
sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM); sock.bind(sys.argv[1]); sock.setblocking(False)
table, ports = {}, {}
import select
while True:
    select.select([sock], [], [])
    while True:
        try: frame, sender = sock.recvfrom(2000)
        except BlockingIOError: break
        ports[sender] = True; table[frame[6:12]] = sender
        known = table.get(frame[:6])
        for target in ([known] if known else [one for one in ports if one != sender]):
            try: sock.sendto(frame, target)
            except OSError: pass
"""

Plug = tuple[socket.socket, socket.socket]


def _bound(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
    sock.bind(str(path))
    return sock


@contextmanager
def user_switch(folder: Path, *, as_qemu: bool = False) -> Iterator[Plug]:
    """Ours. `as_qemu`: the receiver is not connected to the switch, so its socket holds ten frames."""
    os.environ["VMM_RUNTIME"] = str(folder / "rt")
    backend = SwitchProcess.of(str(uuid.uuid4()), "bench")
    socks = []
    try:
        backend.ensure_running()
        for name in ("a", "b"):
            sock = _bound(folder / f"{name}.guest")
            setup = PortSetup(name, str(folder / f"{name}.port"), str(folder / f"{name}.guest"))
            backend.plug(setup)
            if name == "a" or not as_qemu:
                sock.connect(setup.address)
            socks.append(sock)
        if as_qemu:  # a receiver that never sent is unknown: let it send a frame
            socks[1].sendto(SENDER + RECEIVER + b"\x88\xb5hello there, hello", str(folder / "b.port"))
        yield socks[0], socks[1]
    finally:
        backend.stop()
        for sock in socks:
            sock.close()


@contextmanager
def _process(*command: str) -> Iterator[None]:
    # vde_switch ends at the end of its input.
    process = start_beside(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + 10
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path} does not appear")
        time.sleep(0.01)
    time.sleep(0.2)


@contextmanager
def naive_hub(folder: Path) -> Iterator[Plug]:
    """A hub written in ten minutes: recvfrom, a dictionary, sendto."""
    hub = folder / "hub"
    with _process(sys.executable, "-c", _NAIVE_HUB, str(hub)):
        _wait_for(hub)
        one, other = _bound(folder / "a.guest"), _bound(folder / "b.guest")
        one.connect(str(hub))
        other.connect(str(hub))
        with one, other:
            yield one, other


@contextmanager
def vde(folder: Path) -> Iterator[Plug]:
    """Debian's vde2, connected through its own library."""
    place = folder / "vde"
    library = ctypes.CDLL("libvdeplug.so.2")
    library.vde_open_real.restype = ctypes.c_void_p
    library.vde_open_real.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int, ctypes.c_void_p]
    library.vde_datafd.argtypes = [ctypes.c_void_p]
    program = shutil.which("vde_switch") or "vde_switch"
    with _process(program, "-sock", str(place)):
        _wait_for(place / "ctl")
        plugs = [library.vde_open_real(str(place).encode(), b"bench", 1, None) for _ in range(2)]
        if not all(plugs):
            raise OSError("vde_open failed")
        socks = [socket.socket(fileno=os.dup(library.vde_datafd(plug))) for plug in plugs]
        with socks[0], socks[1]:
            yield socks[0], socks[1]


def has_vde() -> bool:
    """Whether vde_switch and its library are installed."""
    try:
        ctypes.CDLL("libvdeplug.so.2")
    except OSError:
        return False
    return shutil.which("vde_switch") is not None


def _filled(size: int) -> Batch:
    """A batch that holds frames from SENDER to RECEIVER."""
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    batch = Batch()
    with one, other:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
        frame = (RECEIVER + SENDER + b"\x88\xb5").ljust(size, b"x")
        for _ in range(BATCH_FRAMES):
            one.send(frame)
        assert batch.receive(other.fileno()) == BATCH_FRAMES
    return batch


def _send(sock: socket.socket, size: int, seconds: float) -> None:
    batch = _filled(size)
    end = time.perf_counter() + seconds
    descriptor = sock.fileno()
    while time.perf_counter() < end:
        if not batch.send_all(descriptor, 0, BATCH_FRAMES):
            select.select([], [sock], [], 0.05)


def _count(sock: socket.socket, seconds: float) -> float:
    """Frames a second, from the first frame on."""
    batch, descriptor, total, started = Batch(), sock.fileno(), 0, 0.0
    end = time.perf_counter() + seconds + 5
    while (now := time.perf_counter()) < end:
        got = batch.receive(descriptor)
        if not got:
            select.select([sock], [], [], 0.2)
        elif not started:
            started, end = now, now + seconds
        else:
            total += got
    return total / seconds


def _forked(work: Callable[[], float | None]) -> tuple[int, int]:
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writing, struct.pack("d", work() or 0.0))
        finally:
            os._exit(0)
    os.close(writing)
    return pid, reading


def frame_rate(plug: Plug, size: int, seconds: float) -> float:
    """Frames a second that reach the receiver while the sender sends as fast as it can."""
    sender, receiver = plug
    receiver.send(SENDER + RECEIVER + b"\x88\xb5" + bytes(46)) if _connected(receiver) else None
    counting, reading = _forked(lambda: _count(receiver, seconds))
    sending, unused = _forked(lambda: _send(sender, size, seconds + 1.0))
    try:
        result: float = struct.unpack("d", os.read(reading, 8))[0]
    finally:
        for pid in (sending, counting):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        os.close(reading)
        os.close(unused)
    return result


def _connected(sock: socket.socket) -> bool:
    try:
        sock.getpeername()
    except OSError:
        return False
    return True


def round_trips(plug: Plug, count: int) -> float:
    """Microseconds from a frame sent to its answer received, the median; the receiver answers at once."""
    sender, receiver = plug
    times = []
    ask, answer = RECEIVER + SENDER + b"\x88\xb5" + bytes(46), SENDER + RECEIVER + b"\x88\xb5" + bytes(46)
    receiver.send(answer)  # a hub learns the addresses of senders
    time.sleep(0.1)
    for sock in plug:
        sock.settimeout(2)
    with contextlib.suppress(TimeoutError):
        sender.recv(2000)
    for _ in range(count):
        start = time.perf_counter()
        sender.send(ask)
        receiver.recv(2000)
        receiver.send(answer)
        sender.recv(2000)
        times.append(time.perf_counter() - start)
    return sorted(times)[count // 2] * 1e6
