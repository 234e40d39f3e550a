# SPDX-License-Identifier: Apache-2.0
"""fio on our NBD server: everything it wrote verifies; and after kill -9 under load everything flushed is there."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import threading
import time
from functools import partial
from pathlib import Path

import pytest

import vhdkit
from tests.interop.disks import KIB, MIB, content_of
from tests.interop.nbd import KINDS, client, make_image, served
from tests.nbd_client import FLUSH, FUA, WRITE, Client, HungUp
from tests.servers import serving
from tests.support import require_tool
from tests.waiting import wait_until

pytestmark = [pytest.mark.interop, pytest.mark.timeout(180)]
PAGE = 4 * KIB
FIRST = 5 * MIB  # fio has the part before that


def fio(uri: str, *words: str) -> list[str]:
    """A command line of fio on the first 4 MiB of an export."""
    # In a thread: a job in a separate process survives the program when that is killed.
    return [
        require_tool("fio"),
        "--name=v",
        "--thread",
        "--ioengine=nbd",
        f"--uri={uri}",
        "--size=4m",
        "--rw=randwrite",
        *words,
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_fio_verifies(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What fio wrote in random order, with flushes in between, reads back with the right checksums."""
    monkeypatch.chdir(tmp_path)
    with served(tmp_path, kind) as (server, _):
        checks = ("--bsrange=512-128k", "--bs_unaligned=0", "--iodepth=16", "--fsync=16")
        client(*fio(server.uri, *checks, "--verify=crc32c", "--verify_fatal=1", "--randrepeat=1"))
        assert server.stop() == (0, "")


@pytest.mark.parametrize("kind", KINDS)
def test_a_cold_disk_is_copied_and_verified(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the image is in the page cache: nbdcopy gets all of it, and fio writes and verifies parts of it."""
    monkeypatch.chdir(tmp_path)
    image = make_image(tmp_path, kind)

    def drop() -> None:
        for path in tmp_path.glob("*.vhd"):
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)

    drop()
    with serving(image.path, "--socket", tmp_path / "sock") as server:
        client("nbdcopy", server.uri, tmp_path / "copy.raw")
        assert (tmp_path / "copy.raw").read_bytes() == image.content
        client(*fio(server.uri, "--bs=4k", "--iodepth=16", "--verify=crc32c", "--do_verify=0", "--randrepeat=1"))
        assert server.stop() == (0, "")
    drop()
    with serving(image.path, "--socket", tmp_path / "sock") as server:
        words = ("--bs=4k", "--iodepth=16", "--verify=crc32c", "--verify_only=1", "--verify_fatal=1", "--randrepeat=1")
        client(*fio(server.uri, *words))
        assert server.stop() == (0, "")


class Writer(threading.Thread):
    """Writes numbered pages to the disk from 5 MiB on and flushes from time to time, until the server is gone."""

    def __init__(self, path: Path, seed: int) -> None:
        super().__init__(daemon=True)
        self.flushed: dict[int, int] = {}  # page: the newest version that a flush or FUA has covered
        self.sent: dict[int, list[int]] = {}  # page: all its versions
        self._path = path
        self._rng = random.Random(seed)

    def has_flushed(self, pages: int) -> bool:
        """True if a flush has covered more than that many pages."""
        return len(self.flushed) > pages

    def run(self) -> None:
        """Write until the connection is closed."""
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(self._path))
        with Client(sock) as nbd:
            nbd.start(structured=True).go()
            answered: dict[int, int] = {}
            for version in range(1, 1 << 30):
                page = self._rng.randrange(900)
                self.sent.setdefault(page, []).append(version)
                try:
                    payload = version.to_bytes(8) * (PAGE // 8)
                    flags = FUA if version % 7 == 0 else 0
                    assert nbd.call(WRITE, FIRST + page * PAGE, payload=payload, flags=flags).error == 0
                    answered[page] = version
                    if flags:
                        self.flushed[page] = version
                    elif version % 11 == 0:
                        assert nbd.call(FLUSH).error == 0
                        self.flushed.update(answered)
                except (HungUp, OSError):
                    return


@pytest.mark.parametrize(
    "kind", [pytest.param(one, marks=pytest.mark.nightly) if one == "fixed" else one for one in KINDS]
)
def test_kill_9_under_load(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """INV-FLUSHED-OR-NEWER: the server is killed while fio and we write; the image is sound, flushed data or newer
    data is there, and a new server serves it."""
    monkeypatch.chdir(tmp_path)
    image = make_image(tmp_path, kind)
    sock, rng = tmp_path / "sock", random.Random(kind)
    for turn in range(2):
        with serving(image.path, "--socket", sock) as server:
            writer = Writer(sock, turn)
            words = ("--bs=4k", "--iodepth=16", "--fsync=8", "--time_based", "--runtime=30", "--verify=crc32c")
            load = subprocess.Popen(fio(server.uri, *words, "--do_verify=0"), stdout=-3, stderr=-3)
            try:
                writer.start()
                wait_until(partial(writer.has_flushed, 50), "the client flushes")
                time.sleep(0.3 + rng.random())  # the moment of the kill is random
                server.process.kill()
                writer.join(30)
                assert not writer.is_alive()
            finally:
                load.kill()
                load.wait(20)
        assert len(writer.flushed) > 50
        content = content_of(image.path)
        for page, flushed in writer.flushed.items():
            raw = content[FIRST + page * PAGE : FIRST + (page + 1) * PAGE]
            found = {int.from_bytes(raw[at : at + 8]) for at in range(0, PAGE, 8)}
            assert found <= {version for version in writer.sent[page] if version >= flushed}, f"page {page}"
        assert not [one for one in vhdkit.check(image.path) if one.severity is vhdkit.Severity.ERROR]
    with serving(image.path, "--socket", sock) as server:
        client("nbdcopy", server.uri, tmp_path / "copy.raw")
        assert server.stop() == (0, "")
    assert (tmp_path / "copy.raw").read_bytes() == content_of(image.path)
