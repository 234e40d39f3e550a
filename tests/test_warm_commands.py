# SPDX-License-Identifier: Apache-2.0
"""A warm command works where its caller is, and ends when its caller does."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support import ROOT, require_root_and_namespaces
from tests.waiting import wait_until
from tests.warm_commands import COMMANDS, PYTHON, warm


@pytest.mark.parametrize("name", COMMANDS)
def test_output_and_exit_codes(name: str) -> None:
    """Output, errors and exit codes are the real command's."""
    helped = subprocess.run([*warm(name), "--help"], capture_output=True, text=True, timeout=60, check=False)
    assert helped.returncode == 0 and helped.stdout.startswith("Usage:") and not helped.stderr
    wrong = subprocess.run([*warm(name), "no-such-verb"], capture_output=True, text=True, timeout=60, check=False)
    assert wrong.returncode == 2 and "no-such-verb" in wrong.stderr and not wrong.stdout


def test_folder_umask_and_environment(tmp_path: Path) -> None:
    """It works in its caller's folder with its caller's umask and environment."""
    done = subprocess.run(
        [*warm("vhdkit"), "create", "new.vhd", "--size", "1M"], cwd=tmp_path, umask=0o077, timeout=60, check=False
    )
    assert done.returncode == 0
    assert (tmp_path / "new.vhd").stat().st_mode & 0o777 == 0o600
    home = {**os.environ, "VMM_HOME": str(tmp_path / "home"), "VMM_RUNTIME": str(tmp_path / "run")}
    made = [*warm("vmm"), "create", "web", "--memory", "16M"]
    assert subprocess.run(made, env=home, capture_output=True, timeout=60, check=False).returncode == 0
    assert (tmp_path / "home" / "machines").is_dir()


def test_a_module_by_its_name() -> None:
    """`-m MODULE` runs in a Python with both packages loaded; an error shows and gives the exit code."""
    good = subprocess.run([*warm(PYTHON), "-m", "vhdkit", "--version"], capture_output=True, timeout=60, check=False)
    assert good.returncode == 0 and good.stdout.startswith(b"vhdkit"), good
    quiet = subprocess.run([*warm(PYTHON), "-m", "this"], capture_output=True, timeout=60, check=False)
    assert quiet.returncode == 0 and b"Zen" in quiet.stdout, "a module that runs to its end without an exit"
    bad = subprocess.run([*warm(PYTHON), "-m", "no.such.module"], capture_output=True, timeout=60, check=False)
    assert bad.returncode == 1 and b"no.such" in bad.stderr, bad


def test_the_loaded_process_ends_with_the_tests() -> None:
    """It ends when the process that started it was killed."""
    program = "from tests.warm_commands import warm\nprint(warm('vmm')[0], flush=True)\ninput()"
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        command = process.stdout.readline().strip()
        process.kill()
    wait_until(
        lambda: subprocess.run([command, "--version"], capture_output=True, timeout=60, check=False).returncode,
        "the loaded process ends",
    )
    shutil.rmtree(Path(command).parent.parent.parent)


def test_concurrent_callers() -> None:
    """Each caller gets its own answer."""
    with ThreadPoolExecutor(4) as pool:
        words = [[*warm("vhdkit"), f"verb{number}"] for number in range(24)]
        ended = pool.map(lambda one: subprocess.run(one, capture_output=True, timeout=60, check=False), words)
        for number, done in enumerate(ended):
            assert done.returncode == 2 and f"verb{number}'".encode() in done.stderr, done


def following(folder: Path) -> subprocess.Popen[bytes]:
    """A command that runs until it is stopped."""
    home = {**os.environ, "VMM_HOME": str(folder / "home"), "VMM_RUNTIME": str(folder / "run")}
    made = [*warm("vmm"), "create", "web", "--memory", "16M"]
    assert subprocess.run(made, env=home, capture_output=True, timeout=60, check=False).returncode == 0
    process = subprocess.Popen([*warm("vmm"), "events", "web", "--follow"], env=home, stdout=subprocess.PIPE)
    assert process.stdout is not None and b"created" in process.stdout.readline()
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_copy_ends_with_its_caller(tmp_path: Path, number: signal.Signals) -> None:
    """A signal is passed on, and the copy of a killed caller dies: nothing is written any more."""
    with following(tmp_path) as process:
        process.send_signal(number)
        assert process.stdout is not None
        assert process.stdout.read() == b""  # the copy had the other end
        # For a shell 130 is the same as a process that SIGINT ended before it could say so itself.
        assert process.wait(60) in (130, 0, -signal.SIGINT, -signal.SIGKILL)


def test_a_killed_copy(tmp_path: Path) -> None:
    """The caller of a copy that was killed ends with 137."""
    with following(tmp_path) as process:
        for pid in wait_until(lambda: _writers_of(process), "the copy runs"):
            os.kill(pid, signal.SIGKILL)
        assert process.wait(60) == 137


def _writers_of(process: subprocess.Popen[bytes]) -> list[int]:
    """The other processes that share that process's standard output."""
    wanted = os.readlink(f"/proc/{process.pid}/fd/1")
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.readlink(entry / "fd" / "1") == wanted:
                found.append(int(entry.name))
        except OSError:
            continue
    return [pid for pid in found if pid != process.pid]


@pytest.mark.netns
def test_a_call_from_another_network_namespace() -> None:
    """It sees the network of the namespace in which it was called: the host's cards are absent."""
    require_root_and_namespaces()
    create = ["switch", "create", "lan", "--type", "external", "--nic", "warm0", "--dry-run", "--backend", "bridge"]
    made = "ip link add warm0 type dummy && ip link set warm0 up && "
    for before, there in (("", False), (made, True)):
        shell = ["unshare", "--net", "--mount", "sh", "-c", before + 'mount -t sysfs sysfs /sys && "$@"', "sh"]
        done = subprocess.run([*shell, *warm("vmm"), *create], capture_output=True, text=True, timeout=60, check=False)
        assert ("warm0 does not exist" not in done.stderr + done.stdout) is there, (
            done.stdout,
            done.stderr,
        )
