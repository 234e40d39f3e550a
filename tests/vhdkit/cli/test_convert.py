# SPDX-License-Identifier: Apache-2.0
"""`vhdkit convert`."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

import vhdkit
from tests.vhdkit.cli.running import (
    COMMAND,
    MIB,
    document,
    failure,
    finish,
    good,
    interrupt,
    make_chain,
    names,
    run,
    start,
    wait_for_part,
    write,
)
from vhdkit.chain.engine.ahead import Ahead

KINDS = ("raw", "fixed", "dynamic")


def content_of(image: str) -> bytes:
    """The whole disk."""
    with vhdkit.open_disk(image) as disk:
        return disk.read(0, disk.size_bytes)


@pytest.mark.parametrize("kind", KINDS)
def test_a_chain_to_every_kind(kind: str) -> None:
    """The result holds the same disk and has the requested kind, and one line reports what was done."""
    content = make_chain()
    text = good("convert", "leaf.avhd", "out.img", "--to", kind)
    assert text.startswith("wrote out.img: ") and text.endswith("/s)\n") and text.count("\n") == 1
    assert document("info", "out.img")["kind"] == kind
    assert content_of("out.img") == content


def test_a_raw_disk_that_ends_inside_a_sector() -> None:
    """Its last sector is filled up with zeros, and a note says so."""
    Path("odd.raw").write_bytes(b"x" * 1000)
    result = run("convert", "odd.raw", "out.vhd", "--to", "dynamic")
    assert "rounded 1000 bytes up to 1024" in result.stderr
    assert content_of("out.vhd") == b"x" * 1000 + bytes(24)
    assert "rounded" not in run("convert", "out.vhd", "again.vhd", "--to", "fixed").stderr


def test_json_and_quiet() -> None:
    """--json prints the same facts as one document; --quiet prints nothing."""
    make_chain()
    result = document("convert", "leaf.avhd", "out.vhd", "--to", "dynamic", "--block-size", "512K")
    assert set(result) == {
        "source", "destination", "format", "virtual_size_bytes", "seconds", "bytes_per_second",
    }  # fmt: skip
    assert result["virtual_size_bytes"] == 8 * MIB
    assert document("info", "out.vhd")["block_size_bytes"] == 512 << 10
    result = run("convert", "leaf.avhd", "q.vhd", "--to", "dynamic", "--quiet", "--no-sync")
    assert (result.exit_code, result.output) == (0, "")


@pytest.mark.parametrize("kind", KINDS)
def test_from_a_pipe(kind: str) -> None:
    """With the source `-`, a raw disk or a fixed VHD is read from standard input."""
    content = make_chain()
    good("convert", "-", "out.img", "--to", kind, stdin=content)
    assert content_of("out.img") == content
    good("convert", "leaf.avhd", "fixed.vhd", "--to", "fixed")
    good("convert", "-", "again.img", "--to", kind, stdin=Path("fixed.vhd").read_bytes())
    assert content_of("again.img") == content


@pytest.mark.parametrize("kind", ["raw", "fixed"])
def test_to_a_pipe(kind: str) -> None:
    """With the destination `-`, standard output receives the disk and nothing else."""
    content = make_chain()
    result = run("convert", "leaf.avhd", "-", "--to", kind)
    assert result.exit_code == 0 and result.stderr == ""
    assert result.stdout_bytes[: len(content)] == content
    assert len(result.stdout_bytes) == len(content) + (512 if kind == "fixed" else 0)
    through = run("convert", "-", "-", "--to", "raw", stdin=result.stdout_bytes)
    assert through.stdout_bytes == content


def test_unsupported_uses_of_a_pipe() -> None:
    """A dynamic VHD is neither written to a pipe nor read from one, and JSON is not mixed with the disk."""
    make_chain()
    failure("convert", "leaf.avhd", "-", "--to", "dynamic", code=2)
    failure("convert", "-", "x.raw", "--to", "raw", code=2, stdin=Path("base.vhd").read_bytes())
    failure("convert", "-", "x.raw", "--to", "raw", code=2, stdin=b"")
    assert run("convert", "leaf.avhd", "-", "--to", "raw", "--json").exit_code == 2
    assert not Path("x.raw").exists()


def test_a_terminal_is_refused(folder: Path) -> None:
    """Standard input or output on a terminal is refused."""
    make_chain()
    master, slave = os.openpty()
    try:
        code, _, errors = finish(start("convert", "leaf.avhd", "-", "--to", "raw", stdout=slave))
        assert code == 2 and "terminal" in errors
        code, _, errors = finish(start("convert", "-", "x.raw", "--to", "raw", stdin=slave))
        assert code == 2 and "terminal" in errors
    finally:
        os.close(master)
        os.close(slave)


def test_options_that_do_not_fit_together() -> None:
    """--to is required, --block-size is for dynamic disks only, and Azure needs a fixed one."""
    make_chain()
    assert "--to" in failure("convert", "leaf.avhd", "x", code=2)
    failure("convert", "leaf.avhd", "x", "--to", "raw", "--block-size", "1M", code=2)
    failure("convert", "leaf.avhd", "x", "--to", "raw", "--azure", code=2)
    failure("convert", "leaf.avhd", "x", "--to", "dynamic", "--block-size", "3M", code=2)
    assert not Path("x").exists()


def test_azure() -> None:
    """--azure makes a fixed VHD of whole MiB and reports the rounding."""
    Path("odd.raw").write_bytes(b"x" * (MIB + 512))
    result = run("convert", "odd.raw", "azure.vhd", "--azure")
    assert result.exit_code == 0 and f"rounded {MIB + 512} bytes up to {2 * MIB}" in result.stderr
    info = document("info", "azure.vhd")
    assert (info["kind"], info["virtual_size_bytes"]) == ("fixed", 2 * MIB)


def test_nothing_is_overwritten() -> None:
    """Without --force no file is replaced; with it no layer of the source, no parent of others, no image in use."""
    make_chain()
    good("create", "other.vhd", "--size", "1M")
    before = {path.name: path.read_bytes() for path in Path().iterdir()}
    failure("convert", "leaf.avhd", "other.vhd", "--to", "raw", code=1)
    for layer in ("leaf.avhd", "middle.avhd", "base.vhd"):
        os.link(layer, f"also-{layer}")
        for name in (layer, f"also-{layer}", f"./{layer}"):
            failure("convert", "leaf.avhd", name, "--to", "raw", "--force", code=2)
        Path(f"also-{layer}").unlink()
    failure("convert", "other.vhd", "base.vhd", "--to", "raw", "--force", code=5)
    failure("convert", "-", "base.vhd", "--to", "raw", "--force", code=5, stdin=b"x" * 512)
    with vhdkit.open_disk("other.vhd", writable=True):
        failure("convert", "leaf.avhd", "other.vhd", "--to", "raw", "--force", code=5)
    assert {path.name: path.read_bytes() for path in Path().iterdir()} == before
    good("convert", "leaf.avhd", "other.vhd", "--to", "raw", "--force", "--format", "vhd")


def test_progress_lines() -> None:
    """--progress works without a terminal."""
    make_chain()
    assert run("convert", "leaf.avhd", "x.raw", "--to", "raw", "--progress").exit_code == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
@pytest.mark.parametrize("kind", ["fixed", "dynamic"])
def test_interrupted_while_reading_a_pipe(number: signal.Signals, code: int, kind: str, folder: Path) -> None:
    """Ctrl-C and SIGTERM end the command at once with their exit codes, and leave no file."""
    process = start("convert", "-", "out.vhd", "--to", kind)
    assert process.stdin is not None
    process.stdin.write(b"x" * (3 * MIB))
    process.stdin.flush()
    if kind == "fixed":  # a dynamic result is kept in a file without a name
        wait_for_part(folder)
    ended = interrupt(process, number)
    assert ended == (code, "", "vhdkit: interrupted\n")
    assert names(folder) == []


@pytest.mark.parametrize("kind", KINDS)
def test_interrupted_while_copying(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while both threads copy: code 130, and no partial file is left."""
    Path("x.raw").write_bytes(os.urandom(24 * MIB))
    calls = 0
    read_into = Ahead.read_into

    def slow(self: Ahead, sector_index: int, buffer: memoryview) -> None:
        nonlocal calls
        calls += 1
        if calls == 5:
            assert [name for name in names(folder) if name.endswith(".part")]
            os.kill(os.getpid(), signal.SIGINT)
        read_into(self, sector_index, buffer)

    monkeypatch.setattr(Ahead, "read_into", slow)
    assert "interrupted" in failure("convert", "x.raw", "out.img", "--to", kind, code=130)
    assert names(folder) == ["x.raw"] and calls < 12


def test_two_concurrent_conversions(folder: Path) -> None:
    """Of two commands that make the same file one succeeds completely, and the other reports that the file exists."""
    processes = [start("convert", "-", "out.raw", "--to", "raw") for _ in range(2)]
    for number, process in enumerate(processes):
        assert process.stdin is not None
        process.stdin.write(bytes([65 + number]) * MIB)
        process.stdin.flush()
    while len(list(folder.glob(".vhdkit-*.part"))) < 2:
        assert all(process.poll() is None for process in processes)
    ended = sorted(finish(process) for process in processes)
    assert [code for code, _, _ in ended] == [0, 1]
    assert "already exists" in ended[1][2] or "File exists" in ended[1][2]
    assert Path("out.raw").read_bytes() in (b"A" * MIB, b"B" * MIB)
    assert names(folder) == ["out.raw"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_limit_on_file_size(kind: str, folder: Path) -> None:
    """If a quota or limit is reached, the command ends with code 7 and leaves no file."""
    Path("x.raw").write_bytes(os.urandom(4 * MIB))
    command = [
        "bash",
        "-c",
        'ulimit -f 1024; exec "$@"',
        "bash",
        *COMMAND,
        "convert",
        "x.raw",
        "out.img",
        "--to",
        kind,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 7 and done.stderr.count("\n") == 1, done.stderr
    assert names(folder) == ["x.raw"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small file system")
@pytest.mark.parametrize("kind", KINDS)
def test_a_full_disk(kind: str, folder: Path) -> None:
    """If the file system is full, the command ends with code 7 and leaves no file."""
    if shutil.which("unshare") is None:
        pytest.skip("needs the command unshare")
    Path("x.raw").write_bytes(os.urandom(4 * MIB))
    Path("small").mkdir()
    script = (
        'mount -t tmpfs -o size=2M tmpfs small || exit 99; "$@"; code=$?; '
        '[ -z "$(ls -A small)" ] || exit 98; exit $code'
    )
    command = ["unshare", "--mount", "bash", "-c", script, "bash", *COMMAND]
    done = subprocess.run(
        [*command, "convert", "x.raw", "small/out.img", "--to", kind], capture_output=True, text=True, check=False
    )
    if done.returncode == 99:
        pytest.skip(f"cannot mount a tmpfs: {done.stderr.strip()}")
    assert done.returncode == 7, done.stderr
    assert "No space left on device" in done.stderr and done.stderr.count("\n") == 1


def test_standard_output_that_is_a_layer_is_refused() -> None:
    """`convert leaf.avhd - >base.vhd` never overwrites the source, in whatever mode the shell opened it."""
    make_chain()
    before = Path("base.vhd").read_bytes()
    with Path("base.vhd").open("r+b") as layer:
        code, _, message = finish(start("convert", "leaf.avhd", "-", "--to", "raw", stdout=layer))
    assert code == 2 and "part of the source" in message
    assert Path("base.vhd").read_bytes() == before


def test_without_standard_error() -> None:
    """If standard error is closed or full, the work is done and failures keep their exit codes."""
    make_chain()
    command = [*COMMAND, "convert", "leaf.avhd", "out.raw", "--to", "raw"]
    subprocess.run(command, check=True, stderr=None, preexec_fn=lambda: os.close(2))
    assert Path("out.raw").stat().st_size == 8 * MIB
    with Path("/dev/full").open("wb") as full:
        Path("cut.vhd").write_bytes(Path("base.vhd").read_bytes()[:-512][600:])
        done = subprocess.run([*COMMAND, "info", "cut.vhd"], check=False, stderr=full)
    assert done.returncode == 3


def test_a_disk_with_large_sectors() -> None:
    """Sectors of 4096 bytes stay in a VHDX, are accepted in a VHD only with the option, and are named for a raw disk;
    what is refused is refused before a byte is written."""
    good("create", "disk.vhdx", "--size", "8M", "--sector-size", "4096")
    content = bytearray(8 * MIB)
    write(content, "disk.vhdx", 3 * MIB, b"data" * 1024)
    for kind in ("fixed", "dynamic"):
        line = failure("convert", "disk.vhdx", "out.img", "--to", kind, code=2)
        assert "4096" in line and "--accept-sector-size" in line and "--to vhdx" in line
        assert not Path("out.img").exists()
    assert "--accept-sector-size" in failure("convert", "disk.vhdx", "-", "--to", "fixed", code=2)
    for kind in ("fixed", "dynamic", "raw"):
        words = [] if kind == "raw" else ["--accept-sector-size"]
        result = run("convert", "disk.vhdx", "out.img", "--to", kind, "--force", *words)
        assert result.exit_code == 0 and "sectors of 4096 bytes" in result.stderr
        assert content_of("out.img") == content
    for kind in ("vhdx", "vhdx-fixed"):
        assert run("convert", "disk.vhdx", "out.vhdx", "--to", kind, "--force").stderr == ""
        assert document("info", "out.vhdx")["logical_sector_bytes"] == 4096 and content_of("out.vhdx") == content
    streamed = run("convert", "disk.vhdx", "-", "--to", "fixed", "--accept-sector-size")
    assert streamed.stdout_bytes[: 8 * MIB] == content


@pytest.mark.parametrize("kind", ["fixed", "dynamic"])
def test_a_disk_that_is_too_large_for_a_vhd(kind: str) -> None:
    """More than 2040 GiB are refused before a byte is written."""
    good("create", "disk.vhdx", "--size", "3T")
    assert "2040 GiB" in failure("convert", "disk.vhdx", "out.vhd", "--to", kind, code=2)
    assert "2040 GiB" in failure("convert", "disk.vhdx", "out.vhd", "--to", kind, "--accept-sector-size", code=2)
    assert names(Path()) == ["disk.vhdx"]


@pytest.mark.parametrize("kind", ["vhdx", "vhdx-fixed", "dynamic"])
def test_only_raw_disks_and_fixed_vhds_are_streamed(kind: str) -> None:
    """Others can be made from a pipe and not written to one, and the message says which can."""
    make_chain()
    line = failure("convert", "leaf.avhd", "-", "--to", kind, code=2)
    assert "only a raw image or a fixed VHD" in line and "--to raw or --to fixed" in line


def test_chains_between_all_formats() -> None:
    """The disk of a chain stays the same through every format and back."""
    content = make_chain()
    source = "leaf.avhd"
    for number, kind in enumerate(("vhdx", "dynamic", "raw", "vhdx-fixed", "fixed", "vhdx", "raw")):
        suffix = "vhdx" if "vhdx" in kind else "raw" if kind == "raw" else "vhd"
        target = f"{number}.{suffix}"
        good("convert", source, target, "--to", kind)
        assert content_of(target) == content
        good("check", target)
        source = target
