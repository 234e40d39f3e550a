# SPDX-License-Identifier: Apache-2.0
"""qemu-img and qemu-io for the tests: reading, writing, and qemu-io holding an image open."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import require_tool, run

_PATIENCE_SECONDS = 60


def qemu_content(image: Path, scratch: Path, *, offset: int = 0, size: int | None = None) -> bytes:
    """qemu's content of a VHD: all of it, or a part."""
    part = f"offset={offset}," + ("" if size is None else f"size={size},")
    source = f"driver=raw,{part}file.driver=vpc,file.file.driver=file,file.file.filename={image}"
    raw = scratch / f"{image.name}.qemu-raw"
    run([require_tool("qemu-img"), "convert", "--image-opts", source, "-O", "raw", str(raw)])
    content = raw.read_bytes()
    raw.unlink()
    return content


def qemu_virtual_size(image: Path) -> int:
    """The size that `qemu-img info` gives for a VHD."""
    said = run([require_tool("qemu-img"), "info", "-f", "vpc", "--output=json", str(image)])
    size: int = json.loads(said.stdout)["virtual-size"]
    return size


def qemu_create(image: Path, size: int, subformat: str, *, force_size: bool) -> None:
    """Have qemu create a VHD. Without `force_size` the size is rounded up to a CHS geometry."""
    options = f"subformat={subformat},force_size={'on' if force_size else 'off'}"
    run([require_tool("qemu-img"), "create", "-q", "-f", "vpc", "-o", options, str(image), str(size)])


def qemu_io(image: Path, *commands: str) -> None:
    """Run commands of qemu-io on a VHD, each of which must succeed."""
    words = [word for command in commands for word in ("-c", command)]
    done = run([require_tool("qemu-io"), "-f", "vpc", *words, str(image)])
    if "failed" in done.stdout + done.stderr:
        pytest.fail(f"qemu-io {commands}: {done.stdout}{done.stderr}")


def refusal(command: list[str]) -> str:
    """The message of a program that must fail."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE_SECONDS, check=False)
    assert done.returncode != 0, f"{command} succeeded: {done.stdout}"
    return done.stderr


@contextlib.contextmanager
def held_by_qemu(image: Path, *, writable: bool) -> Iterator[subprocess.Popen[bytes]]:
    """A running qemu-io that has the VHD open; it is ended when the block is left, however that happens."""
    command = [require_tool("qemu-io"), "-f", "vpc", *([] if writable else ["-r"]), str(image)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        try:
            _wait_for(process, b"qemu-io> ")  # the prompt comes once the image is open
            yield process
        finally:
            process.kill()


def tell(process: subprocess.Popen[bytes], command: str) -> str:
    """Send a command to a qemu-io that holds an image; returns its answer."""
    assert process.stdin is not None
    process.stdin.write(command.encode() + b"\n")
    process.stdin.flush()
    return _wait_for(process, b"qemu-io> ")


def _wait_for(process: subprocess.Popen[bytes], prompt: bytes) -> str:
    assert process.stdout is not None
    said, until = b"", time.monotonic() + _PATIENCE_SECONDS
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while not said.endswith(prompt):
            if not selector.select(max(until - time.monotonic(), 0)):
                pytest.fail(f"qemu-io did not answer in {_PATIENCE_SECONDS} s, only {said!r}")
            piece = os.read(process.stdout.fileno(), 4096)
            if not piece:
                pytest.fail(f"qemu-io ended with {said!r}")
            said += piece
    return said.decode(errors="replace")
