# SPDX-License-Identifier: Apache-2.0
"""libnbd's programs on our server: nbdinfo, nbdcopy, nbdsh, nbdfuse; and nbdkit with filters in front of it."""

from __future__ import annotations

import json
import os
import random
import subprocess
from pathlib import Path

import pytest

import vhdkit
from tests.interop.disks import KIB, MIB, SECTOR, content_of
from tests.interop.nbd import KINDS, SIZE, client, make_image, owners_of_sectors, served, states_of_sectors
from tests.servers import serving
from tests.support import SYSTEM_PYTHON, not_available, require_tool
from tests.waiting import becomes

pytestmark = [pytest.mark.interop, pytest.mark.timeout(180)]


def nbd_map(uri: str, context: str) -> list[int]:
    """The map of a context that nbdinfo prints, by sector."""
    entries = json.loads(client("nbdinfo", f"--map={context}", "--json", uri))
    return states_of_sectors([(one["offset"], one["length"], one["type"]) for one in entries])


@pytest.mark.parametrize("kind", KINDS)
def test_nbdinfo(tmp_path: Path, kind: str) -> None:
    """nbdinfo lists the export and describes it correctly, by INFO, LIST and single queries."""
    with served(tmp_path, kind) as (server, _):
        [export] = json.loads(client("nbdinfo", "--no-content", "--json", server.uri))["exports"]
        assert export["export-size"] == SIZE
        assert (export["block_size_minimum"], export["block_size_preferred"]) == (1, 4096)
        assert export["block_size_maximum"] == 64 * MIB
        for ability in ("can_cache", "can_df", "can_fast_zero", "can_flush", "can_fua", "can_multi_conn", "can_trim"):
            assert export[ability], ability
        assert export["can_zero"] and not export["is_read_only"]
        assert json.loads(client("nbdinfo", "--list", "--json", server.uri))["exports"]
        assert client("nbdinfo", "--size", server.uri) == f"{SIZE}\n"
        client("nbdinfo", "--can", "multi-conn", server.uri)


def test_nbdinfo_of_large_sectors(tmp_path: Path) -> None:
    """A disk with sectors of 4096 bytes says so, and nbdcopy copies it whole in both directions."""
    path, source, target = tmp_path / "large.vhdx", tmp_path / "in.raw", tmp_path / "out.raw"
    vhdkit.create_image(path, 8 * MIB, disk_format="vhdx", sector_bytes=4096)
    source.write_bytes(random.Random(1).randbytes(8 * MIB))
    with serving(path) as server:
        [export] = json.loads(client("nbdinfo", "--no-content", "--json", server.uri))["exports"]
        assert (export["block_size_minimum"], export["block_size_preferred"]) == (4096, 4096)
        client("nbdcopy", str(source), server.uri)
        client("nbdcopy", server.uri, str(target))
    assert target.read_bytes() == source.read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_nbdinfo_maps(tmp_path: Path, kind: str) -> None:
    """Row 40: nbdinfo's maps of allocation, depth and every layer's dirty bitmap agree with content and layers."""
    with served(tmp_path, kind, "--read-only") as (server, image):
        owners = owners_of_sectors(image.path)
        assert nbd_map(server.uri, "qemu:allocation-depth") == [owner + 1 for owner in owners]
        states = nbd_map(server.uri, "base:allocation")
        assert set(states) == {0, 3}
        for index, state in enumerate(states):
            assert state == 0 or not any(image.content[index * SECTOR : (index + 1) * SECTOR])
        with vhdkit.open_disk(image.path) as disk:
            ids = disk.layer_ids
        for depth, name in enumerate(ids):
            dirty = nbd_map(server.uri, f"qemu:dirty-bitmap:{name}")
            assert dirty == [int(0 <= owner <= depth) for owner in owners]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--synchronous",),
        ("--no-extents", "--connections=1", "--requests=1", f"--request-size={256 * KIB}"),
        ("--allocated", "--connections=4"),
    ],
    ids=["usual", "synchronous", "plain", "allocated"],
)
def test_nbdcopy_out(tmp_path: Path, kind: str, options: tuple[str, ...]) -> None:
    """nbdcopy gets every byte, with extents and without, with one connection and several."""
    with served(tmp_path, kind) as (server, image):
        client("nbdcopy", *options, server.uri, tmp_path / "copy.raw")
        assert (tmp_path / "copy.raw").read_bytes() == image.content


@pytest.mark.parametrize("kind", KINDS)
def test_nbdcopy_in(tmp_path: Path, kind: str) -> None:
    """The image reads afterwards as nbdcopy has written, zeroed and trimmed it."""
    rng = random.Random(kind)
    data = bytearray(SIZE)
    for _ in range(12):
        offset, size = rng.randrange(0, SIZE - MIB), rng.randrange(1, MIB)
        data[offset : offset + size] = rng.randbytes(size)
    (tmp_path / "in.raw").write_bytes(data)
    with served(tmp_path, kind) as (server, image):
        client("nbdcopy", "-S", "512", "--flush", tmp_path / "in.raw", server.uri)
        assert server.stop() == (0, "")
    assert content_of(image.path) == data


_SHELL = """
import os, random, nbd
size = h.get_size()
assert h.can_multi_conn() and h.get_structured_replies_negotiated()
rng, model = random.Random(1), bytearray(h.pread(size, 0) if size <= 1 << 25 else b"")
for turn in range(60):
    offset = rng.randrange(size); length = rng.randint(1, min(size - offset, rng.choice((9, 5000, 1 << 20))))
    kind = rng.randrange(4)
    if kind == 0:
        data = rng.randbytes(length); h.pwrite(data, offset, nbd.CMD_FLAG_FUA * rng.randrange(2))
        model[offset:offset + length] = data
    elif kind == 1:
        h.zero(length, offset, nbd.CMD_FLAG_NO_HOLE * rng.randrange(2)); model[offset:offset + length] = bytes(length)
    elif kind == 2:
        assert h.pread(length, offset) == model[offset:offset + length]
    else:
        h.flush(); h.cache(length, offset)
h.set_strict_mode(0)
for bad in (lambda: h.pread(512, size), lambda: h.pwrite(b"x" * 512, size), lambda: h.pwrite(b"x" * 512, 2 ** 64 - 5),
            lambda: h.trim(512, size), lambda: h.pwrite(b"x" * 512, 0, 0x100), lambda: h.pread(40 << 20, 0)):
    try:
        bad()
    except nbd.Error as error:
        assert error.errnum, error
    else:
        raise SystemExit("an illegal request went through")
assert h.pread(size, 0) == model
open(os.environ["MODEL"], "wb").write(model)
h.shutdown()
"""


@pytest.mark.parametrize("kind", KINDS)
def test_nbdsh(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows 25, 27 and 28: libnbd's shell writes, zeros, reads, and sends illegal requests, with the expected
    results."""
    if subprocess.run([SYSTEM_PYTHON, "-c", "import nbd"], capture_output=True, check=False).returncode:
        not_available(f"needs the module nbd in {SYSTEM_PYTHON}: Debian's package python3-libnbd")
    monkeypatch.setenv("MODEL", str(tmp_path / "model"))
    with served(tmp_path, kind) as (server, image):
        client("nbdsh", "-u", server.uri, "-c", _SHELL)
        assert server.stop()[0] == 0
    assert content_of(image.path) == (tmp_path / "model").read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_nbdkit_filters_in_front(tmp_path: Path, kind: str) -> None:
    """nbdkit's nbd plugin with the cow filter reads from us, keeps writes to itself, and does not change our image."""
    require_tool("qemu-io")
    with served(tmp_path, kind, "--read-only") as (server, image):
        before = image.path.read_bytes()
        script = f'nbdcopy "$uri" {tmp_path}/copy.raw && qemu-io -f raw -c "w -P 7 4k 64k" -c "r -P 7 4k 64k" "$uri"'
        said = client("nbdkit", "-U", "-", "--filter=cow", "nbd", server.uri, "--run", script)
        assert "failed" not in said and "error" not in said
        assert (tmp_path / "copy.raw").read_bytes() == image.content
        assert image.path.read_bytes() == before


def test_nbdfuse(tmp_path: Path) -> None:
    """nbdfuse mounts our export as a file that reads and writes like the disk."""
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        not_available("needs /dev/fuse")
    umount = [require_tool("umount")] if os.geteuid() == 0 else [require_tool("fusermount3"), "-u"]
    mount = tmp_path / "mount"
    mount.mkdir()
    with served(tmp_path, "chain") as (server, image):
        pid_file = tmp_path / "pid"
        fuse = subprocess.Popen([require_tool("nbdfuse"), "-P", str(pid_file), str(mount), server.uri])
        try:
            if not becomes(lambda: fuse.poll() is not None or (pid_file.exists() and (mount / "nbd").exists())) or (
                fuse.poll() is not None
            ):
                not_available("nbdfuse cannot mount here")
            assert (mount / "nbd").read_bytes() == image.content
            with (mount / "nbd").open("r+b", buffering=0) as file:
                file.seek(12345)
                file.write(b"through a mount")
                os.fsync(file.fileno())
        finally:
            subprocess.run([*umount, str(mount)], capture_output=True, check=False)
            try:
                fuse.wait(60)
            finally:
                fuse.kill()
                fuse.wait(5)
        assert server.stop()[0] == 0
    expected = bytearray(image.content)
    expected[12345:12360] = b"through a mount"
    assert content_of(image.path) == expected


def test_several_exports(tmp_path: Path) -> None:
    """Rows 8 and 12: a server with two exports lists both; each name reads its own disk, the empty name the first
    one's."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first, second = make_image(tmp_path / "a", "dynamic"), make_image(tmp_path / "b", "chain")
    sock = tmp_path / "sock"
    with serving("--export", f"one={first.path}", "--export", f"two={second.path}", "--socket", sock):
        listed = json.loads(client("nbdinfo", "--list", "--json", f"nbd+unix:///?socket={sock}"))["exports"]
        assert [one["export-name"] for one in listed] == ["one", "two"]
        for name, image in (("one", first), ("two", second), ("", first)):
            client("nbdcopy", f"nbd+unix:///{name}?socket={sock}", tmp_path / "copy.raw")
            assert (tmp_path / "copy.raw").read_bytes() == image.content
