# SPDX-License-Identifier: Apache-2.0
"""Our plugin in the real nbdkit, with its filters in front and libnbd's and QEMU's programs as clients."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import vhdkit
from tests.interop import disks
from tests.interop.disks import KIB, MIB, Shape, sha256
from tests.support import require_nbdkit, require_tool
from vhdkit.serve.nbdkit.command import PLUGIN, check_python, nbdkit_environment

pytestmark = pytest.mark.interop
DEPTH = 4


@pytest.fixture(scope="module")
def nbdkit() -> str:
    """The program, with a Python that can load our modules."""
    return require_nbdkit()


def run_with(nbdkit: str, *words: str | Path, script: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a shell script beside nbdkit, which serves our plugin with these words; `$uri` is its address."""
    command = [nbdkit, "-U", "-", "python", PLUGIN, *map(str, words), "--run", script]
    environment = nbdkit_environment(nbdkit, os.environ)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def copied(nbdkit: str, folder: Path, *words: str | Path, options: str = "") -> str:
    """The hash of nbdcopy's copy."""
    require_tool("nbdcopy")
    target = folder / "copy.raw"
    target.unlink(missing_ok=True)
    run_with(nbdkit, *words, script=f"nbdcopy {options} $uri '{target}'")
    return hashlib.sha256(target.read_bytes()).hexdigest()


@pytest.mark.parametrize("shape", [disks.FIXED_SHAPES[2], disks.DYNAMIC_SHAPES[4]], ids=str)
def test_content(nbdkit: str, tmp_path: Path, shape: Shape) -> None:
    """A client reads what was written, with and without extents."""
    path = tmp_path / "disk.vhd"
    content = disks.create_with_content(path, shape)
    for options in ("", "--no-extents --request-size=4096", "--synchronous"):
        assert copied(nbdkit, tmp_path, "-r", f"image={path}", options=options) == sha256(content)


def test_chain(nbdkit: str, tmp_path: Path) -> None:
    """A chain with partial bitmaps reads as its disk, and its map shows the zeros."""
    contents = disks.grow_chain(tmp_path, Shape(vhdkit.DiskFormat.DYNAMIC, 12 * MIB, 512 * KIB), DEPTH)
    leaf = tmp_path / f"{DEPTH}.vhd"
    assert copied(nbdkit, tmp_path, "-r", f"image={leaf}") == sha256(contents[-1])
    require_tool("nbdinfo")
    runs = json.loads(run_with(nbdkit, "-r", f"image={leaf}", script="nbdinfo --map --json $uri").stdout)
    assert sum(run["length"] for run in runs) == 12 * MIB
    assert {run["type"] for run in runs} == {0, 3}
    for run in runs:
        if run["type"]:
            assert not any(contents[-1][run["offset"] : run["offset"] + run["length"]])


def test_writes_are_in_the_image_afterwards(nbdkit: str, tmp_path: Path) -> None:
    """QEMU's writes, zeros and trims at odd offsets are in the image when nbdkit has ended, and the image is sound."""
    require_tool("qemu-io")
    disks.grow_chain(tmp_path, Shape(vhdkit.DiskFormat.DYNAMIC, 12 * MIB, 512 * KIB), 1)
    leaf, model = tmp_path / "1.vhd", bytearray(disks.content_of(tmp_path / "1.vhd"))
    commands = [
        "w -P 0x44 4097 777",
        "w -z 1M 70k",
        "w -zu 2M 4k",
        "w -f -P 0x45 3145727 2",
        "r -P 0x44 4097 777",
        "flush",
    ]
    script = "qemu-io -f raw " + " ".join(f"-c '{command}'" for command in commands) + " $uri"
    output = run_with(nbdkit, f"image={leaf}", "access=write", script=script).stdout
    assert "failed" not in output and "error" not in output
    model[4097 : 4097 + 777] = b"\x44" * 777
    model[MIB : MIB + 70 * KIB] = bytes(70 * KIB)
    model[2 * MIB : 2 * MIB + 4 * KIB] = bytes(4 * KIB)
    model[3 * MIB - 1 : 3 * MIB + 1] = b"\x45" * 2
    assert disks.content_of(leaf) == bytes(model)
    assert not vhdkit.check(leaf)


def test_fio_verifies(nbdkit: str, tmp_path: Path) -> None:
    """fio verifies everything that it wrote with many requests in flight."""
    require_tool("fio")
    path = tmp_path / "disk.vhd"
    vhdkit.create_image(path, 16 * MIB)
    script = (
        f"cd '{tmp_path}' && fio --name=v --ioengine=nbd --uri=$uri --rw=randwrite --bsrange=512-128k --size=8m"
        " --iodepth=16 --verify=crc32c --verify_fatal=1"
    )
    run_with(nbdkit, f"image={path}", script=script)


def test_several_exports(nbdkit: str, tmp_path: Path) -> None:
    """Each name is its own disk, the first is also the one without a name, and a wrong name is reported."""
    require_tool("nbdinfo")
    for name, size in (("one", MIB), ("two", 2 * MIB)):
        vhdkit.create_image(tmp_path / f"{name}.vhd", size)
    words = ("name=one", f"image={tmp_path / 'one.vhd'}", "name=two", f"image={tmp_path / 'two.vhd'}")
    listed = json.loads(run_with(nbdkit, *words, script="nbdinfo --list --json $uri").stdout)
    assert [one["export-name"] for one in listed["exports"]] == ["one", "two"]
    named = 'nbdinfo --size "nbd+unix:///two?socket=$unixsocket" && nbdinfo --size $uri'
    assert run_with(nbdkit, *words, script=named).stdout.split() == [str(2 * MIB), str(MIB)]
    wrong = run_with(nbdkit, *words, script='nbdinfo --size "nbd+unix:///six?socket=$unixsocket"', code=1)
    assert "no export is named 'six'" in wrong.stderr and "Traceback" not in wrong.stderr


def test_cow_filter_leaves_the_image(nbdkit: str, tmp_path: Path) -> None:
    """Behind the cow filter clients can write and the image stays unchanged, even if it has children."""
    require_tool("qemu-io")
    path = tmp_path / "disk.vhd"
    vhdkit.create_image(path, 4 * MIB)
    vhdkit.create_child(tmp_path / "child.avhd", path)
    before = path.read_bytes()
    script = "qemu-io -f raw -c 'w -P 7 0 64k' -c 'r -P 7 0 64k' $uri"
    done = run_with(nbdkit, f"image={path}", "--filter=cow", script=script)
    assert "failed" not in done.stdout and path.read_bytes() == before


def test_other_filters(nbdkit: str, tmp_path: Path) -> None:
    """A single partition, injected errors, and unaligned clients: nbdkit's filters work on our plugin."""
    require_tool("nbdcopy")
    path = tmp_path / "disk.vhd"
    vhdkit.create_image(path, 8 * MIB)
    entry = bytes.fromhex("8000000083000000") + (2048).to_bytes(4, "little") + (4096).to_bytes(4, "little")
    with vhdkit.open_disk(path, writable=True) as disk:
        disk.write(446, entry + bytes(48) + b"\x55\xaa")
        disk.write(MIB, b"partition")
    expected = sha256(b"partition" + bytes(2 * MIB - 9))
    assert copied(nbdkit, tmp_path, f"image={path}", "--filter=partition", "partition=1") == expected
    failing = ("--filter=error", "error-pread-rate=100%")
    done = run_with(nbdkit, f"image={path}", *failing, script="nbdcopy --no-extents $uri null:", code=1)
    assert "Input/output error" in done.stderr
    checked = ("--filter=checkwrite",)  # every write must be in the image already
    raw = tmp_path / "same.raw"
    vhdkit.convert(path, raw, vhdkit.DiskFormat.RAW)
    run_with(nbdkit, f"image={path}", *checked, script=f"nbdcopy '{raw}' $uri")


def test_an_image_that_cannot_be_opened(nbdkit: str, tmp_path: Path) -> None:
    """nbdkit ends at its start with one sentence."""
    done = run_with(nbdkit, f"image={tmp_path / 'gone.vhd'}", script="true", code=1)
    assert "gone.vhd: cannot open: No such file or directory" in done.stderr
    assert "File " not in done.stderr


def test_a_python_mismatch_is_reported_before_nbdkit_starts(nbdkit: str) -> None:
    """The version that the real nbdkit reports is compared."""
    dump = subprocess.run([nbdkit, "python", "--dump-plugin"], capture_output=True, text=True, check=True).stdout
    with pytest.raises(vhdkit.InvalidArgument, match="is built for Python"):
        check_python(dump, (sys.version_info[0], sys.version_info[1] + 1))
