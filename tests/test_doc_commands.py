# SPDX-License-Identifier: Apache-2.0
"""Every command and program in the README and in docs/ runs, in the order given, and prints what the page shows.

A page is a `Scene`: what must exist before its commands are run (files that the reader has, a guest in place of an
installed one), and which commands run until Ctrl-C. A page without one runs in an empty folder. LEFT_OUT has the
commands that are not run, with the reason. docs/recovery.md has a scene for each of its cases: test_recovery.py.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import sysconfig
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests import doc_stand_ins as stand_ins
from tests.doc_commands import Block, Command, Shell, blocks, pages, reader_environment, type_in
from tests.mounting import cleaned, require_fuse
from tests.support import ROOT, require_boot_sector_guest
from tests.vmm.net.machines import Namespaces
from tests.vmm.stage import machine_stage
from tests.warm_commands import WarmCommands, warm_commands

Prepare = Callable[[Path], object]


@dataclass(frozen=True)
class Scene:
    """What a page's commands need. Commands are identified by their text without the comment."""

    before: Mapping[str, Prepare] = field(default_factory=dict)  # a command, or the heading of a section
    until: Mapping[str, str] = field(default_factory=dict)  # what a command begins with -> printed before Ctrl-C
    needs: Callable[[], object] = lambda: None
    namespace: Callable[[Namespaces], str] | None = None  # the network namespace in which everything runs


# (page, command) -> why it is not run.
LEFT_OUT: dict[tuple[str, str], str] = {
    ("README.md", "script/demo"): "tests/test_demo.py runs it",
    ("README.md", "script/test"): "it runs this test",
    (
        "docs/backup.md",
        "vmm backup schedule add nightly web machines --when 22:30 --keep-daily 7 --keep-weekly 4 --sample 5",
    ): "it installs a timer on the host; test_backup_schedule.py adds one elsewhere",
    ("docs/backup.md", "vmm backup verify machines web --boot"): "tests/vmm/api/restoring/test_boot_trial.py boots",
    **{
        ("docs/backup.md", text): "tests/vmm/cli/test_restore.py restores where the test may write, and starts guests"
        for text in (
            "vmm restore backup web --as drill --switch lan=-",
            "vmm start drill",
            "vmm delete drill --with-disks",
            "vmm restore backup web@18 --register",
        )
    },
}

SCENES: dict[str, Scene] = {
    "README.md": Scene(
        before={
            "vhdkit create child.avhd --parent disk.vhd": stand_ins.partition_on_disk,
            "vhdkit merge child.avhd --resume": stand_ins.interrupted_merge,
            "vhdkit rebase child.avhd --parent bases/disk.vhd": stand_ins.moved_base,
            "vmm create web --memory 1G --disk web.vhd --cdrom debian-12-netinst.iso": stand_ins.installed_guest,
            "vhdkit serve disk.vhd --engine nbdkit -- --filter=partition partition=1": stand_ins.disk_for_filters,
            "vhdkit mount tuesday.avhd mnt": stand_ins.week,
            "In a program": stand_ins.for_programs,
        },
        until={"vhdkit serve disk.vhd --engine nbdkit": "nbd", "vmm console web": "tick"},
        needs=stand_ins.require_all,
    ),
    "docs/backup.md": Scene(
        before={
            "From nothing to a nightly schedule": stand_ins.machines_to_back_up,
            "Backing up machines": stand_ins.no_repository,
            "vhdkit backup list backup": stand_ins.repository,
            "A second copy": stand_ins.repository_of_a_disk,
            "vmm backup schedule run nightly": stand_ins.schedule,
            "Checking a repository without vhdkit": stand_ins.repository,
        },
    ),
    "docs/mount.md": Scene(
        before={"vhdkit mount child.avhd mnt": stand_ins.chain_to_mount},
        needs=require_fuse,
    ),
    "docs/vmm.md": Scene(
        before={
            "vmm create web --memory 1G --cpus 2 --disk web.vhd --cdrom installer.iso": stand_ins.installer,
        },
        needs=require_boot_sector_guest,
    ),
    "docs/snapshots.md": Scene(
        before={
            "vmm snapshot create web --name clean": stand_ins.running_machine,
            "The tree": stand_ins.machine_with_branches,
        },
        needs=require_boot_sector_guest,
    ),
    "docs/guests.md": Scene(
        before={"echo 'systemctl status' | vmm console web --no-scrollback": stand_ins.talking_machine},
        needs=require_boot_sector_guest,
    ),
    "docs/networking.md": Scene(
        before={"vmm switch create lab": stand_ins.disk_for_networks},
        until={"vmm switch ports lab --watch": "nic-"},
        needs=stand_ins.require_networks,
        namespace=stand_ins.host_with_card,
    ),
}
OWN_TEST = {"docs/recovery.md": "test_recovery.py"}


@pytest.fixture(scope="module")
def warm() -> Iterator[WarmCommands]:
    """Both commands, loaded once for all pages."""
    with warm_commands() as commands:
        yield commands


def things(page: str, *, install: bool = False) -> list[Command | Block]:
    """The page's commands, and its programs as blocks, in order; those under "Install" or the others."""
    found: list[Command | Block] = []
    for block in (one for one in blocks(page) if (one.heading == "Install") == install):
        found += [block] if block.language == "python" else block.commands()
    return found


@contextlib.contextmanager
def without_mounts(folder: Path) -> Iterator[None]:
    """No mount below the folder is left, whatever happens."""
    try:
        yield
    finally:
        for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            place = line.split(" ")[4]
            if place.startswith(f"{folder}/"):
                with cleaned(Path(place)):
                    pass


def type_page(page: str, scene: Scene, shell: Shell, folder: Path) -> None:
    """Run everything on the page, in order."""
    heading = ""
    for thing in things(page):
        if thing.heading != heading and (prepare := scene.before.get(thing.heading)):
            prepare(folder)
        heading = thing.heading
        if isinstance(thing, Block):
            program = folder.parent / "program.py"
            program.write_text(thing.text, encoding="utf-8")
            code, printed = shell.run(f"{sys.executable} -W error {program}")
            assert code == 0, f"{page}:{thing.line}: {printed}"
        elif (page, thing.words) not in LEFT_OUT:
            if prepare := scene.before.get(thing.words):
                prepare(folder)
            until = [pattern for begin, pattern in scene.until.items() if thing.words.startswith(begin)]
            type_in(shell, thing, until=until[0] if until else None)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in pages() if page not in OWN_TEST and things(page)])
def test_page(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warm: WarmCommands) -> None:
    """Each command of the page exits and prints as the page shows."""
    scene = SCENES.get(page, Scene())
    scene.needs()
    folder = tmp_path / "reader"
    folder.mkdir()
    with contextlib.ExitStack() as stack:
        prefix: tuple[str, ...] = ()
        if scene.namespace is not None:
            spaces = Namespaces()
            stack.callback(spaces.close)
            prefix = ("ip", "netns", "exec", scene.namespace(spaces))
            warm = stack.enter_context(warm_commands(*prefix))
        stack.enter_context(machine_stage(tmp_path, monkeypatch))
        stack.enter_context(without_mounts(folder))
        monkeypatch.chdir(folder)
        shell = Shell(folder, tmp_path / "printed", reader_environment(folder, warm.bin), *prefix)
        type_page(page, scene, stack.enter_context(shell), folder)


@pytest.mark.slow
def test_install(tmp_path: Path) -> None:
    """The README's lines install both commands from a clone, and the wheel contains both packages; no network is
    used."""
    clone, home, libraries = tmp_path / "clone", tmp_path / "home", tmp_path / "libraries"
    for folder in (home, libraries):
        folder.mkdir()
    clone_into(clone)
    # The new environment finds the packages of ours, so that pip needs no index; it must install our own project.
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if "vhdkit" not in path.name:
            (libraries / path.name).symlink_to(path)
    variables = {
        "PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_CONFIG_FILE": os.devnull, "PYTHONPATH": str(libraries), "HOME": str(home),
    }  # fmt: skip
    with Shell(clone, tmp_path / "printed", {**os.environ, **variables}) as shell:
        for thing in things("README.md", install=True):
            assert isinstance(thing, Command)
            printed = type_in(shell, thing)
            assert not thing.words.endswith("--version") or printed.startswith("vhdkit ")
        code, printed = shell.run(f"cd /; {home}/.local/share/vhdkit/bin/vmm --version && echo {clone}/dist/*.whl")
    assert code == 0 and printed.startswith("vmm"), printed
    with zipfile.ZipFile(printed.splitlines()[-1]) as wheel:
        packed = {name.split("/")[0] for name in wheel.namelist()}
        assert "vhdkit/cli/main.py" in wheel.namelist() and "vmm/cli/main.py" in wheel.namelist()
    assert {one for one in packed if not one.endswith(".dist-info")} == {"vhdkit", "vmm"}


def clone_into(clone: Path) -> None:
    """The files that a wheel is built from, and the environment that script/setup makes."""
    for name in ("vhdkit", "vmm"):
        shutil.copytree(ROOT / name, clone / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone)
    (clone / ".venv").symlink_to(sys.prefix)


def test_debian_packages() -> None:
    """The packages in the README's apt commands are those that script/setup installs under the same names."""
    setup = (ROOT / "script" / "setup").read_text(encoding="utf-8")
    known = {line.split()[1] for line in setup.split("TOOLS='")[1].split("'")[0].splitlines() if line}
    table = (ROOT / "README.md").read_text(encoding="utf-8").split("| extra |")[1].split("\n\n")[0]
    named = {name for row in table.splitlines()[2:] for name in re.findall(r"`([a-z0-9-]+)`", row.split("|")[3])}
    assert named and named <= known, named - known


def test_exceptions_are_still_needed() -> None:
    """Each exception, stand-in and Ctrl-C belongs to a command that a page still has."""
    for page, words in LEFT_OUT:
        assert words in {one.words for one in things(page) if isinstance(one, Command)}, (page, words)
    for page, scene in SCENES.items():
        commands = {one.words for one in things(page) if isinstance(one, Command)}
        headings = {one.heading for one in things(page)}
        assert set(scene.before) <= commands | headings, set(scene.before) - commands - headings
        assert all(any(one.startswith(begin) for one in commands) for begin in scene.until), page
