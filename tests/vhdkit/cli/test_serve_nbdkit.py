# SPDX-License-Identifier: Apache-2.0
"""`serve --engine nbdkit` as a process: the same sockets, signals and names, nbdkit's arguments, and refusals."""

from __future__ import annotations

import os
import signal
import stat
import sys
from pathlib import Path

import pytest

import vhdkit
from tests.servers import read_ready, serving, start_server
from tests.support import require_nbdkit, require_tool
from tests.support import run as run_tool
from tests.vhdkit.cli.running import failure, finish, good, make_chain, names, start
from vhdkit.cli.serve_nbdkit import find_nbdkit

ENGINE = ("--engine", "nbdkit")


@pytest.fixture
def nbdkit() -> str:
    """The real nbdkit."""
    return require_nbdkit()


def fake_nbdkit(folder: Path, script: str) -> dict[str, str]:
    """An environment in which this shell script takes the place of nbdkit."""
    program = folder / "bin" / "nbdkit"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return {"PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}"}


@pytest.mark.interop
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serves_until_a_signal(nbdkit: str, number: int, folder: Path) -> None:
    """A chain is served completely; a signal ends nbdkit with 0; the socket is private and removed at the end."""
    require_tool("nbdcopy")
    content = make_chain()
    before = names(folder)
    with serving("leaf.avhd", "--socket", "a b.sock", "--pid-file", "pid", *ENGINE) as server:
        assert stat.S_IMODE(os.stat("a b.sock").st_mode) == 0o600
        assert Path("pid").read_text() == f"{server.process.pid}\n"
        assert server.ready["exports"][0]["name"] == "leaf.avhd"
        with pytest.raises(vhdkit.ImageInUse):
            vhdkit.open_disk("leaf.avhd")
        run_tool(["nbdcopy", server.uri, "copy.raw"])
        Path("put.raw").write_bytes(b"new" * 1000)
        run_tool(["nbdcopy", "put.raw", server.uri])
        assert server.stop(number) == (0, "")
    assert Path("copy.raw").read_bytes() == content
    with vhdkit.open_disk("leaf.avhd") as disk:
        assert disk.read(0, 3000) == b"new" * 1000
    Path("copy.raw").unlink()
    Path("put.raw").unlink()
    assert names(folder) == before


@pytest.mark.interop
def test_arguments_for_nbdkit(nbdkit: str) -> None:
    """Arguments after "--" reach nbdkit: options and a filter's settings. With cow the image is only read."""
    require_tool("nbdinfo")
    good("create", "a.vhd", "--size", "4M")
    before = Path("a.vhd").read_bytes()
    words = ("--filter=cow", "--filter", "truncate", "truncate=1M")
    process = start("serve", "a.vhd", *ENGINE, "--", *words)
    assert process.stdout is not None
    uri = process.stdout.readline().decode().strip()
    assert run_tool(["nbdinfo", "--size", uri]).stdout.strip() == str(1 << 20)
    good("compare", "a.vhd", "a.vhd")  # readers are accepted
    process.terminate()
    assert finish(process) == (0, "", "")
    assert Path("a.vhd").read_bytes() == before


@pytest.mark.interop
def test_overlay_read_only_and_exit_last(nbdkit: str) -> None:
    """`--overlay`, `--read-only` and `--exit-last` work as with our own engine; several exports, too."""
    require_tool("nbdcopy")
    good("create", "a.vhd", "--size", "1M")
    good("create", "b.vhd", "--size", "2M")
    before = Path("a.vhd").read_bytes()
    Path("put.raw").write_bytes(b"x" * 4096)
    with serving("a.vhd", "--export", "b=b.vhd", "--overlay", "--exit-last", *ENGINE) as server:
        assert [row["read_only"] for row in server.ready["exports"]] == [False, False]
        run_tool(["nbdcopy", "put.raw", server.uri])
        assert server.wait() == (0, "")
    assert Path("a.vhd").read_bytes() == before
    with serving("a.vhd", "b.vhd", "--read-only", "--listen", "localhost:0", *ENGINE) as server:
        assert [row["read_only"] for row in server.ready["exports"]] == [True, True]
        done = run_tool(["nbdinfo", "--is", "read-only", server.ready["exports"][1]["uri"]])
        assert done.returncode == 0
        assert server.stop() == (0, "")


@pytest.mark.interop
def test_killed(nbdkit: str) -> None:
    """nbdkit does not outlive us; if it dies, we report it and end with 1."""
    good("create", "a.vhd", "--size", "1M")
    process = start_server("a.vhd", *ENGINE)
    read_ready(process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 1
    os.kill(int(children[0]), signal.SIGKILL)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 1 and "nbdkit was ended by SIGKILL" in said


@pytest.mark.interop
def test_invalid_arguments(nbdkit: str, folder: Path) -> None:
    """We report what is wrong with an image, nbdkit what is wrong with a filter; no socket is left."""
    assert "gone.vhd" in failure("serve", "gone.vhd", *ENGINE, code=1)
    good("create", "a.vhd", "--size", "1M")
    good("create", "child.avhd", "--parent", "a.vhd")
    before = names(folder)
    assert "child.avhd" in failure("serve", "a.vhd", *ENGINE, code=5)
    code, _, said = finish(start("serve", "child.avhd", "--socket", "s", *ENGINE, "--", "--filter=none-such"))
    assert code == 1 and "none-such" in said and "nbdkit ended with exit code 1" in said and "Traceback" not in said
    assert names(folder) == before


def test_options_that_nbdkit_does_not_support() -> None:
    """Options that only our own engine supports are refused by name."""
    good("create", "a.vhd", "--size", "1M")
    assert "--control" in failure("serve", "a.vhd", "--control", "c", *ENGINE, code=2)


def test_another_minor_version(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An nbdkit for another version of Python is refused, with both versions and what to do."""
    good("create", "a.vhd", "--size", "1M")
    other = f"{sys.version_info[0]}.{sys.version_info[1] + 1}"
    environment = fake_nbdkit(folder, f"echo name=python; echo python_version={other}.2")
    monkeypatch.setenv("PATH", environment["PATH"])
    text = failure("serve", "a.vhd", *ENGINE, code=2)
    assert f"built for Python {other}, this is Python {sys.version_info[0]}.{sys.version_info[1]}" in text


def test_not_installed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without nbdkit, or without its python plugin, the packages are named."""
    good("create", "a.vhd", "--size", "1M")
    monkeypatch.setenv("PATH", str(folder))
    assert "nbdkit-plugin-python" in failure("serve", "a.vhd", *ENGINE, code=1)
    environment = fake_nbdkit(folder, "echo 'nbdkit: error: cannot open plugin' >&2; exit 1")
    monkeypatch.setenv("PATH", environment["PATH"])
    assert "its python plugin is not installed" in failure("serve", "a.vhd", *ENGINE, code=1)


def test_the_first_nbdkit_of_the_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The nbdkit that a shell would start is used."""
    version = f"{sys.version_info[0]}.{sys.version_info[1]}.0"
    monkeypatch.setenv("PATH", fake_nbdkit(folder, f"echo python_version={version}")["PATH"])
    assert find_nbdkit() == str(folder / "bin" / "nbdkit")


def test_names_that_start_with_a_dash() -> None:
    """With our own engine "--" still ends the options."""
    assert "-x.vhd" in failure("serve", "--", "-x.vhd", code=1)
