# SPDX-License-Identifier: Apache-2.0
"""The servers that `benchmarks/nbd.py` compares, and fio as their client.

Decides how each server is started (its best flags), that only one runs at a time, and what a run of fio is. Every
server gets a fresh process per measurement: none has an advantage from earlier work, and none holds a
lock on an image that another one needs.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import has, start_beside

ROOT = Path(__file__).resolve().parent.parent
START_SECONDS = 20.0
RAMP = 0.1  # at the start of a run, not counted
SYSTEM_PATH = os.pathsep.join(["/usr/bin", "/bin", os.environ.get("PATH", "")])
QEMU_FLAGS = (
    ("--aio=io_uring", "--cache=writeback"),
    ("--aio=threads", "--cache=writeback"),
    ("--aio=native", "--cache=none"),
    ("--aio=io_uring", "--cache=none"),
)  # fmt: skip
_PLUGIN = ROOT / "vhdkit" / "serve" / "nbdkit" / "plugin.py"
_OUR_MODULES = ("vhdkit", "numpy")  # what the plugin needs to be found by nbdkit's Python


class Failed(Exception):
    """A server or a client that failed, with its output."""


@dataclass(frozen=True, slots=True)
class Server:
    """How to start a server on an image; `{socket}` and `{image}` stand for the two paths."""

    name: str
    command: tuple[str, ...]
    wants_raw: bool = False  # it reads no VHD: it gets the same content as a raw file


def ours(*options: str, name: str = "vhdkit") -> Server:
    """`vhdkit serve`."""
    return Server(name, (sys.executable, "-m", "vhdkit", "serve", "{image}", "--socket", "{socket}", *options))


def qemu(flags: Sequence[str]) -> Server:
    """`qemu-nbd` on a VHD, for an unlimited number of clients."""
    fixed = ("qemu-nbd", "--persistent", "--shared=16", "--format=vpc", "--socket={socket}")
    return Server("qemu-nbd", (*fixed, *flags, "{image}"))


def nbdkit_file() -> Server:
    """nbdkit's plugin for plain files, in C."""
    return Server("nbdkit file (raw)", ("nbdkit", "-f", "-U", "{socket}", "file", "{image}"), wants_raw=True)


def nbdkit_ours() -> Server:
    """Our plugin in nbdkit's Python."""
    return Server("nbdkit vhdkit", ("nbdkit", "-f", "-U", "{socket}", "python", str(_PLUGIN), "image={image}"))


def _environment() -> dict[str, str]:
    folders = [str(ROOT)]
    for name in _OUR_MODULES[1:]:
        place = getattr(__import__(name), "__file__", None)
        assert place is not None
        folders.append(str(Path(place).parent.parent))
    return {**os.environ, "PATH": SYSTEM_PATH, "PYTHONPATH": os.pathsep.join(dict.fromkeys(folders))}


@dataclass(frozen=True, slots=True)
class Running:
    """A server that answers."""

    pid: int
    socket_path: Path

    @property
    def uri(self) -> str:
        """Its default export, for clients."""
        return f"nbd+unix:///?socket={self.socket_path}"

    def cpu_seconds(self) -> float:
        """Processor time it has used, including the kernel's."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def peak_bytes(self) -> int:
        """The peak of its memory."""
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{self.pid}/status").read_text())
        assert found is not None
        return int(found[1]) * 1024


@contextmanager
def running(server: Server, image: Path) -> Iterator[Running]:
    """The server on `image`, from its first answer until the end of the block."""
    socket_path = image.parent / "nbd.sock"
    socket_path.unlink(missing_ok=True)
    command = [word.format(image=image, socket=socket_path) for word in server.command]
    log = image.parent / "server.log"
    with log.open("wb") as said:
        process = start_beside(
            command, env=_environment(), stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True
        )
    try:
        _wait(process, socket_path, log)
        yield Running(process.pid, socket_path)
        if process.poll() is not None:
            raise Failed(f"{server.name} ended ({process.returncode}): {_tail(log)}")
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(START_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(process: subprocess.Popen[bytes], socket_path: Path, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise Failed(f"{process.args!r} did not start ({process.returncode}): {_tail(log)}")
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(1)
            try:
                probe.connect(str(socket_path))
                if probe.recv(8) == b"NBDMAGIC":
                    return
            except OSError:
                time.sleep(0.02)
    raise Failed(f"{process.args!r} does not answer: {_tail(log)}")


def _tail(log: Path) -> str:
    return log.read_text(errors="replace").strip()[-500:] or "it said nothing"


# -- clients ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Load:
    """What a client does."""

    mode: str  # fio's: read, write, randread, randwrite
    block_bytes: int
    depth: int
    clients: int = 1

    @property
    def is_read(self) -> bool:
        """Whether it reads."""
        return self.mode.endswith("read")


def fio_command(target: Running, load: Load, seconds: float, *, size: int, offset: int = 0) -> list[str]:
    """fio over a part of the export."""
    return [
        "fio", "--name=load", "--ioengine=nbd", f"--uri={target.uri}", f"--rw={load.mode}", f"--bs={load.block_bytes}",
        f"--iodepth={load.depth}", f"--numjobs={load.clients}", "--group_reporting", f"--size={size}",
        f"--offset={offset}", "--time_based", f"--runtime={seconds}", f"--ramp_time={seconds * RAMP:.2f}",
        "--randrepeat=0", "--norandommap", "--output-format=json",
    ]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Rate:
    """A client's rate, and its cost for the server."""

    per_second: float
    cpu_us: float  # of the server, for each request: much less affected by a busy machine than the rate


def measured(
    target: Running, load: Load, seconds: float, *, size: int, offset: int = 0, extra: Sequence[str] = ()
) -> Rate:
    """One run of fio, with further options."""
    command = [*fio_command(target, load, seconds, size=size, offset=offset), *extra]
    before = target.cpu_seconds()
    # The socket's folder is where it leaves its files.
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=seconds + 60, cwd=target.socket_path.parent
    )
    used = target.cpu_seconds() - before
    per_second = rate_in(done.returncode, done.stdout, done.stderr, load)
    return Rate(per_second, 1e6 * used / (per_second * seconds * (1 + RAMP)))


def rate(target: Running, load: Load, seconds: float, *, size: int, offset: int = 0) -> float:
    """Requests a second."""
    return measured(target, load, seconds, size=size, offset=offset).per_second


@contextmanager
def beside(target: Running, load: Load, seconds: float, *, size: int, offset: int = 0) -> Iterator[list[float]]:
    """A client at work while the block runs; the list gets its requests a second when it has ended."""
    command = fio_command(target, load, seconds, size=size, offset=offset)
    folder = target.socket_path.parent
    process = start_beside(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder)
    result: list[float] = []
    try:
        yield result
    finally:
        process.send_signal(signal.SIGINT)  # it then reports what it has
        output, said = process.communicate(timeout=60)
    result.append(rate_in(0, output, said, load))


def rate_in(code: int, output: str, said: str, load: Load) -> float:
    start = output.find("{")
    if code != 0 or start < 0:
        raise Failed(f"fio: {said.strip()[-500:] or output[:500]}")
    document = json.loads(output[start : output.rindex("}") + 1])
    value: float = document["jobs"][0]["read" if load.is_read else "write"]["iops"]
    if not value:
        raise Failed(f"fio did nothing: {said.strip()[-500:]}")
    return value


@contextmanager
def deaf_client(target: Running, requests: int, size: int) -> Iterator[None]:
    """A client that requests much and reads none of it."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(START_SECONDS)
        sock.connect(str(target.socket_path))
        _exactly(sock, 18)  # greeting
        sock.sendall(struct.pack(">I8sII", 3, b"IHAVEOPT", 1, 0))  # EXPORT_NAME, the default one
        _exactly(sock, 10)  # size and flags; no padding was requested
        sock.sendall(b"".join(struct.pack(">IHHQQI", 0x25609513, 0, 0, number, 0, size) for number in range(requests)))
        yield


def _exactly(sock: socket.socket, size: int) -> None:
    while size:
        received = len(sock.recv(size))
        if not received:
            raise Failed("the server closed the connection in the handshake")
        size -= received


def missing() -> list[str]:
    """What is not installed, and so not compared."""
    return [tool for tool in ("qemu-nbd", "nbdkit") if not has(tool)]
