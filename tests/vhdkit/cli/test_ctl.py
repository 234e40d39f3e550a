# SPDX-License-Identifier: Apache-2.0
"""`ctl` talking to a server process."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

import vhdkit
from tests.servers import Server, serving
from tests.support import require_tool
from tests.vhdkit.cli.running import document, failure, finish, good, make_chain, names, start
from tests.waiting import wait_until

MIB = 1 << 20


VERBS = "status snapshot merge cancel resize set-read-only add remove disconnect shutdown"


def content(path: str) -> bytes:
    """The whole disk."""
    with vhdkit.open_disk(path) as disk:
        return disk.read(0, 8 * MIB)


@pytest.mark.parametrize("verb", VERBS.split())
def test_every_verb_has_help(verb: str) -> None:
    """Each verb has a description, and --json."""
    assert "--json" in good("ctl", "x", verb, "--help") and verb in good("ctl", "--help")


def test_session(folder: Path) -> None:
    """Status, snapshot with the default and a given name, read-only, disconnect, shutdown; as text and as JSON."""
    make_chain()
    good("create", "other.vhd", "--size", "1M")
    with serving("leaf.avhd", "other.vhd", "--socket", "s", "--control", "c") as server:
        assert stat.S_IMODE(os.stat("c").st_mode) == 0o600 and server.ready["control"] == "c"
        text = good("ctl", "c", "status")
        assert "leaf.avhd  8.0 MiB, writable" in text and "base.vhd" in text
        assert good("ctl", "c", "snapshot", "leaf.avhd") == ("leaf.avhd: froze leaf.avhd, continues in leaf-1.avhd\n")
        rows = document("ctl", "c", "snapshot", "leaf.avhd=x y.avhd", "other.vhd")["snapshots"]
        assert [row["leaf"] for row in rows] == [str(folder / "x y.avhd"), "other.avhd"]
        assert "already exists" in failure("ctl", "c", "snapshot", "leaf.avhd=x y.avhd", code=1)
        assert "no export is named 'nope'" in failure("ctl", "c", "snapshot", "nope", code=1)
        assert "other.vhd: 1.0 MiB -> 3.0 MiB" in good("ctl", "c", "resize", "other.vhd", "3M")
        assert "add --shrink" in failure("ctl", "c", "resize", "other.vhd", "2M", code=2)
        assert "-> 2.0 MiB" in good("ctl", "c", "resize", "other.vhd", "2M", "--shrink")
        assert "smaller than its parent" in failure("ctl", "c", "resize", "leaf.avhd", "1M", code=2)
        assert "leaf.avhd is read-only" in good("ctl", "c", "set-read-only", "--export", "leaf.avhd")
        assert "leaf.avhd is writable again" in good("ctl", "c", "set-read-only", "--export", "leaf.avhd", "--off")
        assert good("ctl", "c", "disconnect", "--export", "leaf.avhd") == "disconnected 0 clients\n"
        assert "no client has the number 9" in failure("ctl", "c", "disconnect", "--client", "9", code=1)
        assert good("ctl", "c", "shutdown", "--quiet") == ""
        assert server.wait() == (0, "")
    assert "c" not in names(folder) and "s" not in names(folder)
    line = failure("ctl", "c", "status", code=1)
    assert "no server is listening" in line
    with serving("leaf.avhd", "--follow-leaf") as server:
        assert server.ready["exports"][0]["path"].endswith("/x y.avhd")


@pytest.mark.parametrize(
    "words",
    [
        ["snapshot", "a="],
        ["snapshot", "a", "a=x"],
        ["resize", "a"],
        ["resize", "a", "x"],
        ["disconnect"],
        ["disconnect", "--client", "x"],
        ["nope"],
        [],
    ],
)
def test_invalid_arguments(words: list[str]) -> None:
    """A wrong command line ends with code 2 and one line before a server is contacted."""
    if words:
        failure("ctl", "c", *words, code=2)


def fio(server: Server, seconds: int) -> subprocess.Popen[str]:
    """A client that writes at random and verifies what it wrote."""
    command = [
        require_tool("fio"), "--name=live", "--thread", "--ioengine=nbd", f"--uri={server.uri}", "--rw=randwrite",
        "--size=6m", "--bsrange=512-64k", "--iodepth=8", "--time_based", f"--runtime={seconds}", "--rate=4m,4m",
        "--fsync=50", "--verify=crc32c", "--verify_fatal=1", "--verify_backlog=32", "--verify_state_save=0",
    ]  # fmt: skip
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_snapshots_while_fio_writes() -> None:
    """INV-LIVE-PRESERVES: fio writes and verifies across three snapshots and finds every byte; the chain is sound."""
    make_chain()
    with serving("leaf.avhd", "--control", "c") as server:
        writer = fio(server, 3)
        try:
            for _ in range(3):
                time.sleep(0.6)  # fio writes meanwhile
                good("ctl", "c", "snapshot")
            output, _ = writer.communicate(timeout=60)
        finally:
            writer.kill()
            writer.communicate()
        assert writer.returncode == 0 and "err= 0" in output, output
        subprocess.run([require_tool("nbdcopy"), server.uri, "served.raw"], check=True, timeout=60)
        assert server.stop() == (0, "")
    with vhdkit.open_disk("leaf-3.avhd", writable=True) as disk:
        assert disk.read(0, disk.size_bytes) == Path("served.raw").read_bytes()
        assert len(disk.chain.layers) == 6
    good("check", "leaf-3.avhd")


def test_exports_are_added_and_removed(folder: Path) -> None:
    """A server that started with an empty list adds an image under its name and mode, serves it, and removes it."""
    make_chain()
    Path("list").write_text("[]")
    with serving("--exports", "list", "--socket", "s", "--control", "c"):
        assert document("ctl", "c", "status")["exports"] == []
        assert "8.0 MiB" in good("ctl", "c", "add", "system=leaf.avhd", "--read-only")
        [export] = document("ctl", "c", "status")["exports"]
        assert (export["name"], export["read_only"]) == ("system", True)
        assert "already served as 'system'" in failure("ctl", "c", "add", "again=leaf.avhd", code=5)
        assert "already" in failure("ctl", "c", "add", "system=base.vhd", "--read-only", code=2)
        assert "NAME=IMAGE" in failure("ctl", "c", "add", "leaf.avhd", code=2)
        assert "no" in failure("ctl", "c", "add", "x=absent.vhd", code=1)
        assert good("ctl", "c", "remove", "system", "--disconnect") == "system is no longer served\n"
        good("create", "disk.vhdx", "--size", "10M")
        assert "10.0 MiB" in good("ctl", "c", "add", "large=disk.vhdx", "--format", "vhdx")
        assert "no export" in failure("ctl", "c", "remove", "system", code=1)
        good("check", "leaf.avhd")


def test_an_empty_server_reports_that_it_is_ready(folder: Path) -> None:
    """As it has no export whose address it could print, the line says where clients and commands connect."""
    Path("list").write_text("[]")
    process = start("serve", "--exports", "list", "--socket", "s", "--control", "my c")
    assert process.stdout is not None
    line = process.stdout.readline().decode()
    assert line.startswith("ready at nbd+unix:///?socket=") and line.endswith("vhdkit ctl 'my c' add NAME=IMAGE\n")
    process.terminate()
    assert finish(process) == (0, "", "")
    with serving("--exports", "list", "--socket", "s", "--control", "c") as server:
        assert server.ready["addresses"] == [f"nbd+unix:///?socket={folder}/s"]


def test_exports_from_a_file(folder: Path) -> None:
    """Each entry of the list is opened in its own mode."""
    make_chain()
    good("create", "other.vhd", "--size", "1M")
    entries = [{"name": "a", "path": "leaf.avhd"}, {"name": "b", "path": "other.vhd", "read_only": True}]
    Path("list").write_text(json.dumps(entries))
    with serving("--exports", "list") as server:
        assert [(row["name"], row["read_only"]) for row in server.ready["exports"]] == [("a", False), ("b", True)]


@pytest.mark.parametrize(
    "text",
    ["", "{", "{}", "[5]", '[{"name": "a"}]', '[{"name": 1, "path": "x"}]', '[{"name": "a", "path": "x", "y": 1}]',
     '[{"name": "a", "path": ""}]', '[{"name": "a", "path": "x", "format": "qcow2"}]',
     '[{"name": "a", "path": "x", "parent_dirs": [1]}]', '[{"name": "a", "path": "x", "sector_bytes": 520}]',
     "[" * 100000, "[]"],
)  # fmt: skip
def test_bad_lists_of_exports(folder: Path, text: str) -> None:
    """An invalid list is reported in one clear line; so is an empty one if nothing could be added to it."""
    Path("list").write_text(text)
    failure("serve", "--exports", "list", code=2)
    failure("serve", "--exports", "list", "--read-only", code=2)


def test_an_export_with_other_sectors_is_refused() -> None:
    """If the list says which sector size clients expect, an image with another one is not served."""
    good("create", "disk.vhdx", "--size", "8M", "--sector-size", "4096")
    for sector_bytes, code in ((4096, 0), (512, 2)):
        Path("list").write_text(json.dumps([{"name": "a", "path": "disk.vhdx", "sector_bytes": sector_bytes}]))
        if code:
            line = failure("serve", "--exports", "list", code=code)
            assert line.startswith("disk.vhdx: has sectors of 4096 bytes, and not of 512 as recorded")
        else:
            with serving("--exports", "list") as server:
                assert server.ready["exports"][0]["name"] == "a"


def test_merging_while_serving(folder: Path) -> None:
    """Layers below the leaf, then the leaf itself, are merged into an ancestor; text, JSON, progress, refusals."""
    make_chain()
    before = content("leaf.avhd")
    with serving("leaf.avhd", "--socket", "s", "--control", "c"):
        for _ in range(2):
            good("ctl", "c", "snapshot")
        line = good(
            "ctl", "c", "merge", "leaf.avhd", "--layer", "leaf-1.avhd", "--into", "leaf.avhd", "--max-rate", "9G"
        )
        assert line.startswith("leaf.avhd: merged 1 layer into leaf.avhd, 0 B in 1 pass; clients waited ")
        assert "leaf-1.avhd" not in names(folder)
        assert good("ctl", "c", "cancel") == "nothing is being merged or filled\n"
        assert "is not a layer of export" in failure("ctl", "c", "merge", "leaf.avhd", "--into", "other.vhd", code=2)
        done = document("ctl", "c", "merge", "leaf.avhd", "--into", "base.vhd")
        assert done["leaf"].endswith("base.vhd") and len(done["merged"]) == 3 and done["held_seconds"] < 30
        assert [name for name in names(folder) if name.endswith("vhd")] == ["base.vhd"]
        assert "has no parent" in failure("ctl", "c", "merge", "leaf.avhd", code=2)
    assert content("base.vhd") == before


def test_filling_while_serving(folder: Path) -> None:
    """A layer below the leaf, then the leaf, are filled and made independent; text, JSON, refusals."""
    make_chain()
    before = content("leaf.avhd")
    with serving("leaf.avhd", "--socket", "s", "--control", "c"):
        good("ctl", "c", "snapshot")
        line = good("ctl", "c", "pull", "leaf.avhd", "--layer", "leaf.avhd", "--to", "middle.avhd", "--relink")
        assert line.startswith("leaf.avhd: copied ") and " from 1 layer into " in line and "base.vhd; clients" in line
        done = document("ctl", "c", "pull", "leaf.avhd", "--independent", "--max-rate", "9G")
        assert done["layer"].endswith("leaf-1.avhd") and done["parent"] is None and len(done["pulled"]) == 2
        assert "has no parent" in failure("ctl", "c", "pull", "leaf.avhd", code=2)
    for name in ("leaf.avhd", "middle.avhd", "base.vhd"):
        Path(name).unlink()
    assert content("leaf-1.avhd") == before and "dynamic" in good("info", "leaf-1.avhd")


def test_a_signal_cancels_a_merge(folder: Path) -> None:
    """Ctrl-C and SIGTERM cancel a slow merge in the server, too; the export reads as before."""
    make_chain()
    with vhdkit.open_disk("leaf.avhd", writable=True) as disk:
        disk.write(0, os.urandom(4 * MIB))
    before = content("leaf.avhd")
    with serving("leaf.avhd", "--socket", "s", "--control", "c"):
        good("ctl", "c", "snapshot")
        words = ["ctl", "c", "merge", "leaf.avhd", "--layer", "leaf.avhd", "--max-rate", "1", "--progress"]
        with start(*words) as merging:

            def has_copied() -> bool:
                assert merging.poll() is None
                return bool((document("ctl", "c", "status")["exports"][0]["merge"] or {}).get("done_bytes"))

            wait_until(has_copied, "the merge copies")
            merging.send_signal(signal.SIGINT)
            assert merging.wait(60) == 130
        assert document("ctl", "c", "status")["exports"][0]["merge"] is None
    assert content("leaf-1.avhd") == before


ASK_AS_NOBODY = """
import json, os, socket, sys
os.setgroups([]), os.setresgid(65534, 65534, 65534), os.setresuid(65534, 65534, 65534)
client = socket.socket(socket.AF_UNIX)
try:
    client.connect(sys.argv[1])
except PermissionError:
    sys.exit(print("no way in"))
for line in sys.argv[2:]:
    method, params = json.loads(line)
    client.sendall(json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": params}).encode() + b"\\n")
    print(client.makefile().readline().strip())
"""


def answers_to_nobody(socket: Path, *requests: tuple[str, dict[str, Any]]) -> list[str]:
    """The server's answers to the user `nobody`, one line each."""
    lines = [json.dumps(one) for one in requests]
    done = subprocess.run(
        [sys.executable, "-c", ASK_AS_NOBODY, str(socket), *lines],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return done.stdout.splitlines()


def test_the_control_socket_keeps_its_own_owner(tmp_path: Path) -> None:
    """INV-CONTROL-CONFINED: --socket-owner covers the clients' socket only; --control-owner the named files only."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    with tempfile.TemporaryDirectory() as name:
        room = Path(name)
        room.chmod(0o755)  # the owner of a socket must be able to reach it
        images = room / "images"
        images.mkdir(0o700)
        for path in (room / "a.vhd", images / "b.vhd", tmp_path / "secret.vhd"):
            vhdkit.create_image(path, MIB)
        (images / "way.vhd").symlink_to(tmp_path / "secret.vhd")
        with serving(room / "a.vhd", "--socket", room / "s", "--control", room / "c", "--socket-owner", "nobody"):
            assert [os.stat(room / one).st_uid for one in "sc"] == [65534, 0]
            assert answers_to_nobody(room / "c", ("status", {})) == ["no way in"]
            assert "a.vhd" in good("ctl", str(room / "c"), "status")
            good("ctl", str(room / "c"), "add", f"mine={tmp_path / 'secret.vhd'}")
        words = ("--control", room / "c", "--control-owner", "nobody", "--control-dir", images)
        with serving(room / "a.vhd", "--socket", room / "s", *words):
            assert [os.stat(room / one).st_uid for one in "sc"] == [0, 65534]
            answers = answers_to_nobody(
                room / "c",
                ("status", {}),
                ("add", {"name": "x", "path": str(tmp_path / "secret.vhd")}),
                ("add", {"name": "x", "path": str(images / "way.vhd")}),
                ("snapshot", {"exports": {"a.vhd": str(room / "a.avhd")}}),
                ("add", {"name": "b", "path": str(images / "b.vhd")}),
                ("snapshot", {"exports": {"b": str(images / "b-1.avhd")}}),
            )
            assert ["AccessDenied" in one for one in answers] == [False, True, True, True, False, False], answers
            assert ['"error"' in one for one in answers] == [False, True, True, True, False, False], answers
            good("ctl", str(room / "c"), "add", f"mine={tmp_path / 'secret.vhd'}")
