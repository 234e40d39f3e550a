# SPDX-License-Identifier: Apache-2.0
"""What short commands must not import: users wait for the start. Only names of modules are checked, no times."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import vhdkit

# Run the command, then print which modules are loaded, however it ends.
PROGRAM = """
import gc, sys
from {entry} import main
sys.argv = [{name!r}, *sys.argv[1:]]
try:
    main()
finally:
    print(*sorted(sys.modules), "collects" if gc.isenabled() else "", file=sys.stderr)
"""
ENTRIES = {"vhdkit": "vhdkit.cli.entry", "vmm": "vmm.cli.entry"}
# Slow to import, and used by none of these commands.
ALWAYS = ("asyncio", "concurrent", "ctypes", "email", "multiprocessing", "ssl", "xml", "http")
LARGE = ("mfusepy", "numpy", "PIL", "pydantic", "pyroute2", "qemu", "rich")
SMALL = ("fractions", "secrets", "socket", "subprocess", "tempfile", "tomllib", "urllib")


def loaded(name: str, *words: str, home: Path) -> set[str]:
    """The modules loaded when the command, which must succeed, has ended."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(entry=ENTRIES[name], name=name), *words],
        capture_output=True,
        text=True,
        check=True,
        stdin=subprocess.DEVNULL,
        env={
            **os.environ,
            "VMM_HOME": str(home),
            "VMM_RUNTIME": str(home / "run"),
            "TERM": "xterm",
            "FORCE_COLOR": "1",
        },
    )
    return set(done.stderr.splitlines()[-1].split())


def found(modules: set[str], *unwanted: str) -> list[str]:
    """Which of the unwanted modules and packages are among them."""
    return sorted(one for one in unwanted if any(module == one or module.startswith(f"{one}.") for module in modules))


@pytest.mark.parametrize("name", ENTRIES)
@pytest.mark.parametrize("word", ["--help", "--version", ""])
def test_help_does_not_load_verbs(name: str, word: str, tmp_path: Path) -> None:
    """The list of verbs and the version need the command line library and only our modules of the command line."""
    modules = loaded(name, *word.split(), home=tmp_path)
    assert found(modules, *ALWAYS, *LARGE, *SMALL) == []
    rooms = {module.split(".")[1] for module in modules if module.startswith(f"{name}.")}
    assert rooms <= {"cli", "errors", "jsontext", "model", "wording"}
    assert found(modules, *(f"vhdkit.{room}" for room in ("chain", "disk", "formats", "serve", "store"))) == []


def test_convert_loads_no_bar_where_none_is_shown(tmp_path: Path) -> None:
    """In scripts, where standard error is not a terminal, nothing is imported for a bar."""
    image = tmp_path / "a.vhd"
    vhdkit.create_image(image, 1 << 20)
    words = ("convert", str(image), str(tmp_path / "b.raw"), "--no-sync")
    modules = loaded("vhdkit", *words, home=tmp_path)
    assert found(modules, "rich", "pydantic", "asyncio", "concurrent", "ssl", "vhdkit.serve") == []


def test_info_does_not_load_rich_or_servers(tmp_path: Path) -> None:
    """`info` reads an image and its parents with numpy, but without bars, sockets or
    servers."""
    image, child = tmp_path / "a.vhd", tmp_path / "b.avhd"
    vhdkit.create_image(image, 1 << 20)
    vhdkit.create_child(child, image)
    for verb in ("info", "chain"):
        modules = loaded("vhdkit", verb, str(child), home=tmp_path)
        assert "collects" in modules, "while it runs"
        assert found(modules, "rich", "pydantic", "asyncio", "concurrent", "ssl", *SMALL) == []
        assert found(modules, "vhdkit.serve", "vhdkit.disk", "vhdkit.sockets", "vhdkit.formats.vhd.dump") == []


def test_list_does_not_load_qemu_or_switches(tmp_path: Path) -> None:
    """`vmm list` reads definitions with pydantic and asks workers over plain sockets: no loop, monitor, switch or
    disk."""
    with tempfile.TemporaryDirectory(prefix="vmm-start-") as folder:
        home = Path(folder)
        loaded("vmm", "create", "web", "--memory", "64M", home=home)
        modules = loaded("vmm", "list", home=home)
    assert "collects" in modules, "while it runs"
    assert found(modules, "asyncio", "concurrent", "numpy", "pyroute2", "qemu", "rich", "ssl") == []
    assert (
        found(
            modules,
            "vmm.net",
            "vmm.snapshots",
            "vmm.worker",
            "vmm.store.devices",
            "vmm.kvm.qmp",
            "vmm.kvm.drives",
            "vmm.kvm.process",
            "vmm.kvm.program",
            "vmm.api.possible",
            "vmm.store.snapshots.journal",
        )
        == []
    )
    assert found(modules, "vhdkit.disk", "vhdkit.chain", "vhdkit.formats", "vhdkit.serve") == []
