# SPDX-License-Identifier: Apache-2.0
"""VHDX and other programs: they read what we write, we read what qemu writes, with every option.

Also the logs of killed programs: ours is replayed by qemu, qemu's by us. qemu reads no differencing VHDX, and no
sectors of 4096 bytes. 7-Zip refuses some sizes that are not multiples of 16 KiB where sectors have 4096. dissect is
compared with images without parent only: in long reads of partial blocks it gets single runs of eight sectors wrong,
which it reads right by themselves.
"""

from __future__ import annotations

import itertools
import random
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

import vhdkit
from tests.interop.disks import content_of
from tests.servers import serving
from tests.support import daily_or_nightly, require_module, require_tool, run
from vhdkit.units import KIB, MIB

pytestmark = pytest.mark.interop

BLOCK_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # MiB
QEMU_OPTIONS = [
    (block, log, subformat, state)
    for block, log, subformat, state in itertools.product(BLOCK_SIZES, (1, 4), ("dynamic", "fixed"), ("on", "off"))
    if daily_or_nightly(0, 1) or (block, log, subformat, state) in ((1, 1, "dynamic", "on"), (8, 4, "fixed", "off"))
]
OUR_SHAPES = [
    (block, sector, disk_format)
    for block, sector, disk_format in itertools.product(BLOCK_SIZES, (512, 4096), ("vhdx", "vhdx-fixed"))
    if daily_or_nightly(0, 1) or (block, sector, disk_format) in ((1, 4096, "vhdx"), (2, 512, "vhdx-fixed"))
]
SIZE = 20 * MIB + 16 * KIB


def qemu_content(image: Path) -> bytes:
    """The disk as qemu reads it."""
    raw = image.with_suffix(".qemu-raw")
    run([require_tool("qemu-img"), "convert", "-f", "vhdx", "-O", "raw", str(image), str(raw)])
    content = raw.read_bytes()
    raw.unlink()
    return content


def qemu_io(image: str, *commands: str, image_format: str = "vhdx") -> None:
    """Run commands of qemu-io, each of which must succeed."""
    words = [word for command in commands for word in ("-c", command)]
    done = run([require_tool("qemu-io"), "-f", image_format, *words, image])
    assert "failed" not in done.stdout + done.stderr, done.stdout + done.stderr


def qemu_check(image: Path, *words: str) -> None:
    """`qemu-img check` has nothing to say."""
    run([require_tool("qemu-img"), "check", "-f", "vhdx", *words, str(image)])


def seven_zip(image: Path) -> bytes:
    """The disk as 7-Zip reads it; it finds the parents in the folder by itself."""
    command = [require_tool("7zz"), "x", "-so", "-tVHDX", str(image)]
    done = subprocess.run(command, capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    return done.stdout


def dissect(image: Path) -> bytes:
    """The disk as dissect reads it."""
    require_module("dissect.hypervisor")
    from dissect.hypervisor.disk.vhdx import VHDX

    with image.open("rb") as file:
        disk = VHDX(file)
        content: bytes = disk.read(disk.size)
    return content


def scribbled(image: Path, content: bytearray, seed: int) -> None:
    """Write, zero and trim all over the disk, as the model."""
    rng = random.Random(seed)
    with vhdkit.open_disk(image, writable=True) as disk:
        for number in range(30):
            count = rng.choice((4 * KIB, 12 * KIB, 256 * KIB, MIB))
            first = rng.randrange((disk.size_bytes - count) // (4 * KIB) + 1) * 4 * KIB
            data = rng.randbytes(4 * KIB) * (count // (4 * KIB)) if number % 3 else bytes(count)
            if number % 3:
                disk.write(first, data)
            else:
                disk.write_zeroes(first, count)
            content[first : first + count] = data
            if number % 7 == 0:
                disk.flush()


@pytest.mark.parametrize(("block", "log", "subformat", "state"), QEMU_OPTIONS)
def test_what_qemu_writes(tmp_path: Path, block: int, log: int, subformat: str, state: str) -> None:
    """With each of its options: we read the same, and after we wrote to it qemu reads what we wrote."""
    image = tmp_path / "theirs.vhdx"
    options = f"block_size={block}M,log_size={log}M,subformat={subformat},block_state_zero={state}"
    run([require_tool("qemu-img"), "create", "-q", "-f", "vhdx", "-o", options, str(image), str(SIZE)])
    qemu_io(str(image), "write -P 1 0 70k", "write -P 2 3M 2M", "write -P 3 20480k 4k", "discard 4M 64k")
    assert content_of(image) == qemu_content(image)
    assert not [one for one in vhdkit.check(image) if one.severity is vhdkit.Severity.ERROR]
    content = bytearray(content_of(image))
    scribbled(image, content, block + log)
    assert content_of(image) == qemu_content(image) == bytes(content)
    qemu_check(image)
    qemu_io(str(image), "write -P 9 1M 1M")
    content[MIB : 2 * MIB] = b"\x09" * MIB
    assert content_of(image) == bytes(content)


@pytest.mark.parametrize(("block", "sector", "disk_format"), OUR_SHAPES)
def test_what_we_write(tmp_path: Path, block: int, sector: int, disk_format: str) -> None:
    """7-Zip and dissect read it, and qemu where the sectors have 512 bytes, which are all that it knows."""
    image, content = tmp_path / "ours.vhdx", bytearray(SIZE)
    options = {"disk_format": disk_format, "block_size_bytes": block * MIB, "sector_bytes": sector}
    vhdkit.create_image(image, SIZE, **options)  # type: ignore[arg-type]
    for seed in range(2):
        scribbled(image, content, seed)
    assert content_of(image) == seven_zip(image) == dissect(image) == bytes(content)
    run([require_tool("7zz"), "t", "-tVHDX", str(image)])
    if sector == 512:
        qemu_check(image)
        assert qemu_content(image) == bytes(content)


@pytest.mark.parametrize("blocks", [(1, 2, 1), *[(2, 32, 2), (256, 2, 8)][: daily_or_nightly(0, 2)]], ids=str)
@pytest.mark.parametrize("sector", [512, *[4096][: daily_or_nightly(0, 1)]])
def test_our_chains(tmp_path: Path, blocks: tuple[int, ...], sector: int) -> None:
    """Children with blocks of other sizes, that own parts of blocks and zeros, read the same in 7-Zip."""
    leaf, content = tmp_path / "layer0.vhdx", bytearray(SIZE)
    vhdkit.create_image(leaf, SIZE, disk_format="vhdx", block_size_bytes=blocks[0] * MIB, sector_bytes=sector)
    scribbled(leaf, content, 0)
    for number, block in enumerate(blocks[1:], 1):
        child = tmp_path / f"layer{number}.avhdx"
        vhdkit.create_child(child, leaf, block_size_bytes=block * MIB)
        leaf = child
        scribbled(leaf, content, number)
        assert content_of(leaf) == seven_zip(leaf) == bytes(content)


def test_qemu_replays_the_log_of_our_killed_server(tmp_path: Path) -> None:
    """After kill -9 everything flushed is there: to us without a change of the file, and to qemu once it replayed."""
    image, content = tmp_path / "served.vhdx", bytearray(SIZE)
    vhdkit.create_image(image, SIZE, disk_format="vhdx", block_size_bytes=MIB)
    with serving(image, "--socket", tmp_path / "s") as server:
        for number in range(4):
            first = (5 * number + 1) * MIB - 64 * KIB  # new blocks each time
            qemu_io(server.uri, f"write -P {number + 1} {first} 128k", "flush", image_format="raw")
            content[first : first + 128 * KIB] = bytes([number + 1]) * 128 * KIB
        code, _ = server.stop(signal.SIGKILL)
        assert code == -signal.SIGKILL
    before = image.read_bytes()
    assert content_of(image) == bytes(content) and image.read_bytes() == before
    assert "log-not-replayed" in [one.code for one in vhdkit.check(image)]
    copy = tmp_path / "copy.vhdx"
    shutil.copy(image, copy)
    qemu_check(copy, "-r", "all")
    qemu_check(copy)
    assert qemu_content(copy) == bytes(content)
    assert content_of(copy) == bytes(content)
    with vhdkit.open_disk(image, writable=True):
        pass
    assert content_of(image) == bytes(content) == qemu_content(image)


def test_we_replay_the_log_of_a_killed_qemu(tmp_path: Path) -> None:
    """Its log is read without a change of the file, and replayed in it when it is opened for writing."""
    image = tmp_path / "theirs.vhdx"
    run([require_tool("qemu-img"), "create", "-q", "-f", "vhdx", "-o", "block_size=1M", str(image), str(SIZE)])
    commands = ["write -P 1 0 70k", "write -P 2 3M 2M", "flush", "sigraise 9"]
    words = [word for command in commands for word in ("-c", command)]
    killed = subprocess.run(
        [require_tool("qemu-io"), "-f", "vhdx", *words, str(image)], capture_output=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    content = bytearray(SIZE)
    content[: 70 * KIB], content[3 * MIB : 5 * MIB] = b"\1" * 70 * KIB, b"\2" * 2 * MIB
    before = image.read_bytes()
    assert content_of(image) == bytes(content) and image.read_bytes() == before
    scribbled(image, content, 3)
    assert content_of(image) == bytes(content) == qemu_content(image)
    qemu_check(image)


@pytest.mark.parametrize("sector", [512, 4096])
def test_an_image_that_was_made_independent_reads_the_same_in_its_peers(sector: int, tmp_path: Path) -> None:
    """qemu, which reads no differencing VHDX, and 7-Zip read it with the parents gone, and find nothing wrong."""
    rng, names = random.Random(sector), [tmp_path / name for name in ("base.vhdx", "middle.avhdx", "leaf.avhdx")]
    vhdkit.create_image(names[0], SIZE, disk_format="vhdx", sector_bytes=sector)
    for number, path in enumerate(names):
        if number:
            vhdkit.create_child(path, names[number - 1])
        with vhdkit.open_disk(path, writable=True) as disk:
            for _ in range(6):
                disk.write(rng.randrange(SIZE // 4096 - 40) * 4096, rng.randbytes(40 * 4096))
                disk.write_zeroes(rng.randrange(SIZE // 4096 - 40) * 4096, 10 * 4096)
            expected = disk.read(0, SIZE)
    vhdkit.pull(names[2], independent=True)
    names[0].unlink()
    names[1].unlink()
    assert seven_zip(names[2]) == expected
    if sector == 512:  # the only size that qemu reads
        assert qemu_content(names[2]) == expected
        qemu_check(names[2])
