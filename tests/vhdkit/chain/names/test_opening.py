# SPDX-License-Identifier: Apache-2.0
"""Finding parents: by every name a child can have for one, and never where an untrusted image may not point."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

import vhdkit
from tests.harness.vhd_builder import PARENT_ID, Block, Locator, Vhd, absolute, child, pattern, relative
from vhdkit import errors
from vhdkit.chain.names.children import find_children
from vhdkit.chain.names.opening import MAX_CHAIN_DEPTH, open_layers
from vhdkit.chain.names.options import OpenOptions
from vhdkit.chain.names.parents import linkage_id_of
from vhdkit.errors import CorruptReason
from vhdkit.store import FileStore

TEXT = pattern(512, 9)


def parent(**fields: object) -> Vhd:
    """A dynamic image with the id that `child` records, and one sector that proves it was read."""
    values: dict[str, object] = {"unique_id": PARENT_ID, "blocks": {0: Block(TEXT)}}
    return Vhd(**(values | fields))  # type: ignore[arg-type]  # every name is one of Vhd's


def first_sector(path: Path, **options: object) -> bytes:
    """The first sector of the chain, which the parent owns."""
    with vhdkit.open_disk(path, options=OpenOptions(**options)) as disk:  # type: ignore[arg-type]
        return disk.read(0, 512)


def write_pair(folder: Path, image: Vhd, parent_name: str = "parent.vhd") -> Path:
    """Write a parent and a child; return the child's path."""
    (folder / parent_name).parent.mkdir(parents=True, exist_ok=True)
    parent().build().write(folder / parent_name)
    return image.build().write(folder / "child.avhd")


def no_names(**fields: object) -> Vhd:
    """A child without a name in the header; the caller chooses the locators."""
    return child(**({"parent_name": b""} | fields))  # type: ignore[arg-type]  # every name is one of Vhd's


@pytest.mark.parametrize(
    ("locator", "place"),
    [
        (relative(".\\parent.vhd"), "parent.vhd"),
        (relative("parent.vhd"), "parent.vhd"),
        (relative("./parent.vhd"), "parent.vhd"),
        (relative(".\\sub dir\\deep\\parent.vhd"), "sub dir/deep/parent.vhd"),
        (relative(".\\pärent дiск.vhd"), "pärent дiск.vhd"),
        (relative(".\\PARENT.VHD"), "parent.vhd"),
        (relative(".\\SUB\\Parent.vhd"), "sub/parent.vhd"),
        (absolute("C:\\Virtual Machines\\parent.vhd"), "parent.vhd"),
        (absolute("\\\\server\\share\\parent.vhd"), "parent.vhd"),
        (absolute(".\\parent.vhd"), "parent.vhd"),
        (Locator(b"MacX", b"file://./parent.vhd"), "parent.vhd"),
        (Locator(b"MacX", b"file://localhost/Users/me/parent.vhd"), "parent.vhd"),
        (Locator(b"MacX", b"file://./p%C3%A4rent%20a.vhd"), "pärent a.vhd"),
        (Locator(b"Wi2r", b".\\parent.vhd"), "parent.vhd"),
        (Locator(b"Wi2k", b"D:\\parent.vhd"), "parent.vhd"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.code.decode(),
)
@pytest.mark.parametrize("slot", [0, 3, 7])
def test_each_locator_kind_finds_the_parent(tmp_path: Path, locator: Locator, place: str, slot: int) -> None:
    """Any single locator, in any slot, finds the parent, with Windows separators, blanks and non-ASCII letters."""
    leaf = write_pair(tmp_path, no_names(locators={slot: locator}), place)
    assert first_sector(leaf) == TEXT


def test_absolute_locator_of_this_machine(tmp_path: Path) -> None:
    """An absolute path without a drive letter is a path on this machine, if that folder is allowed."""
    leaf = write_pair(tmp_path, no_names(locators={1: absolute(str(tmp_path / "x/parent.vhd").replace("/", "\\"))}))
    (tmp_path / "x").mkdir()
    (tmp_path / "parent.vhd").rename(tmp_path / "x/parent.vhd")
    assert first_sector(leaf) == TEXT


def test_header_name_alone_is_enough(tmp_path: Path) -> None:
    """Without locators the header's parent name is used, even if it is a complete Windows path."""
    name = "C:\\Projects\\vm\\parent.vhd".encode("utf-16-be")
    assert first_sector(write_pair(tmp_path, child(locators={}, parent_name=name))) == TEXT


def test_exact_spelling_wins_over_another_case(tmp_path: Path) -> None:
    """The case-insensitive match is the last resort: a file with the exact spelling is preferred."""
    leaf = write_pair(tmp_path, no_names(locators={0: relative(".\\parent.vhd")}))
    Vhd(unique_id=bytes(range(16))).build().write(tmp_path / "PARENT.vhd")
    assert first_sector(leaf) == TEXT


def test_of_disagreeing_locators_the_right_id_wins(tmp_path: Path) -> None:
    """INV-PARENT-ID: of eight locators that disagree, only the file with the recorded id is accepted."""
    for number in range(7):
        Vhd(unique_id=uuid.UUID(int=number + 99).bytes).build().write(tmp_path / f"decoy{number}.vhd")
    locators = {number: relative(f".\\decoy{number}.vhd") for number in range(7)}
    leaf = write_pair(tmp_path, no_names(locators=locators | {7: relative(".\\parent.vhd")}))
    assert first_sector(leaf) == TEXT


def test_wrong_id_is_never_accepted(tmp_path: Path) -> None:
    """INV-PARENT-ID: a file with the parent's name but another id is refused, and both ids are reported."""
    leaf = write_pair(tmp_path, child())
    other = uuid.UUID("12345678-1234-5678-1234-567812345678")
    parent(unique_id=other.bytes).build().write(tmp_path / "parent.vhd")
    with pytest.raises(errors.ParentMismatch, match=str(other)) as caught:
        open_layers(leaf)
    assert str(uuid.UUID(bytes=PARENT_ID)) in str(caught.value)
    assert caught.value.exit_code == 6


def test_missing_parent_names_every_place_and_the_remedy(tmp_path: Path) -> None:
    """The error lists each path that was tried, the recorded id, and the command that repoints the image."""
    locators = {0: relative(".\\a\\parent.vhd"), 1: absolute("C:\\b\\other.vhd")}
    leaf = child(locators=locators).build().write(tmp_path / "child.avhd")
    with pytest.raises(errors.ParentMissing) as caught:
        open_layers(leaf, options=OpenOptions(parent_dirs=(str(tmp_path / "more"),)))
    text = str(caught.value)
    for place in ("a/parent.vhd", "parent.vhd", "other.vhd", "more/parent.vhd", "more/other.vhd"):
        assert str(tmp_path / place) in text
    assert str(uuid.UUID(bytes=PARENT_ID)) in text
    assert "vhdkit rebase" in text and "--allow-parent-dir" in text
    assert "\n" not in text


@pytest.mark.parametrize(
    "text",
    [
        "\\etc\\passwd",
        "..\\..\\..\\..\\..\\..\\..\\..\\etc\\passwd",
        "/etc/passwd",
        ".\\sub\\..\\..\\outside\\parent.vhd",
        "\\\\.\\PhysicalDrive0",
        "\\\\?\\C:\\parent.vhd",
        "http://example.test/parent.vhd",
        "file:///etc/passwd",
        "\\dev\\zero",
        "con:",
        "a\0b",
        "..",
        ".",
        "\\",
        "x" * 5000,
        "a\\" * 3000,
    ],
)
def test_hostile_names_are_refused(tmp_path: Path, text: str) -> None:
    """Absolute paths, "..", UNC, URLs, devices, endless names: the parent is refused, and no file is opened."""
    (tmp_path / "outside").mkdir()
    parent().build().write(tmp_path / "outside/parent.vhd")
    (tmp_path / "in").mkdir()
    leaf = no_names(locators={0: relative(text), 1: absolute(text)}).build().write(tmp_path / "in/child.avhd")
    with pytest.raises(errors.ParentError) as caught:
        open_layers(leaf)
    assert "\n" not in str(caught.value)


def test_a_parent_outside_the_folder_needs_an_option(tmp_path: Path) -> None:
    """A parent in another folder is refused, and the error names the option; with it, the chain opens."""
    (tmp_path / "my bases").mkdir()
    parent().build().write(tmp_path / "my bases/parent.vhd")
    (tmp_path / "in").mkdir()
    leaf = no_names(locators={0: relative("..\\my bases\\parent.vhd")}).build().write(tmp_path / "in/child.avhd")
    with pytest.raises(errors.ParentRefused, match=f"--allow-parent-dir '{tmp_path}/my bases'"):
        open_layers(leaf)
    assert first_sector(leaf, parent_dirs=(str(tmp_path / "my bases"),)) == TEXT


@pytest.mark.parametrize("link_target", ["file", "folder"])
def test_links_that_leave_the_folder_are_refused(tmp_path: Path, link_target: str) -> None:
    """A symbolic link inside the folder does not make its target an allowed parent."""
    (tmp_path / "outside").mkdir()
    parent().build().write(tmp_path / "outside/parent.vhd")
    (tmp_path / "in").mkdir()
    if link_target == "file":
        (tmp_path / "in/parent.vhd").symlink_to(tmp_path / "outside/parent.vhd")
        name = ".\\parent.vhd"
    else:
        (tmp_path / "in/way").symlink_to(tmp_path / "outside")
        name = ".\\way\\parent.vhd"
    leaf = no_names(locators={0: relative(name)}).build().write(tmp_path / "in/child.avhd")
    with pytest.raises(errors.ParentRefused):
        open_layers(leaf)


def test_a_leaf_opened_through_a_link_uses_its_real_folder(tmp_path: Path) -> None:
    """The user chose the link to the leaf: parents are sought where the file really is."""
    (tmp_path / "real").mkdir()
    leaf = write_pair(tmp_path / "real", child())
    (tmp_path / "link.avhd").symlink_to(leaf)
    assert first_sector(tmp_path / "link.avhd") == TEXT


@pytest.mark.parametrize("kind", ["fifo", "folder", "empty"])
def test_other_files_with_the_parents_name_are_refused(tmp_path: Path, kind: str) -> None:
    """A pipe, a folder or an empty file under the parent's name is not accepted, and does not block."""
    place = tmp_path / "parent.vhd"
    {"fifo": lambda: os.mkfifo(place), "folder": place.mkdir, "empty": place.touch}[kind]()
    leaf = child().build().write(tmp_path / "child.avhd")
    with pytest.raises(errors.ParentError):
        open_layers(leaf)


def test_raw_parent_only_when_allowed(tmp_path: Path) -> None:
    """A null parent id means any raw file: refused unless the user allows it."""
    (tmp_path / "base.img").write_bytes(TEXT.ljust(4 << 20, b"\1"))
    leaf = child("base.img", parent_id=bytes(16)).build().write(tmp_path / "child.avhd")
    with pytest.raises(errors.ParentRefused, match="--allow-raw-parent"):
        open_layers(leaf)
    assert first_sector(leaf, allow_raw_parent=True) == TEXT


def test_a_raw_parent_stays_raw_whatever_its_guest_writes(tmp_path: Path) -> None:
    """INV-PARENT-READ-ONLY: a footer that a guest wrote to the end of its raw disk hides neither the disk from its
    child nor the child from a writable open of the disk."""
    base, leaf = tmp_path / "base.img", tmp_path / "child.avhd"
    raw = vhdkit.OpenOptions(format_name=vhdkit.FormatName.RAW, allow_raw_parent=True)
    vhdkit.create_image(tmp_path / "fixed.vhd", 1 << 20, disk_format=vhdkit.DiskFormat.FIXED)
    footer = (tmp_path / "fixed.vhd").read_bytes()[-512:]
    base.write_bytes(TEXT.ljust((1 << 20) - 512, b"\1") + footer)
    vhdkit.create_child(leaf, base, options=raw)
    assert first_sector(leaf, allow_raw_parent=True) == TEXT
    with vhdkit.open_disk(leaf, options=vhdkit.OpenOptions(allow_raw_parent=True)) as disk:
        assert disk.size_bytes == 1 << 20 and disk.read((1 << 20) - 512, 512) == footer
    with pytest.raises(errors.HasChildren, match=r"child\.avhd"):
        vhdkit.open_disk(base, writable=True, options=raw)


def chain_of(folder: Path, depth: int) -> Path:
    """`depth` layers, each the child of the previous one."""
    path = folder / "l0.vhd"
    vhdkit.create_image(path, 1 << 20)
    with vhdkit.open_disk(path, writable=True) as disk:
        disk.write(0, TEXT)
    for number in range(1, depth):
        path = path.with_name(f"l{number}.vhd")
        base = folder / f"l{number - 1}.vhd"
        unique = uuid.UUID(int=number).bytes
        with FileStore.open(base) as store:
            parent_id = linkage_id_of(store)
        child(base.name, parent_id=parent_id, unique_id=unique, size=1 << 20).build().write(path)
    return path


def test_the_depth_limit(tmp_path: Path) -> None:
    """The deepest allowed chain opens; one with another layer is refused with the reason."""
    leaf = chain_of(tmp_path, MAX_CHAIN_DEPTH + 1)
    assert first_sector(tmp_path / f"l{MAX_CHAIN_DEPTH - 1}.vhd") == TEXT
    with pytest.raises(errors.CorruptImage) as caught:
        open_layers(leaf)
    assert caught.value.reason is CorruptReason.CHAIN_DEPTH


@pytest.mark.parametrize("length", [1, 2, 3])
@pytest.mark.parametrize("writable", [False, True])
def test_loops_are_refused(tmp_path: Path, length: int, writable: bool) -> None:
    """A chain that leads back to itself is an error at any length and in any mode, and the search ends."""
    for number in range(length):
        after = (number + 1) % length
        image = child(
            f"l{after}.vhd", unique_id=uuid.UUID(int=number + 1).bytes, parent_id=uuid.UUID(int=after + 1).bytes
        )
        image.build().write(tmp_path / f"l{number}.vhd")
    with pytest.raises(errors.VhdkitError) as caught:
        open_layers(tmp_path / "l0.vhd", writable=writable)
    loop = isinstance(caught.value, errors.CorruptImage) and caught.value.reason is CorruptReason.CHAIN_LOOP
    assert loop or (writable and isinstance(caught.value, errors.HasChildren))


def test_child_larger_than_parent_reads_zeros_beyond(tmp_path: Path) -> None:
    """The part behind the parent's end reads as zeros."""
    parent(size=2 << 20, blocks={0: Block(pattern(2 << 20))}).build().write(tmp_path / "parent.vhd")
    leaf = child(size=4 << 20).build().write(tmp_path / "child.avhd")
    with vhdkit.open_disk(leaf) as disk:
        assert disk.size_bytes == 4 << 20
        assert disk.read(0, 4 << 20) == pattern(2 << 20).ljust(4 << 20, b"\0")


def test_a_parent_timestamp_mismatch_is_only_a_warning(tmp_path: Path) -> None:
    """Tools that touch a parent change its time: the chain opens, and `check` warns."""
    leaf = write_pair(tmp_path, child(parent_timestamp=12345))
    assert first_sector(leaf) == TEXT
    codes = {finding.code: finding.severity for finding in vhdkit.check(leaf)}
    assert codes["parent-timestamp"] is vhdkit.Severity.NOTE


def test_two_writers_are_refused_and_readers_share(tmp_path: Path) -> None:
    """A writer excludes everyone else, readers exclude writers, and readers share."""
    leaf = write_pair(tmp_path, child())
    with vhdkit.open_disk(leaf, writable=True):
        for writable in (False, True):
            with pytest.raises(errors.ImageInUse):
                vhdkit.open_disk(leaf, writable=writable)
    with vhdkit.open_disk(leaf), vhdkit.open_disk(leaf), pytest.raises(errors.ImageInUse):
        vhdkit.open_disk(leaf, writable=True)
    vhdkit.open_disk(leaf, writable=True).close()


def test_locks_hold_between_processes(tmp_path: Path) -> None:
    """Another process is refused like another open disk, and admitted after the first one has ended."""
    leaf = write_pair(tmp_path, child())
    code = "import sys, vhdkit\ntry: vhdkit.open_disk(sys.argv[1])\nexcept vhdkit.ImageInUse: sys.exit(5)"
    command = [sys.executable, "-c", code, str(leaf)]
    with vhdkit.open_disk(leaf, writable=True):
        assert subprocess.run(command, check=False).returncode == 5
    assert subprocess.run(command, check=False).returncode == 0


def test_inv_parent_read_only_base_is_held_while_a_child_is_open(tmp_path: Path) -> None:
    """INV-PARENT-READ-ONLY: while a child is open, no one can open its base for writing."""
    leaf = write_pair(tmp_path, child())
    with vhdkit.open_disk(leaf), pytest.raises(errors.ImageInUse):
        vhdkit.open_disk(tmp_path / "parent.vhd", writable=True, options=OpenOptions())
    store = FileStore.open(tmp_path / "parent.vhd", writable=True)
    with store, vhdkit.open_disk(leaf, writable=True), pytest.raises(errors.ImageInUse):
        store.lock(writer=True)


def test_inv_parent_read_only_writable_open_names_the_child(tmp_path: Path) -> None:
    """INV-PARENT-READ-ONLY: an image with a child in its folder, or in a given one, is not opened for writing."""
    write_pair(tmp_path, child())
    base = tmp_path / "parent.vhd"
    with pytest.raises(errors.HasChildren, match=r"child\.avhd") as caught:
        vhdkit.open_disk(base, writable=True)
    assert caught.value.exit_code == 5
    with vhdkit.open_disk(base):
        pass
    (tmp_path / "far").mkdir()
    (tmp_path / "child.avhd").rename(tmp_path / "far/child.avhd")
    with pytest.raises(errors.HasChildren):
        vhdkit.open_disk(base, writable=True, options=OpenOptions(parent_dirs=(str(tmp_path / "far"),)))
    vhdkit.open_disk(base, writable=True).close()


def test_find_children_skips_everything_else(tmp_path: Path) -> None:
    """Among raw files, damaged images, pipes and other chains, only the true children are found."""
    leaf = write_pair(tmp_path, child())
    (tmp_path / "noise.bin").write_bytes(os.urandom(4096))
    (tmp_path / "broken.vhd").write_bytes(leaf.read_bytes()[:1000])
    os.mkfifo(tmp_path / "pipe.vhd")
    child(parent_id=uuid.UUID(int=5).bytes).build().write(tmp_path / "stranger.avhd")
    assert find_children(PARENT_ID, [str(tmp_path)]) == [str(leaf)]


def test_nothing_is_changed_or_held_on_error(tmp_path: Path) -> None:
    """A writable open that fails because of a missing parent leaves the file unchanged, unlocked and unmended."""
    leaf = child(tail=b"").build().write(tmp_path / "child.avhd")
    before = leaf.read_bytes()
    with pytest.raises(errors.ParentMissing):
        vhdkit.open_disk(leaf, writable=True)
    assert leaf.read_bytes() == before
    with FileStore.open(leaf, writable=True) as store:
        store.lock(writer=True)


def _looked_at(monkeypatch: pytest.MonkeyPatch, *, opened: bool = False) -> list[str]:
    """The real names of everything that is opened, listed or examined from now on, or with `opened` only opened."""
    seen: list[str] = []
    real_open, real_readlink = os.open, os.readlink

    def note(path: object, dir_fd: int | None) -> None:
        if isinstance(path, int):
            seen.append(real_readlink(f"/proc/self/fd/{path}"))
        elif not os.fspath(path).startswith("/proc/self/"):  # type: ignore[call-overload]
            folder = os.getcwd() if dir_fd is None else real_readlink(f"/proc/self/fd/{dir_fd}")
            seen.append(os.path.join(folder, os.fspath(path)))  # type: ignore[call-overload]

    def record_open(path: str, flags: int, *rest: int, dir_fd: int | None = None) -> int:
        if not (opened and flags & os.O_PATH):
            note(path, dir_fd)
        return real_open(path, flags, *rest, dir_fd=dir_fd)

    def recording(real: Callable[..., object]) -> Callable[..., object]:
        def record(path: object = ".", *rest: object, dir_fd: int | None = None, **options: object) -> object:
            note(path, dir_fd)
            return real(path, *rest, **({} if dir_fd is None else {"dir_fd": dir_fd}), **options)

        return record

    monkeypatch.setattr(os, "open", record_open)
    for name in () if opened else ("listdir", "scandir", "stat", "lstat", "readlink", "access"):
        monkeypatch.setattr(os, name, recording(getattr(os, name)))
    return seen


@pytest.mark.parametrize("text", ["..\\OUTSIDE\\Parent.vhd", "..\\outside\\parent.vhd", "..\\none\\parent.vhd"])
@pytest.mark.parametrize("way", ["locator", "link", "absolute link", "folder link"])
def test_nothing_outside_the_folder_is_examined(
    tmp_path: Path, text: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """INV-NAME-WITHIN: an image cannot make us look into other folders: that might hang, or mount file systems."""
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    parent().build().write(outside / "parent.vhd")
    path = Path(text.replace("\\", "/"))
    if way == "folder link":
        (inside / "way").symlink_to(path.parent)
        text = f".\\way\\{path.name}"
    elif way != "locator":
        (inside / "way.vhd").symlink_to(path if way == "link" else tmp_path / path.relative_to(".."))
        text = ".\\way.vhd"
    leaf = no_names(locators={0: relative(text)}).build().write(inside / "child.avhd")
    seen = _looked_at(monkeypatch)
    with pytest.raises(errors.ParentRefused, match="--allow-parent-dir"):
        open_layers(leaf)
    assert str(leaf) in seen
    elsewhere = {str(tmp_path / name) for name in ("outside", "OUTSIDE", "none")}
    assert [one for one in seen if any(os.path.normpath(one).startswith(there) for there in elsewhere)] == []


@pytest.mark.parametrize("kind", ["relative", "absolute", "up and down", "as it was called"])
def test_links_that_stay_inside_are_followed(tmp_path: Path, kind: str) -> None:
    """A link to a parent in an allowed folder works, even if that folder is itself reached through a link."""
    inside, bases = tmp_path / "inside", tmp_path / "bases"
    (inside / "sub").mkdir(parents=True)
    bases.mkdir()
    (tmp_path / "called").symlink_to(bases)
    parent().build().write(bases / "real.vhd")
    target = {
        "relative": "../bases/real.vhd",
        "absolute": str(bases / "real.vhd"),
        "up and down": "sub/../../bases/real.vhd",
        "as it was called": str(tmp_path / "called/real.vhd"),
    }[kind]
    (inside / "parent.vhd").symlink_to(target)
    leaf = child().build().write(inside / "child.avhd")
    assert first_sector(leaf, parent_dirs=(str(tmp_path / "called"),)) == TEXT
    layers = open_layers(leaf, options=OpenOptions(parent_dirs=(str(tmp_path / "called"),)))
    assert layers[1].store.name == str(bases / "real.vhd")
    for layer in layers:
        layer.close()


def test_a_folder_that_becomes_a_link_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """INV-NAME-WITHIN: replacing a folder by a link while a parent is searched makes no file outside the parent."""
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    (inside / "sub").mkdir(parents=True)
    outside.mkdir()
    parent().build().write(inside / "sub/parent.vhd")
    parent().build().write(outside / "parent.vhd")
    leaf = no_names(locators={0: relative(".\\sub\\parent.vhd")}).build().write(inside / "child.avhd")
    wanted, real_open = (outside / "parent.vhd").stat().st_ino, os.open
    outcomes: set[type] = set()
    for moment in range(100):
        calls = 0

        def swapping(path: str, flags: int, *rest: int, moment: int = moment, dir_fd: int | None = None) -> int:
            nonlocal calls
            if calls == moment:
                (inside / "sub").rename(inside / "away")
                (inside / "sub").symlink_to(outside)
            calls += 1
            return real_open(path, flags, *rest, dir_fd=dir_fd)

        with monkeypatch.context() as patch:
            patch.setattr(os, "open", swapping)
            try:
                layers = open_layers(leaf, options=OpenOptions(lock=False))
            except errors.ParentError as error:
                outcomes.add(type(error))
            else:
                outcomes.add(FileStore)
                assert os.fstat(layers[1].store.fileno()).st_ino != wanted  # type: ignore[attr-defined]
                for layer in layers:
                    layer.close()
        if calls <= moment:
            break
        (inside / "sub").unlink()
        (inside / "away").rename(inside / "sub")
    assert outcomes == {errors.ParentRefused, FileStore}, "the folder was not swapped before and after the look"


def test_a_link_found_by_ignoring_case_may_not_leave_either(tmp_path: Path) -> None:
    """A link found under another spelling is followed and judged like the name in the child."""
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    parent().build().write(outside / "real.vhd")
    (inside / "Parent.VHD").symlink_to(outside / "real.vhd")
    leaf = child().build().write(inside / "child.avhd")
    with pytest.raises(errors.ParentRefused) as caught:
        open_layers(leaf)
    assert str(outside) in (caught.value.hint or "")
    assert first_sector(leaf, parent_dirs=(str(outside),)) == TEXT


def test_a_pipe_with_the_parents_name_is_not_even_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening a pipe or a device can have side effects, so its type is examined first."""
    leaf = child().build().write(tmp_path / "child.avhd")
    os.mkfifo(tmp_path / "parent.vhd")
    seen = _looked_at(monkeypatch, opened=True)
    with pytest.raises(errors.ParentMissing):
        open_layers(leaf)
    assert str(tmp_path / "parent.vhd") not in seen


@pytest.mark.parametrize("text", ["C:\\disks\\gone.vhd", "\\\\disks\\share\\gone.vhd", "\\\\?\\C:\\disks\\gone.vhd"])
def test_a_path_on_a_drive_or_server_is_reduced_to_its_name(tmp_path: Path, text: str) -> None:
    """Of a path on another machine only the file name is looked for, in the image's folder."""
    leaf = no_names(locators={0: absolute(text)}).build().write(tmp_path / "child.avhd")
    with pytest.raises(errors.ParentMissing) as caught:
        open_layers(leaf)
    assert f"searched {tmp_path / 'gone.vhd'};" in str(caught.value)


def test_an_image_that_is_its_own_parent_is_a_loop(tmp_path: Path) -> None:
    """It is not reported as its own child: a writable open detects the loop as well."""
    leaf = child("leaf.vhd", unique_id=PARENT_ID).build().write(tmp_path / "leaf.vhd")
    with pytest.raises(errors.CorruptImage) as caught:
        open_layers(leaf, writable=True)
    assert caught.value.reason is CorruptReason.CHAIN_LOOP


def test_only_differencing_images_are_children(tmp_path: Path) -> None:
    """A dynamic image that has the id in its unused field, or a fixed one, does not count as a child."""
    Vhd(parent_id=PARENT_ID).build().write(tmp_path / "dynamic.vhd")
    Vhd(size=1 << 20, disk_type=2).build().write(tmp_path / "fixed.vhd")
    leaf = child().build().write(tmp_path / "child.vhd")
    assert find_children(PARENT_ID, [str(tmp_path)]) == [str(leaf)]


@pytest.mark.parametrize("writable", [False, True])
def test_no_descriptor_stays_open_after_an_error(tmp_path: Path, writable: bool) -> None:
    """A chain that breaks at its third layer closes the first two."""
    middle = uuid.UUID(int=7).bytes
    child("gone.vhd", unique_id=middle).build().write(tmp_path / "middle.vhd")
    leaf = child("middle.vhd", parent_id=middle).build().write(tmp_path / "leaf.vhd")
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(errors.ParentMissing):
        open_layers(leaf, writable=writable)
    assert len(os.listdir("/proc/self/fd")) == before


def test_messages_about_hostile_names_are_short(tmp_path: Path) -> None:
    """Eight locators of the maximum length give a message that is still readable."""
    locators = {slot: relative(f"{slot}\\" + "a\\" * 16000) for slot in range(8)}
    leaf = no_names(locators=locators).build().write(tmp_path / "child.avhd")
    with pytest.raises(errors.ParentMissing) as caught:
        open_layers(leaf)
    assert len(str(caught.value)) < 40_000


def test_a_child_beside_a_link_to_its_parent_counts(tmp_path: Path) -> None:
    """INV-PARENT-READ-ONLY: a parent opened through a link is not written to if a child is beside that link."""
    real, links = tmp_path / "real", tmp_path / "links"
    real.mkdir()
    links.mkdir()
    vhdkit.create_image(real / "base.vhd", 1 << 20)
    (links / "base.vhd").symlink_to(real / "base.vhd")
    options = OpenOptions(parent_dirs=(str(real),))
    vhdkit.create_child(links / "child.avhd", links / "base.vhd", options=options)
    with pytest.raises(errors.HasChildren, match="child"):
        vhdkit.open_disk(links / "base.vhd", writable=True)
    with pytest.raises(errors.HasChildren, match="child"):
        vhdkit.resize(links / "base.vhd", 1 << 21)
