# SPDX-License-Identifier: Apache-2.0
"""`script/demo` shows the main job, and proves it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mounting import require_fuse
from tests.support import ROOT, require_linux_guest, require_tool
from tests.waiting import wait_until


def _shown_in_readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8").split("```text\n")[1].split("```")[0]


def start_demo(folder: Path) -> subprocess.Popen[str]:
    """Start the demo with this interpreter and without the set-up; its files go below `folder`."""
    return subprocess.Popen(
        ["bash", ROOT / "script" / "demo"],
        env={**os.environ, "VHDKIT_PYTHON": sys.executable, "TMPDIR": str(folder)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def test_the_demo_runs_what_the_readme_shows() -> None:
    """Each command of the output in README.md is run by the demo and printed."""
    script = (ROOT / "script" / "demo").read_text(encoding="utf-8")
    shown = re.findall(r"^\$ (.*)", _shown_in_readme(), re.MULTILINE)
    assert len(shown) > 3
    for line in shown:
        said = f"\nshow {line.removeprefix('vhdkit ')}\n" if line.startswith("vhdkit ") else f"echo '$ {line}'\n"
        assert said in script, line


def test_missing_programs_fail_in_ci(tmp_path: Path) -> None:
    """A missing program is named, with the replacement; with CI=true the demo fails."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("bash", "dirname", "mktemp", "rm", "mkdir", "seq", "head", "truncate", "cat", "dd"):
        (programs / name).symlink_to(require_tool(name))
    script = tmp_path / "script" / "demo"
    script.parent.mkdir()
    content = (ROOT / "script" / "demo").read_text(encoding="utf-8")
    script.write_text(content.replace('PATH="$PATH:/usr/sbin:/sbin"', ""))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    for ci, code in (("true", 1), ("", 127)):  # without a Python it ends at its first command
        done = subprocess.run(
            [require_tool("bash"), script], check=False, capture_output=True, timeout=60,
            env={"PATH": str(programs), "VHDKIT_PYTHON": str(tmp_path / "python"), "TMPDIR": str(scratch), "CI": ci},
        )  # fmt: skip
        assert b"mke2fs or debugfs is missing (Debian: e2fsprogs): continuing with plain bytes" in done.stdout
        assert done.returncode == code, done.stdout + done.stderr
        assert (b"$ vhdkit convert disk.raw base.vhd" in done.stdout) == (not ci)
        assert list(scratch.iterdir()) == []


@pytest.mark.nightly  # CI runs the demo separately, where it fails by itself
def test_the_demo_succeeds(tmp_path: Path) -> None:
    """It exits with 0, shows the verbs, proves the same content in four ways, and cleans up."""
    require_tool("mke2fs")
    require_tool("debugfs")
    require_tool("nbdcopy")
    require_tool("fio")
    require_fuse()
    require_linux_guest()
    output, errors = (process := start_demo(tmp_path)).communicate(timeout=280)
    assert process.returncode == 0, output + errors
    for words in (
        "$ vhdkit snapshot monday.avhd tuesday.avhd",
        "$ vhdkit info tuesday.avhd", "$ vhdkit chain tuesday.avhd", "$ vhdkit map tuesday.avhd",
        "tuesday.avhd: clean", "equal: tuesday.avhd and fixed.vhd hold the same disk", "What happened",
        "3 packets received, 0% packet loss", "lab is deleted",
        "$ vhdkit ctl nbd.ctl snapshot", "fio read back all that it wrote", "nothing was lost",
        "$ vhdkit mount tuesday.avhd mnt", "mnt/disk.raw and flat.raw are equal", "rain since Tuesday",
        "clouds on Monday", "sunny",
        "VMM-GUEST READY", "diary.txt is now on the disk", "shutdown-requested  (by: agent)",
        "all that the machine wrote is in guest.avhd",
        "$ vmm snapshot create demo --name before", "demo: middle is deleted", "demo: 1 merged",
        "demo is at before, and running", "diary says", "just after the snapshot, and is",
        "$ vhdkit compact base.vhd", "resized 64.0 MiB (67108864 bytes) -> 128.0 MiB",
    ):  # fmt: skip
        assert words in output
    for line in re.findall(r"^\$ .*", _shown_in_readme(), re.MULTILINE):  # what the README shows
        assert f"\n{line}\n" in output, line
    hashes = [line.split()[0] for line in output.splitlines() if len(line.split(" ")[0]) == 64]
    assert len(hashes) == 4 and len(set(hashes)) == 1
    assert "Traceback" not in output + errors
    assert list(tmp_path.iterdir()) == []


def test_demo_cleans_up_when_it_is_stopped(tmp_path: Path) -> None:
    """Ctrl-C in the middle leaves no files."""
    process = start_demo(tmp_path)
    wait_until(lambda: list(tmp_path.glob("*/base.vhd")) or process.poll() is not None, "the demo has made its base")
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert list(tmp_path.iterdir()) == []
