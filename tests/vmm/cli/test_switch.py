# SPDX-License-Identifier: Apache-2.0
"""`vmm switch` and `vmm nic` as a user types them, without any running machine."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import require_qemu
from tests.waiting import wait_until
from tests.warm_commands import warm
from vmm.net.switch_process import SwitchProcess


class Terminal:
    """The command line, with its own home."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "VMM_HOME": str(folder / "home"), "VMM_RUNTIME": str(folder / "run")}

    def command(self, *words: str) -> list[str]:
        """The words that start it."""
        return [sys.executable, "-m", "vmm", *words]

    def run(self, *words: str) -> tuple[int, str, str]:
        """(exit code, output, errors)."""
        done = subprocess.run(
            [*warm("vmm"), *words], capture_output=True, text=True, env=self.environment, timeout=60, check=False
        )
        assert "Traceback" not in done.stderr, done.stderr
        return done.returncode, done.stdout, done.stderr

    @contextlib.contextmanager
    def client_of_the_switch(self) -> Iterator[None]:
        """A client of the only switch, which is started again if it has ended."""
        name = json.loads(self.good("switch", "list", "--json"))[0]["name"]
        (folder,) = (self.folder / "run").glob("sw-*")
        backend = SwitchProcess(str(folder), name)
        backend.ensure("status")
        with backend._connected():
            yield

    def good(self, *words: str) -> str:
        """Run a command that must succeed; return its output."""
        code, output, said = self.run(*words)
        assert code == 0, said
        return output


@pytest.fixture
def vmm() -> Iterator[Terminal]:
    """A command line without switches and machines."""
    folder = Path(tempfile.mkdtemp(prefix="vmm-cli-"))
    terminal = Terminal(folder)
    yield terminal
    for one in json.loads(terminal.run("switch", "list", "--json")[1] or "[]"):
        terminal.run("switch", "delete", one["name"], "--force")
    shutil.rmtree(folder)


def test_the_life_of_a_switch(vmm: Terminal) -> None:
    """It is made, listed, shown, captured from, and deleted; making it twice is an error in one line."""
    assert vmm.good("switch", "create", "lab") == "lab: private, user back end\n"
    code, _, said = vmm.run("switch", "create", "lab")
    assert (code, said.count("\n")) == (1, 1)
    assert "lab  " in vmm.good("switch", "list")
    with vmm.client_of_the_switch():  # it ends after ten seconds without a user
        assert json.loads(vmm.good("switch", "ports", "lab", "--json")) == []
        assert "user: runs" in vmm.good("switch", "show", "lab")
        assert json.loads(vmm.good("switch", "addresses", "lab", "--json")) == []
    assert vmm.good("switch", "delete", "lab") == "lab is deleted\n"
    code, _, said = vmm.run("switch", "delete", "lab")
    assert code == 1
    assert (
        "switch 'lab' does not exist; existing switches: none (create it: vmm switch create lab --type private)"
        in said
    )


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("create", "x", "--type", "external"), 2, "an external switch needs a network card"),
        (("create", "../x"), 2, "cannot be the name of a switch"),
        (("create", "x", "--address", "10.0.0.1/24"), 2, "no other type can have one"),
        (("create", "x", "--type", "internal", "--address", "rubbish"), 2, "rubbish"),
        (("create", "x", "--dhcp-range", "10"), 2, "FIRST-LAST"),
        (
            (
                "create",
                "x",
                "--type",
                "internal",
                "--backend",
                "user",
                "--address",
                "10.77.251.1/24",
                "--dhcp-range",
                "10.77.251.9-10.77.251.255",
            ),
            2,
            "10.77.251.255, the broadcast address",
        ),
        (("show", "absent"), 1, "switch 'absent' does not exist"),
        (("capture", "absent", "-o", "x"), 1, "switch 'absent' does not exist"),
        (("lease", "absent", "a/b"), 2, "give an address, or --remove"),
    ],
)
def test_errors_are_one_line(vmm: Terminal, words: tuple[str, ...], code: int, said: str) -> None:
    """With the exit code of their kind and what is wrong."""
    got, output, errors = vmm.run("switch", *words)
    assert (got, output) == (code, "")
    assert said in errors


def test_fixed_addresses_on_the_user_back_end(vmm: Terminal) -> None:
    """One is set; an impossible one is an error in one line."""
    require_qemu()
    vmm.good("switch", "create", "nat", "--type", "internal", "--backend", "user", "--address", "10.77.250.1/24")
    vmm.good("create", "web", "--nic", "nat")
    (lease,) = json.loads(vmm.good("switch", "lease", "nat", "web/nic-0", "10.77.250.10", "--json"))
    assert (lease["address"], lease["name"]) == ("10.77.250.10", "web")
    code, output, said = vmm.run("switch", "lease", "nat", "web/nic-0", "10.77.250.255")
    assert (code, output, said.count("\n")) == (2, "", 1)
    assert "10.77.250.255 is the network's broadcast address" in said


def test_a_capture_ends_with_ctrl_c(vmm: Terminal) -> None:
    """The file is complete, and the exit code is that of success."""
    vmm.good("switch", "create", "lab")
    path = vmm.folder / "c.pcapng"
    capture = subprocess.Popen(vmm.command("switch", "capture", "lab", "-o", str(path)), env=vmm.environment)
    wait_until(lambda: path.exists() and path.stat().st_size, "the capture begins")
    assert path.stat().st_mode & 0o077 == 0  # what guests send to each other
    capture.send_signal(signal.SIGINT)
    assert capture.wait(60) == 0
    assert path.read_bytes().startswith(b"\x0a\x0d\x0d\x0a")
    code, _, said = vmm.run("switch", "capture", "lab", "-o", "/no/such/folder/c")
    assert code == 1
    assert "/no/such/folder/c" in said


def test_a_capture_of_a_switch_that_ends_is_an_error(vmm: Terminal) -> None:
    """In one line, which names the file; frames captured before that are complete."""
    vmm.good("switch", "create", "lab")
    path = vmm.folder / "c.pcapng"
    command = vmm.command("switch", "capture", "lab", "-o", str(path))
    capture = subprocess.Popen(command, env=vmm.environment, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: path.exists() and path.stat().st_size, "the capture begins")
    os.kill(json.loads(vmm.good("switch", "show", "lab", "--json"))["status"]["pid"], signal.SIGKILL)
    said = capture.communicate(timeout=30)[1]
    assert capture.returncode == 5  # as for any wrong state
    assert f"switch lab ended during the capture; {path} has the frames captured until then" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--files", "3"), "--files needs --max-size and a FILE"),
        (("--max-size", "1K"), "64K or more"),
        (("--max-size", "1M", "--files", "1"), "must be from 2 to 10000"),
    ],
)
def test_impossible_limits_of_a_capture(vmm: Terminal, words: tuple[str, ...], said: str) -> None:
    """They are refused before anything is written."""
    vmm.good("switch", "create", "lab")
    path = vmm.folder / "c.pcapng"
    code, _, errors = vmm.run("switch", "capture", "lab", "-o", str(path), *words)
    assert code == 2
    assert said in errors
    assert not path.exists()


def test_adapters_of_a_machine_that_is_off(vmm: Terminal) -> None:
    """Addresses come from the pool, each once; options are kept; impossible ones are refused in one line."""
    require_qemu()
    vmm.good("switch", "create", "lab")
    vmm.good("create", "one", "--nic", "lab", "--nic", "lab,vlan=10,type=legacy")
    first, second = json.loads(vmm.good("nic", "list", "one", "--json"))
    assert first["mac"].startswith("00:15:5d:")
    assert first["mac"] != second["mac"]
    assert (second["id"], second["vlan"], second["kind"]) == ("nic-1", 10, "legacy")
    code, _, said = vmm.run("create", "two", "--nic", f"lab,mac={first['mac']}")
    assert code == 1
    assert f"{first['mac']} is already that of adapter nic-0 of machine one" in said
    assert vmm.run("nic", "add", "one", "nowhere")[0] == 1
    assert vmm.run("nic", "add", "one", "lab,queues=99")[0] == 2
    assert vmm.run("nic", "remove", "one", "nic-9")[0] == 1
    vmm.good("nic", "set", "one", "nic-1", "trunk=5+6", "native=6", "bandwidth=10M", "link=down")
    assert "trunk 5+6, native 6" in vmm.good("nic", "list", "one")
    assert "10 Mbit/s" in vmm.good("nic", "show", "one", "nic-1")
    vmm.good("nic", "set", "one", "nic-1", "--no-vlan")
    assert json.loads(vmm.good("nic", "show", "one", "nic-1", "--json"))["trunk"] == []
    vmm.good("nic", "remove", "one", second["mac"])
    (left,) = json.loads(vmm.good("nic", "list", "one", "--json"))
    assert (left["id"], left["connected"]) == ("nic-0", None)
    vmm.good("switch", "delete", "lab", "--force")
    assert "disconnected" in vmm.good("nic", "list", "one")
    assert json.loads(vmm.good("nic", "list", "one", "--json"))[0]["connected"] is False
