# SPDX-License-Identifier: Apache-2.0
"""`vmm console` and `vmm screen` as a user sees them: a terminal, scripts, pictures, wrong arguments."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

import vhdkit
from tests.pictures import read_png
from tests.support import require_boot_sector_guest
from tests.vmm.guests import boot_sector
from tests.vmm.stage import SECONDS
from tests.waiting import wait_until
from tests.warm_commands import warm
from vmm.api.manager import DiskRequest, Manager

pytestmark = pytest.mark.kvm
MIB = 1 << 20
VMM = (sys.executable, "-m", "vmm")


def vmm(*words: str, text: str = "") -> subprocess.CompletedProcess[str]:
    """Run the command line with that input."""
    return subprocess.run(
        [*warm("vmm"), *words], input=text, capture_output=True, text=True, timeout=SECONDS, check=False
    )


@pytest.fixture
def web(manager: Manager, tmp_path: Path) -> Manager:
    """The machine `web` runs the boot-sector guest, which has printed READY."""
    require_boot_sector_guest()
    image = tmp_path / "disk.vhd"
    vhdkit.create_image(image, 8 * MIB)
    with vhdkit.open_disk(image, writable=True) as disk:
        boot_sector.install(disk)
    manager.create("web", memory_bytes=16 * MIB, accelerator="tcg", disks=[DiskRequest(str(image))])
    manager.start("web")
    done = vmm("console", "web", "--expect", "READY", "--timeout", str(SECONDS))
    assert done.returncode == 0 and "BOOT-OK" in done.stdout, done
    return manager


class Terminal:
    """`vmm console` on its own terminal."""

    def __init__(self, *words: str) -> None:
        self.user, terminal = pty.openpty()
        self.before = termios.tcgetattr(terminal)
        self.terminal = terminal
        self.process = subprocess.Popen(
            [*VMM, "console", "web", *words], stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True
        )

    def see(self, words: str) -> str:
        """The output, up to these words."""
        seen = b""
        deadline = time.monotonic() + SECONDS
        while words.encode() not in seen:
            assert select.select([self.user], [], [], max(0.0, deadline - time.monotonic()))[0], seen
            seen += os.read(self.user, 4096)
        return seen.decode()

    def type(self, keys: str) -> None:
        """Press keys."""
        os.write(self.user, keys.encode())

    def end(self) -> int:
        """Wait for its end, check that the terminal is as before, and return the exit code."""
        code = self.process.wait(SECONDS)
        assert termios.tcgetattr(self.terminal) == self.before
        return code

    def close(self) -> None:
        """Close the terminal; no process of it is left."""
        self.process.kill()
        self.process.wait(SECONDS)
        os.close(self.user)
        os.close(self.terminal)


def test_the_console_on_a_terminal(web: Manager) -> None:
    """Scroll-back works, keys (Ctrl-C too) go to the guest, a second client only watches; Ctrl-] leaves, and the
    machine keeps running."""
    first = Terminal()
    second = None
    try:
        assert "Ctrl-] disconnects" in first.see("READY")
        first.type("k")
        first.see("key k")
        first.type("\x03")
        first.see("key \x03")
        second = Terminal("--no-scrollback")
        assert "READY" not in second.see("the keyboard is in use")
        first.type("z")
        second.see("key z")
        second.type("\x1d")
        assert second.end() == 0
        first.type("\x1d")
        assert first.end() == 0
    finally:
        first.close()
        if second is not None:
            second.close()
    assert vmm("console", "web", "--no-scrollback", "--expect", "key s", text="s").returncode == 0


def test_sigterm_and_the_end_of_the_machine(web: Manager) -> None:
    """SIGTERM restores the terminal; if the machine powers off, the console ends with a message."""
    ended = Terminal()
    try:
        ended.see("READY")
        ended.process.send_signal(signal.SIGTERM)
        assert ended.end() != 0
    finally:
        ended.close()
    terminal = Terminal()
    try:
        terminal.see("READY")
        terminal.type("p")
        terminal.see("the machine is off")
        assert terminal.end() == 0
    finally:
        terminal.close()


def test_the_console_survives_a_killed_worker(web: Manager) -> None:
    """A terminal stays connected when the worker is killed: it finds the next worker's console, and typing works
    again."""
    terminal = Terminal()
    try:
        terminal.see("READY")
        pids = web.show("web").pids
        assert pids is not None
        os.kill(pids["worker"], signal.SIGKILL)
        web.show("web")  # it answers as soon as there is another worker

        def answers() -> bool:
            terminal.type("k")
            return bool(select.select([terminal.user], [], [], 0.5)[0])

        wait_until(answers, "the guest answers", SECONDS)  # a key pressed in between is lost
        assert "BOOT-OK" not in terminal.see("key k")
        terminal.type("\x1d")
        assert terminal.end() == 0
    finally:
        terminal.close()


def test_the_console_in_a_script(web: Manager) -> None:
    """A script's input is sent, the answers are printed, and the console ends by itself."""
    done = vmm("console", "web", "--no-scrollback", text="ab")
    assert (done.returncode, done.stdout, done.stderr) == (0, "key a\nkey b\n", "")
    done = vmm("console", "web", "--expect", "never said", "--timeout", "0.2")
    assert done.returncode == 9 and "did not print 'never said'" in done.stderr
    assert vmm("console", "web", "--watch", "--no-scrollback", text="x").stdout == ""


def test_wrong_arguments(web: Manager) -> None:
    """Impossible options, and machines that are missing or off, lead to one line and an exit code, without a
    traceback."""
    for words, code, text in (
        (("--shared", "--take"), 2, "are mutually exclusive"),
        *((("--timeout", text), 2, "above 0") for text in ("0", "nan", "inf", "soon")),
        (("--expect", ""), 2, "needs a text"),
    ):
        done = vmm("console", "web", *words)
        assert done.returncode == code and text in done.stderr and done.stderr.count("\n") == 1
    for verb in "console", "screen":
        done = vmm(verb, "nothing")
        assert done.returncode == 1 and "does not exist" in done.stderr
    web.stop("web")
    for line in "console web", "screen web", "screen web --png x.png", "agent ping web":
        done = vmm(*line.split())
        assert done.returncode == 5 and "is off" in done.stderr and "vmm start web" in done.stderr
    done = vmm("console", "web", "--log")
    assert done.returncode == 0 and "BOOT-OK" in done.stdout
    assert not Path("x.png").exists()


def test_pictures_of_the_screen(web: Manager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture is written to a file or to standard output; without one, the message says where the screen is and how
    to view it."""
    path = tmp_path / "web.png"
    assert vmm("screen", "web", "--png", str(path)).returncode == 0
    assert read_png(path.read_bytes()).colour_count >= 2
    raw = subprocess.run([*VMM, "screen", "web", "--png", "-"], capture_output=True, timeout=SECONDS, check=True)
    assert read_png(raw.stdout).width >= 640
    done = vmm("screen", "web", "--png", str(tmp_path / "nowhere" / "web.png"))
    assert done.returncode == 1 and "nowhere" in done.stderr and "Traceback" not in done.stderr
    where = json.loads(vmm("screen", "web", "--json").stdout)["vnc_socket"]
    assert Path(where).is_socket()
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    done = vmm("screen", "web")
    assert where in done.stdout and "ssh -N -L" in done.stdout


def test_key_value_items(web: Manager) -> None:
    """Items are set, read, listed and deleted on the command line; wrong ones are refused."""
    assert "will receive it later" in vmm("kvp", "set", "web", "role", "front end").stdout
    assert vmm("kvp", "get", "web", "role").stdout == "front end\n"
    assert json.loads(vmm("kvp", "get", "web", "role", "--json").stdout)["pool"] == "host"
    assert vmm("kvp", "set", "web", "text", "-", text="two\nlines").returncode == 0
    assert json.loads(vmm("kvp", "list", "web", "--json").stdout)["host"] == {
        "role": "front end",
        "text": "two\nlines",
    }
    assert "role" in vmm("kvp", "list", "web").stdout
    assert vmm("kvp", "delete", "web", "role").returncode == 0
    for words, code in (
        (("get", "web", "role"), 1), (("delete", "web", "role"), 1), (("set", "web", "", "x"), 2),
        (("set", "web", "big", "x" * 3000), 2), (("list", "nothing"), 1),
    ):  # fmt: skip
        done = vmm("kvp", *words)
        assert done.returncode == code and done.stderr.count("\n") == 1, done
    web.stop("web")
    assert vmm("kvp", "get", "web", "text").stdout == "two\nlines\n"
