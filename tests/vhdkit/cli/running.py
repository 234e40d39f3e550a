# SPDX-License-Identifier: Apache-2.0
"""How the tests run `vhdkit`: in this process, or as a process of its own where signals and pipes matter."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

import vhdkit
from tests.waiting import wait_until
from vhdkit.cli.main import main

MIB = 1 << 20
VERBS = (
    "create", "info", "chain", "check", "map", "convert", "compare", "snapshot", "clone", "merge", "pull",
    "rebase", "relocate", "compact", "resize", "gc", "serve", "mount", "umount", "mounts", "dump",
)  # fmt: skip
# What `make_chain` makes: format, sector size. The files are named like VHDs: names decide nothing.
CHAINS = {"vhd": ("dynamic", 512), "vhdx": ("vhdx", 512), "vhdx-4096": ("vhdx", 4096)}
chain_kind = [CHAINS["vhd"]]  # set by the fixture of the same name
COMMAND = (sys.executable, "-m", "vhdkit")


def run(*words: str | Path, stdin: bytes | None = None) -> Result:
    """Run the command line in this process."""
    return CliRunner().invoke(main, [str(word) for word in words], input=stdin)


def good(*words: str | Path, stdin: bytes | None = None) -> str:
    """Run a command that must succeed, and return what it printed."""
    result = run(*words, stdin=stdin)
    assert result.exit_code == 0, result.output
    return result.stdout


def document(*words: str | Path, code: int = 0) -> Any:
    """Run with --json, and return the document on standard output."""
    result = run(*words, "--json")
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


def failure(*words: str | Path, code: int, stdin: bytes | None = None) -> str:
    """Run a command that must fail with this exit code and one line; return the line without its prefix."""
    result = run(*words, stdin=stdin)
    assert result.exit_code == code, result.output
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("vhdkit: "), result.stderr
    return lines[0].removeprefix("vhdkit: ")


def start(*words: str | Path, **options: Any) -> subprocess.Popen[bytes]:
    """Start the command as a process of its own."""
    environment = {**os.environ, **options.pop("env", {})}
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.Popen([*COMMAND, *map(str, words)], env=environment, **streams)


def finish(process: subprocess.Popen[bytes]) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of a started command, which must end by itself."""
    output, errors = process.communicate(timeout=60)
    return process.returncode, (output or b"").decode(), errors.decode()


def wait_for_part(folder: Path) -> None:
    """Wait until a file under construction is there, hidden under its temporary name."""
    wait_until(lambda: list(folder.glob(".vhdkit-*.part")), "the command begins its file")


def names(folder: Path) -> list[str]:
    """Every name in the folder, hidden files included."""
    return sorted(path.name for path in folder.iterdir())


def make_chain() -> bytes:
    """Make `base.vhd`, `middle.avhd` and `leaf.avhd`, 8 MiB, each with its own data; return the disk's content."""
    content = bytearray(8 * MIB)
    disk_format, sector_bytes = chain_kind[0]
    vhdkit.create_image("base.vhd", 8 * MIB, disk_format=disk_format, block_size_bytes=MIB, sector_bytes=sector_bytes)
    good("create", "middle.avhd", "--parent", "base.vhd")
    write(content, "middle.avhd", 0, b"")  # still empty: opening it for writing must not damage it
    for image, offset, size in (
        ("middle.avhd", MIB + 4096, 8192),
        ("middle.avhd", 5 * MIB, 2 * MIB),
    ):
        write(content, image, offset, bytes([len(image)]) * size)
    good("create", "leaf.avhd", "--parent", "middle.avhd")
    write(content, "leaf.avhd", MIB + 8192, b"\xee" * 512)
    write(content, "leaf.avhd", 6 * MIB, bytes(MIB))
    return bytes(content)


def write(content: bytearray, image: str, offset: int, data: bytes) -> None:
    """Write to the disk and to its model."""
    content[offset : offset + len(data)] = data
    with vhdkit.open_disk(image, writable=True) as disk:
        disk.write(offset, data)


def interrupt(process: subprocess.Popen[bytes], number: int = signal.SIGINT) -> tuple[int, str, str]:
    """Send a signal, and collect the command's exit code and output."""
    process.send_signal(number)
    return finish(process)
