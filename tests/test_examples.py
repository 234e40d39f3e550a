# SPDX-License-Identifier: Apache-2.0
"""The programs in examples/ run and do what they say, with public names only."""

from __future__ import annotations

import ast
import hashlib
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

import vhdkit
from tests.servers import serving
from tests.support import ROOT, require_libnbd, require_tool

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def run_example(name: str, *words: str | Path, code: int = 0, interpreter: str = sys.executable) -> str:
    """Run an example as a user would; return its output."""
    done = subprocess.run(
        [interpreter, ROOT / "examples" / name, *words],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout if code == 0 else done.stderr


def test_read_partitions(tmp_path: Path) -> None:
    """The partitions of a disk are listed, through a chain too."""
    base, leaf = tmp_path / "base.vhd", tmp_path / "leaf.avhd"
    vhdkit.create_image(base, 8 << 20)
    assert "no partition table" in run_example("read_partitions.py", base)
    vhdkit.create_child(leaf, base)
    entry = struct.pack("<B3xB3xII", 0x80, 0x83, 2048, 4096)
    with vhdkit.open_disk(leaf, writable=True) as disk:
        disk.write(446, entry + bytes(48) + b"\x55\xaa")
    text = run_example("read_partitions.py", leaf)
    assert "partition 1: type 0x83, active, starts at byte 1048576, 2097152 bytes" in text
    assert "No such file" in run_example("read_partitions.py", tmp_path / "gone.vhd", code=1)


def test_back_up_leaf(tmp_path: Path) -> None:
    """The backup has the leaf's runs and their bytes, and nothing of the parent."""
    base, leaf, backup = tmp_path / "base.vhd", tmp_path / "leaf.avhd", tmp_path / "backup"
    vhdkit.create_image(base, 8 << 20)
    with vhdkit.open_disk(base, writable=True) as disk:
        disk.write(0, b"b" * 65536)
    vhdkit.create_child(leaf, base)
    with vhdkit.open_disk(leaf, writable=True) as disk:
        disk.write(4096, b"l" * 1024)
        disk.write(5 << 20, b"m" * 512)
    assert "2 runs, 1536 of 8388608 bytes" in run_example("back_up_leaf.py", leaf, backup)
    head, _, data = backup.read_bytes().partition(b"\n\n")
    assert head.decode().splitlines() == ["4096 1024 data", f"{5 << 20} 512 data"]
    assert data == b"l" * 1024 + b"m" * 512
    assert "exists" in run_example("back_up_leaf.py", leaf, backup, code=1)


def test_write_to_child(tmp_path: Path) -> None:
    """The child has the text, and the parent's file is unchanged."""
    base, leaf = tmp_path / "base.vhd", tmp_path / "leaf.avhd"
    vhdkit.create_image(base, 8 << 20)
    before = base.read_bytes()
    text = run_example("write_to_child.py", base, leaf, "1000", "hello")
    assert "is b'hello'" in text and base.read_bytes() == before
    with vhdkit.open_disk(leaf) as disk:
        assert disk.read(1000, 5) == b"hello"
    assert "already exists" in run_example("write_to_child.py", base, leaf, "0", "x", code=1)


def make_chain(folder: Path) -> Path:
    """Make a leaf on a base, with data in both; return the leaf."""
    base, leaf = folder / "base.vhd", folder / "my leaf.avhd"
    vhdkit.create_image(base, 8 << 20)
    with vhdkit.open_disk(base, writable=True) as disk:
        disk.write(0, b"b" * 65536)
    vhdkit.create_child(leaf, base)
    with vhdkit.open_disk(leaf, writable=True) as disk:
        disk.write(4096, b"l" * 1024)
        disk.write(5 << 20, b"m" * 4096)
    return leaf


@pytest.mark.interop
def test_read_over_nbd(tmp_path: Path) -> None:
    """The size, the amount of data, and the hash of that data match the file; a wrong address is reported."""
    interpreter = require_libnbd()
    leaf = make_chain(tmp_path)
    with vhdkit.open_disk(leaf) as disk:
        runs = [run for run in disk.extents(find_holes=True) if run.kind is vhdkit.ExtentKind.DATA]
        data = b"".join(disk.read(run.offset_bytes, run.size_bytes) for run in runs)
    with serving(leaf, "--read-only") as server:
        text = run_example("read_over_nbd.py", server.uri, interpreter=interpreter)
    assert f"{8 << 20} bytes, {len(data)} of them data" in text
    assert hashlib.sha256(data).hexdigest() in text
    gone = f"nbd+unix:///?socket={tmp_path / 'gone.sock'}"
    assert "gone.sock" in run_example("read_over_nbd.py", gone, code=1, interpreter=interpreter)


@pytest.mark.interop
def test_copy_with_nbdcopy(tmp_path: Path) -> None:
    """The raw file is the disk that the chain shows; an existing file is not overwritten."""
    require_tool("nbdcopy")
    leaf, target = make_chain(tmp_path), tmp_path / "copy.raw"
    text = run_example("copy_with_nbdcopy.py", leaf, target)
    with vhdkit.open_disk(leaf) as disk:
        assert target.read_bytes() == disk.read(0, disk.size_bytes)
    assert hashlib.sha256(target.read_bytes()).hexdigest() in text
    assert "already exists" in run_example("copy_with_nbdcopy.py", leaf, target, code=1)
    assert "gone.vhd" in run_example("copy_with_nbdcopy.py", tmp_path / "gone.vhd", tmp_path / "new.raw", code=1)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_use_public_names(path: Path) -> None:
    """An example imports only vhdkit, nothing below it, and uses only what `__all__` lists."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert not (node.module or "").startswith("vhdkit"), ast.unparse(node)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "vhdkit":
            assert node.attr in vhdkit.__all__, node.attr


def test_every_example_is_tested() -> None:
    """A new example needs a test with its name."""
    assert all(f"test_{path.stem}" in globals() for path in EXAMPLES)
