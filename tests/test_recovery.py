# SPDX-License-Identifier: Apache-2.0
"""docs/recovery.md, case by case: a chain is broken as the page says, and the page's commands are typed.

## A heading                        scene of that name breaks the files
$ vhdkit check x    # exit code 4   is run; the lines below must appear in what it prints, `...` stands for anything
"""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import vhdkit
from tests.killing import killed_at
from tests.support import ROOT
from tests.vhd_builder import MIB, Block, Vhd, pattern, put, seal_footer
from tests.vhdkit.cli.running import run
from vhdkit import DiskFormat
from vhdkit.formats.vhd import remember
from vhdkit.formats.vhd.dynamic import open_dynamic
from vhdkit.store import FileStore

PAGE = (ROOT / "docs" / "recovery.md").read_text(encoding="utf-8")
BLOCK = MIB
GEOMETRY = (240, 4, 17)  # of 8 MiB


def cases() -> Iterator[tuple[str, str]]:
    """(heading, section) of every case with commands."""
    for section in PAGE.split("\n## ")[1:]:
        heading, body = section.split("\n", 1)
        yield heading, body


def commands(section: str) -> Iterator[tuple[str, int, list[str]]]:
    """(command, exit code, expected lines) of a section, in order."""
    for block in re.findall(r"^```console\n(.*?)^```", section, re.MULTILINE | re.DOTALL):
        for piece in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            line, *expected = piece.rstrip("\n").split("\n")
            command, _, comment = line.partition("#")
            code = re.search(r"exit code (\d+)", comment)
            yield command.strip(), int(code[1]) if code else 0, expected


def chain(base: str = "base.vhd", leaf: str = "leaf.avhd") -> None:
    """A base with data and a child with data."""
    vhdkit.create_image(base, 8 * MIB, block_size_bytes=BLOCK)
    with vhdkit.open_disk(base, writable=True) as disk:
        disk.write(0, b"below")
    vhdkit.create_child(leaf, base)
    with vhdkit.open_disk(leaf, writable=True) as disk:
        disk.write(2 * MIB, b"above")


def image(**fields: object) -> None:
    """`disk.vhd`, dynamic, with two blocks, sound but for what the fields say."""
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
        assert killed_at(number, lambda: vhdkit.merge("leaf.avhd")), "the merge came to its end"
        if Path(".base.vhd.vhdkit-merge").exists():
            return


def changing() -> None:
    image(tail=b"")
    whole = Path("disk.vhd").read_bytes()
    for number in range(1, 40):
        assert killed_at(number, lambda: vhdkit.repair("disk.vhd")), "the repair came to its end"
        unfinished = any(one.code == "change-unfinished" for one in vhdkit.check("disk.vhd"))
        if unfinished and Path("disk.vhd").read_bytes() != whole:
            return
        for left in Path.cwd().iterdir():
            left.unlink()
        Path("disk.vhd").write_bytes(whole)


def noted() -> None:
    """A killed server's notes, and another program that wrote to the image before the server came back."""
    image()
    Path("notes").mkdir()
    try:
        remember.use_folder("notes")
        with FileStore.open("disk.vhd", writable=True) as store:
            open_dynamic(store, writable=True).write(3 * BLOCK // 512, memoryview(bytes(512)))
        remember.use_folder(None)
        vhdkit.open_disk("disk.vhd", writable=True).close()
        remember.use_folder("notes")
        vhdkit.open_disk("disk.vhd", writable=True).close()
    finally:
        remember.use_folder(None)
    vhdkit.compact("disk.vhd")


def freezing() -> None:
    for name in ("one.vhd", "two.vhd"):
        vhdkit.create_image(name, MIB)
    pairs = [("one.vhd", "one.avhd"), ("two.vhd", "two.avhd")]
    for number in range(1, 40):
        assert killed_at(number, lambda: vhdkit.snapshot_many(pairs)), "the snapshot came to its end"
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
    "An interrupted merge": merging,
    "Notes of a killed server": noted,
    "An interrupted resize, compact or repair": changing,
    "An interrupted snapshot of several disks": freezing,
    "The disk is full": leftover,
    "The image is in use": image,
    "0xC7 instead of a footer": lambda: image(tail=b"\xc7" * 512),
    "A poisoned footer (`v_poison`)": lambda: image(tail=POISONED, copy=POISONED),
    "QEMU shows another disk size": lambda: image(chs=(65535, 16, 255)),
    "Leaked space": leaking,
    "Layers nobody needs any more": unneeded,
}


def test_every_case_has_a_scene() -> None:
    """No case of the page is untested, and no scene is left over."""
    assert [heading for heading, _ in cases()] == list(SCENES)


# A killed process closes nothing: what plays one in a scene is dropped.
@pytest.mark.filterwarnings("ignore:.*was never closed:ResourceWarning")
@pytest.mark.parametrize(("heading", "section"), list(cases()), ids=[heading for heading, _ in cases()])
def test_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heading: str, section: str) -> None:
    """The commands of the case do on a chain broken so what the page says."""
    monkeypatch.chdir(tmp_path)
    SCENES[heading]()
    typed = list(commands(section))
    assert typed, "a case without a command"
    holder = vhdkit.open_disk("disk.vhd", writable=True) if heading == "The image is in use" else None
    for command, code, expected in typed:
        words = shlex.split(command)
        assert words[0] == "vhdkit"
        result = run(*words[1:])
        assert result.exit_code == code, f"{command}: {result.exit_code}\n{result.output}"
        lines = result.stdout.splitlines() + result.stderr.splitlines()
        for wanted in expected:
            form = ".*".join(re.escape(part.strip()) for part in wanted.split("..."))
            shape = re.compile(re.sub(r"(\\ )+", r"\\s+", form))
            assert any(shape.search(line) for line in lines), f"{command}: no line {wanted!r} in\n{result.output}"
    if holder is not None:
        holder.close()
