# SPDX-License-Identifier: Apache-2.0
"""`serve` as a process: readiness, signals, sockets, what remains afterwards, and wrong command lines."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import vhdkit
from tests.servers import SECONDS, read_ready, serving, start_server
from tests.support import require_nbdkit, require_tool
from tests.support import run as run_tool
from tests.vhdkit.cli.running import failure, finish, good, make_chain, names, start


def digest(path: str) -> str:
    """A digest of a file's bytes."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def copied(uri: str) -> bytes:
    """The whole export, read by nbdcopy."""
    run_tool([require_tool("nbdcopy"), uri, "copy.raw"])
    return Path("copy.raw").read_bytes()


def put(uri: str, data: bytes) -> None:
    """Write to the start of the export, and flush."""
    Path("put.raw").write_bytes(data)
    run_tool([require_tool("nbdcopy"), "--flush", "put.raw", uri])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_serves_until_a_signal(number: int, folder: Path) -> None:
    """A chain is served completely; a signal ends the server with 0, and only the images remain."""
    content = make_chain()
    before = names(folder)
    with serving("leaf.avhd", "--socket", "a b.sock", "--pid-file", "pid") as server:
        assert Path("pid").read_text() == f"{server.process.pid}\n"
        assert stat.S_IMODE(os.stat("a b.sock").st_mode) == 0o600
        assert server.ready["exports"][0]["path"] == "leaf.avhd"
        assert copied(server.uri) == content
        assert server.stop(number) == (0, "")
    Path("copy.raw").unlink()
    assert names(folder) == before
    good("check", "leaf.avhd")


def test_the_address_on_standard_output() -> None:
    """Without --json the address is one line for every transport, and the private folder is removed at the end."""
    good("create", "a.vhd", "--size", "1M")
    process = start("serve", "a.vhd", "--listen", "localhost:0")
    assert process.stdout is not None
    assert process.stdout.readline().startswith(b"nbd://localhost:")
    process.terminate()
    assert finish(process) == (0, "", "")
    process = start("serve", "a.vhd")
    assert process.stdout is not None
    uri = process.stdout.readline().decode().strip()
    path = Path(uri.partition("socket=")[2])
    assert path.is_socket()
    process.terminate()
    assert finish(process) == (0, "", "")
    assert not path.parent.exists()


def test_several_exports() -> None:
    """Each image is served under its file name or a given name; the first is the default."""
    for name, size in (("a.vhd", "1M"), ("b.vhd", "2M"), ("c.vhd", "3M")):
        good("create", name, "--size", size)
    with serving("a.vhd", "b.vhd", "--export", "see/me=c.vhd", "--socket", "s") as server:
        assert [row["name"] for row in server.ready["exports"]] == ["a.vhd", "b.vhd", "see/me"]
        sizes = [run_tool([require_tool("nbdinfo"), "--size", uri]).stdout.strip() for uri in server.ready["uris"]]
        assert sizes == ["1048576", "2097152", "3145728"]
        default = run_tool([require_tool("nbdinfo"), "--size", f"nbd+unix:///?socket={Path('s').absolute()}"]).stdout
        assert default.strip() == "1048576"
        listed = run_tool([require_tool("nbdinfo"), "--list", server.uri]).stdout
        assert "dynamic VHD, 2.0 MiB, b.vhd" in listed


@pytest.mark.parametrize("engine", [(), ("--engine", "nbdkit")], ids=["builtin", "nbdkit"])
def test_descriptions(engine: tuple[str, ...]) -> None:
    """Clients that list the exports see the given descriptions, also after a live snapshot."""
    if engine:
        require_nbdkit()
    good("create", "a.vhd", "--size", "1M")
    control = () if engine else ("--control", "c")
    with serving("a.vhd", "--description", "Büro, 2nd floor", "--socket", "s", *control, *engine) as server:
        if control:
            assert server.ready["exports"][0]["description"] == "Büro, 2nd floor"
            good("ctl", "c", "snapshot")
            good("create", "b.vhd", "--size", "1M")
            assert "of Tuesday" in good("ctl", "c", "add", "b=b.vhd", "--description", "of Tuesday")
        listed = json.loads(run_tool([require_tool("nbdinfo"), "--json", "--list", server.uri]).stdout)["exports"]
        assert [one["description"] for one in listed] == ["Büro, 2nd floor", *(["of Tuesday"] if control else [])]


def test_overlay_leaves_the_images_unchanged() -> None:
    """With --overlay clients can write, the chain's files stay unchanged, and several servers may do so at once."""
    content = make_chain()
    before = {name: digest(name) for name in ("base.vhd", "middle.avhd", "leaf.avhd")}
    with serving("leaf.avhd", "--overlay", "--socket", "a") as server, serving("leaf.avhd", "--overlay") as other:
        put(server.uri, bytes(len(content)))
        assert copied(server.uri) == bytes(len(content))
        assert copied(other.uri) == content
        assert server.stop() == (0, "")
    assert {name: digest(name) for name in before} == before


def test_keep_overlay() -> None:
    """With --keep-overlay the changes are a child of the image; it is valid after kill -9, too, and never replaced."""
    content = make_chain()
    before = digest("leaf.avhd")
    Path("elsewhere").mkdir()
    for number, kept in enumerate(("kept.avhd", "elsewhere/kept.avhd")):
        with serving("leaf.avhd", "--overlay", "--keep-overlay", kept, "--socket", "s") as server:
            assert server.ready["exports"][0]["name"] == "leaf.avhd"
            put(server.uri, content[::-1])
            if number:
                server.process.kill()
            else:
                assert server.stop() == (0, "")
        with vhdkit.open_disk(kept, options=vhdkit.OpenOptions(parent_dirs=(".",))) as disk:
            assert disk.read(0, disk.size_bytes) == content[::-1]
        assert digest("leaf.avhd") == before
        assert "already exists" in failure("serve", "leaf.avhd", "--overlay", "--keep-overlay", kept, code=1)
    failure("serve", "leaf.avhd", "--overlay", "--keep-overlay", "new.avhd", "--socket", "no/s", code=1)
    assert not Path("new.avhd").exists()


def test_a_killed_overlay_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """After kill -9 no trace of a temporary overlay is left."""
    make_chain()
    Path("tmp").mkdir()
    with serving("leaf.avhd", "--overlay", "--socket", "s", env={"TMPDIR": str(Path("tmp").absolute())}) as server:
        put(server.uri, b"x" * 4096)
        server.process.kill()
        server.wait()
    assert not list(Path("tmp").iterdir())


def test_written_data_is_on_the_disk_afterwards() -> None:
    """What a client wrote is on the disk when the server has ended."""
    content = make_chain()
    with serving("leaf.avhd") as server:
        put(server.uri, content[::-1])
        assert server.stop()[0] == 0
    with vhdkit.open_disk("leaf.avhd") as disk:
        assert disk.read(0, disk.size_bytes) == content[::-1]


def test_two_servers_for_one_image() -> None:
    """An image in use is refused with code 5; readers can share it."""
    good("create", "a.vhd", "--size", "1M")
    with serving("a.vhd"):
        assert "a.vhd: another program" in failure("serve", "a.vhd", code=5)
        assert "a.vhd: another program" in failure("serve", "a.vhd", "--read-only", code=5)
    with serving("a.vhd", "--read-only"), serving("a.vhd", "--read-only"):
        assert "another program" in failure("serve", "a.vhd", code=5)


def test_killed_and_started_again() -> None:
    """After kill -9 the same command line replaces the stale socket and pid file and starts again."""
    good("create", "a.vhd", "--size", "1M")
    words = ("a.vhd", "--socket", "s", "--pid-file", "pid")
    with serving(*words) as server:
        server.process.kill()
        server.wait()
        assert Path("s").exists() and Path("pid").exists()
        with serving(*words) as again:
            assert Path("pid").read_text() == f"{again.process.pid}\n"
            good("create", "b.vhd", "--size", "1M")
            assert "another program is listening" in failure("serve", "b.vhd", "--socket", "s", code=5)
            assert again.stop() == (0, "")


def test_exit_last() -> None:
    """With --exit-last the server ends when its last client disconnects."""
    make_chain()
    with serving("leaf.avhd", "--read-only", "--exit-last") as server:
        run_tool([require_tool("nbdinfo"), "--size", server.uri])
        assert server.wait() == (0, "")


def test_socket_activation(tmp_path: Path) -> None:
    """`nbdcopy -- [ vhdkit serve IMAGE ]`: the socket is passed, nothing is printed, and the copy is complete."""
    content = make_chain()
    command = ["[", os.path.join(os.path.dirname(sys.executable), "vhdkit"), "serve", "leaf.avhd", "]"]
    run_tool([require_tool("nbdcopy"), "--", *command, "copy.raw"])
    assert Path("copy.raw").read_bytes() == content
    assert failure("serve", "gone.vhd", code=1)


def test_a_passed_descriptor_that_is_not_a_socket() -> None:
    """LISTEN_FDS with a descriptor that does not listen is refused in one line."""
    good("create", "a.vhd", "--size", "1M")
    program = (
        "import os, sys; os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='1');"
        " os.dup2(os.open('/dev/null', 0), 3, inheritable=True);"
        " os.execv(sys.executable, [sys.executable, '-m', 'vhdkit', 'serve', 'a.vhd'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "descriptor 3" in done.stderr


def test_the_service_manager_is_notified() -> None:
    """READY=1 is sent when clients can connect, STOPPING=1 when the server ends."""
    good("create", "a.vhd", "--size", "1M")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("notify.sock")
        manager.settimeout(SECONDS)
        process = start_server("a.vhd", env={"NOTIFY_SOCKET": str(Path("notify.sock").absolute())})
        try:
            read_ready(process)
            assert manager.recv(100) == b"READY=1"
            process.terminate()
            assert manager.recv(100) == b"STOPPING=1"
            process.communicate(timeout=SECONDS)
            assert process.returncode == 0
        finally:
            process.kill()
            process.communicate()


def test_follow_leaf() -> None:
    """--follow-leaf serves the newest image built on the one named; if there are two, both are named."""
    make_chain()
    assert "is the parent of" in failure("serve", "base.vhd", code=5)
    with serving("base.vhd", "--follow-leaf") as server:
        assert server.ready["exports"][0]["path"].endswith("/leaf.avhd")
        assert server.ready["exports"][0]["name"] == "base.vhd"
    good("create", "second.avhd", "--parent", "middle.avhd")
    line = failure("serve", "base.vhd", "--follow-leaf", code=5)
    assert "leaf.avhd" in line and "second.avhd" in line


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        ([], 2, "give an IMAGE"),
        (["gone.vhd"], 1, "gone.vhd"),
        (["a.vhd", "--socket", "no/where.sock"], 1, "no/where.sock"),
        (["a.vhd", "--socket", "x" * 200], 2, "107"),
        (["a.vhd", "--socket", "a.vhd"], 1, "not a socket"),
        (["a.vhd", "--listen", "::1"], 2, "brackets"),
        (["a.vhd", "--listen", "0.0.0.0:0"], 2, "--insecure"),
        (["a.vhd", "a.vhd"], 5, "twice"),
        (["a.vhd", "--export", "a.vhd=b.vhd"], 2, "two exports"),
        (["--export", "a.vhd"], 2, "NAME=IMAGE"),
        (["a.vhd", "b.vhd", "--description", "x"], 2, "one image"),
        (["a.vhd", "--description", "x" * 4097], 2, "4096 bytes"),
        (["a.vhd", "--overlay", "--read-only"], 2, "--read-only"),
        (["a.vhd", "--socket-owner", "no-such-user-x"], 2, "no-such-user-x"),
        (["a.vhd", "--control", "c", "--control-owner", "no-such-user-x"], 2, "no-such-user-x"),
        (["a.vhd", "--control-owner", "root"], 2, "--control"),
        (["a.vhd", "--control", "c", "--control-dir", "."], 2, "--control-owner"),
        (["a.vhd", "--control", "no/where.ctl"], 1, "no/where.ctl"),
        (["a.vhd", "--keep-overlay", "x.avhd"], 2, "--overlay"),
        (["a.vhd", "b.vhd", "--overlay", "--keep-overlay", "x.avhd"], 2, "one image"),
        (["a.vhd", "--overlay", "--keep-overlay", "b.vhd"], 1, "already exists"),
        (["a.vhd", "--overlay", "--keep-overlay", "x.avhdx"], 2, "whose children are VHDs"),
        (["a.vhd", "--remember", "no/where"], 1, "no such folder"),
        (["a.vhd", "--tls-required"], 2, "--tls-certs"),
        (["a.vhd", "--tls-certs", "nowhere"], 1, "server-cert.pem"),
        (["a.vhd", "--tls-certs", ".", "--tls-psk", "k"], 2, "cannot be combined"),
        (["a.vhd", "--pid-file", "."], 2, "folder"),
        (["a.vhd", "--pid-file", "a.vhd"], 1, "not a pid file"),
        (["a.vhd", "--pid-file", "b.vhd"], 1, "not a pid file"),
        (["a.vhd", "--engine", "steam"], 2, "steam"),
        (["a.vhd", "--cache", "some"], 2, "'writeback', 'none'"),
        (["--exports", "a.vhd", "--cache", "none"], 2, "--cache"),
    ],
)
def test_wrong_command_lines(words: list[str], code: int, text: str, folder: Path) -> None:
    """Each ends with one line that names what is wrong, and leaves no file."""
    for name in ("a.vhd", "b.vhd"):
        good("create", name, "--size", "1M")
    before = names(folder)
    assert text in failure("serve", *words, code=code)
    assert names(folder) == before


def openings(pid: int, name: str) -> int:
    """How many descriptors a process has of a file: a second one if it keeps it out of the page cache."""
    links = [os.readlink(one) for one in Path(f"/proc/{pid}/fd").iterdir()]
    return links.count(str(Path(name).absolute()))


def test_the_cache_of_an_export() -> None:
    """`--cache none` and `ctl add --cache none` apply to all files of a chain, also to those made while it is served,
    and are shown; an export without them is cached as usual.
    """
    make_chain()
    good("create", "a.vhd", "--size", "1M")
    good("create", "b.vhd", "--size", "1M")
    Path("list").write_text(
        json.dumps([{"name": "a", "path": "a.vhd", "cache": "none"}, {"name": "b", "path": "b.vhd"}])
    )
    with serving("leaf.avhd", "--cache", "none", "--socket", "s", "--control", "c") as server:
        assert server.ready["exports"][0]["cache"] == "none"
        assert "leaf.avhd  8.0 MiB, writable, not cached" in good("ctl", "c", "status")
        good("ctl", "c", "snapshot", "leaf.avhd=new.avhd")
        put(server.uri, b"x" * 4096)
        files = ("new.avhd", "leaf.avhd", "base.vhd")
        assert [openings(server.process.pid, name) for name in files] == [2, 2, 2]
        good("ctl", "c", "merge", "leaf.avhd")
        assert [openings(server.process.pid, name) for name in files] == [0, 2, 2]
        good("ctl", "c", "add", "a=a.vhd", "--cache", "none")
        good("ctl", "c", "add", "b=b.vhd")
        assert [openings(server.process.pid, name) for name in ("a.vhd", "b.vhd")] == [2, 1]
        found = json.loads(good("ctl", "c", "status", "--json"))["exports"]
        assert [(one["name"], one["cache"]) for one in found] == [
            ("leaf.avhd", "none"), ("a", "none"), ("b", "writeback"),
        ]  # fmt: skip
        assert copied(server.uri)[:4096] == b"x" * 4096
    with serving("--exports", "list", "--socket", "s") as server:
        assert [openings(server.process.pid, name) for name in ("a.vhd", "b.vhd")] == [2, 1]
    Path("list").write_text(json.dumps([{"name": "a", "path": "a.vhd", "cache": "all"}]))
    assert "the cache of an export must be one of writeback, none" in failure("serve", "--exports", "list", code=2)


def test_change_tracking_beside_an_image() -> None:
    """Serving an image for writing beside Hyper-V's files warns once; serving it read-only does not."""
    good("create", "disk.vhdx", "--size", "4M")
    Path("disk.vhdx.rct").touch()
    for words, lines in (([], 1), (["--read-only"], 0), (["--overlay"], 0)):
        process = start_server("disk.vhdx", "--socket", "s", *words)
        try:
            read_ready(process)
            process.terminate()
            _, found = process.communicate(timeout=SECONDS)
        finally:
            process.kill()
            process.communicate()
        assert found.count("vhdkit: warning: ") == found.count("disk.vhdx.rct") == len(found.splitlines()) == lines
