# SPDX-License-Identifier: Apache-2.0
"""docs/recovery.md, case by case: a scene with the heading's name damages the files, then the commands are run."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import vhdkit
from tests.doc_commands import Command, Shell, blocks, reader_environment, type_in
from tests.harness.killing import killed_at
from tests.harness.vhd_builder import MIB, Block, Vhd, pattern, put, seal_footer
from tests.support import ROOT
from tests.vhdkit.formats.vhdx.damaged import HARMLESS, LOSSY, base
from tests.vhdkit.formats.vhdx.images import set_header
from tests.warm_commands import WarmCommands, warm_commands
from vhdkit import DiskFormat
from vhdkit.formats.vhd.opening import open_dynamic
from vhdkit.store import FileStore

PAGE = "docs/recovery.md"
BLOCK = MIB
GEOMETRY = (240, 4, 17)  # of 8 MiB


def cases() -> dict[str, list[Command]]:
    """The commands of every section that has a heading, in their order."""
    found: dict[str, list[Command]] = {}
    text = (ROOT / PAGE).read_text(encoding="utf-8")
    for heading in re.findall(r"^## (.*)$", text, re.MULTILINE):
        found[heading] = [one for block in blocks(PAGE) if block.heading == heading for one in block.commands()]
    return found


def chain(base: str = "base.vhd", leaf: str = "leaf.avhd") -> None:
    """A base with data and a child with data."""
    vhdkit.create_image(base, 8 * MIB, block_size_bytes=BLOCK)
    with vhdkit.open_disk(base, writable=True) as disk:
        disk.write(0, b"below")
    vhdkit.create_child(leaf, base)
    with vhdkit.open_disk(leaf, writable=True) as disk:
        disk.write(2 * MIB, b"above")


def image(**fields: object) -> None:
    """`disk.vhd`, dynamic, with two blocks, sound except for the given fields."""
    blocks = {0: Block(pattern(BLOCK)), 2: Block(pattern(BLOCK, 2))}
    values: dict[str, object] = {"size": 8 * MIB, "block_size": BLOCK, "blocks": blocks, "chs": GEOMETRY}
    Vhd(**(values | fields)).build().write(Path("disk.vhd"))  # type: ignore[arg-type]


def missing() -> None:
    chain()
    Path("base.vhd").unlink()


def moved() -> None:
    chain()
    Path("bases").mkdir()
    shutil.move("base.vhd", "bases/base.vhd")


def renamed() -> None:
    chain()
    shutil.move("base.vhd", "renamed.vhd")


def converted() -> None:
    chain()
    vhdkit.convert("base.vhd", "copy.vhd", DiskFormat.FIXED)


def header() -> None:
    image()
    raw = Path("disk.vhd").read_bytes()
    Path("disk.vhd").write_bytes(put(raw, 512 + 36, b"\1\2\3\4"))


def merging() -> None:
    chain()
    for number in range(6, 40):
        assert killed_at(number, lambda: vhdkit.merge("leaf.avhd")), "the merge ran to its end"
        if Path(".base.vhd.vhdkit-merge").exists():
            return


def pulling() -> None:
    """A child that was killed while it was filled from its parent: it has the parent's data, and is still a child."""
    chain()
    for number in range(1, 40):
        assert killed_at(number, lambda: vhdkit.pull("leaf.avhd", independent=True)), "the pull ran to its end"
        with vhdkit.open_disk("leaf.avhd") as disk:
            if next(iter(disk.chain.leaf.allocated_blocks())):
                assert len(disk.chain.layers) == 2
                return


def changing() -> None:
    image(tail=b"")
    whole = Path("disk.vhd").read_bytes()
    for number in range(1, 40):
        assert killed_at(number, lambda: vhdkit.repair("disk.vhd")), "the repair ran to its end"
        unfinished = any(one.code == "change-unfinished" for one in vhdkit.check("disk.vhd"))
        if unfinished and Path("disk.vhd").read_bytes() != whole:
            return
        for left in Path.cwd().iterdir():
            left.unlink()
        Path("disk.vhd").write_bytes(whole)


def noted() -> None:
    """The notes of a killed server about two images; one was written to before the server was started again."""
    Path("notes").mkdir()
    for name in ("other.vhd", "disk.vhd"):
        image()
        if name != "disk.vhd":
            Path("disk.vhd").rename(name)
        with FileStore.open(name, writable=True) as store:
            store.notes_folder = str(Path("notes").absolute())
            open_dynamic(store, writable=True).write(3 * BLOCK // 512, memoryview(bytes(512)))
    vhdkit.repair("other.vhd", accept_data_loss=True)
    vhdkit.open_disk("other.vhd", writable=True, options=vhdkit.OpenOptions(notes_folder="notes")).close()
    vhdkit.compact("other.vhd")


def freezing() -> None:
    for name in ("one.vhd", "two.vhd"):
        vhdkit.create_image(name, MIB)
    pairs = [("one.vhd", "one.avhd"), ("two.vhd", "two.avhd")]
    for number in range(1, 40):
        assert killed_at(number, lambda: vhdkit.snapshot_many(pairs)), "the snapshot ran to its end"
        if Path("one.avhd").exists():
            assert not Path("two.avhd").exists()
            return


def leftover() -> None:
    image()
    Path(".vhdkit-0123456789abcdef.part").write_bytes(bytes(1000))


def leaking() -> None:
    image(entries={2: 0xFFFFFFFF})


def unneeded() -> None:
    chain()
    vhdkit.create_child("old.avhd", "base.vhd")


def vhdx(fault: str) -> None:
    """`disk.vhdx` with a fault of its structures."""
    store = base()
    (HARMLESS | LOSSY)[fault][1](store)
    Path("disk.vhdx").write_bytes(store.contents())


def renewed() -> None:
    """A VHDX whose child was made before another program wrote to it; both read the same."""
    vhdkit.create_image("base.vhdx", 8 * MIB, disk_format="vhdx", block_size_bytes=BLOCK)
    vhdkit.create_child("leaf.avhdx", "base.vhdx")
    with FileStore.open("base.vhdx", writable=True) as store:
        set_header(store, data_write_guid=bytes(range(15, -1, -1)))


POISONED = seal_footer(put(Vhd(size=8 * MIB, block_size=BLOCK, chs=GEOMETRY).footer(), 0, b"v_poison"))
SCENES: dict[str, Callable[[], None]] = {
    "The parent is missing": missing,
    "The parent was moved": moved,
    "The parent was renamed": renamed,
    "The parent was converted, or copied by another program": converted,
    "The parent was written to after the child was made": chain,
    "A lost or damaged footer": lambda: image(tail=b""),
    "A damaged header": header,
    "A corrupt block table (BAT)": lambda: image(entries={3: 0x7FFFFFFF}),
    "A VHDX with a log that was not replayed": lambda: vhdx("log"),
    "A VHDX whose log cannot be replayed": lambda: vhdx("log gap"),
    "Damaged headers or region tables of a VHDX": lambda: vhdx("tables"),
    "The chain of virtual hard disks is corrupted": renewed,
    "Two equal headers of a VHDX": lambda: vhdx("headers equal"),
    "An interrupted merge": merging,
    "An interrupted pull": pulling,
    "Notes of a killed server": noted,
    "An interrupted resize, compact or repair": changing,
    "An interrupted snapshot of several disks": freezing,
    "The disk is full": leftover,
    "The image is in use": image,
    "0xC7 instead of a footer": lambda: image(tail=b"\xc7" * 512),
    "A poisoned footer (`v_poison`)": lambda: image(tail=POISONED, copy=POISONED),
    "QEMU shows another disk size": lambda: image(chs=(1024, 16, 63)),
    "Leaked space": leaking,
    "Layers that are no longer needed": unneeded,
}


@pytest.fixture(scope="module")
def warm() -> Iterator[WarmCommands]:
    """The commands, loaded once for all cases."""
    with warm_commands() as commands:
        yield commands


def test_every_case_has_a_scene() -> None:
    """Every case of the page is tested, and every scene is used."""
    assert list(cases()) == list(SCENES)


# A killed process closes nothing: what imitates one in a scene is dropped.
@pytest.mark.filterwarnings("ignore:.*was never closed:ResourceWarning")
@pytest.mark.parametrize(("heading", "typed"), cases().items(), ids=cases())
def test_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warm: WarmCommands, heading: str, typed: list[Command]
) -> None:
    """The commands of the case do what the page says, on a chain damaged in that way."""
    assert typed, "a case without a command"
    folder = tmp_path / "reader"
    folder.mkdir()
    monkeypatch.chdir(folder)
    SCENES[heading]()
    in_use = heading == "The image is in use"
    with (
        vhdkit.open_disk("disk.vhd", writable=True) if in_use else contextlib.nullcontext(),
        Shell(folder, tmp_path / "printed", reader_environment(folder, warm.bin)) as shell,
    ):
        for command in typed:
            type_in(shell, command)
