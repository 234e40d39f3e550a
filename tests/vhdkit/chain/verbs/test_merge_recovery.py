# SPDX-License-Identifier: Apache-2.0
"""Records of merges, genuine and crafted: what they lead to, and that only merged layers are removed."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import vhdkit
from tests.vhdkit.chain.verbs.test_merge import (
    Stopped,
    content,
    each_format,
    each_format_nightly,
    family,
    make_chain,
    stop_at,
    write,
)
from vhdkit import OpenOptions, errors
from vhdkit.chain.records.intent import KIND, Phase, intent_of
from vhdkit.folder import sidecar_path

__all__ = ["each_format", "each_format_nightly"]


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def stopped(monkeypatch: pytest.MonkeyPatch, names: list[str], step: int) -> None:
    """A merge of all layers into the base that stopped before its n-th change of a name or the record."""
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, step)
        vhdkit.merge(names[0], into=names[-1])


def signed(document: object) -> bytes:
    """A record with a correct digest."""
    line = json.dumps(document).encode() + b"\n"
    return line + hashlib.sha256(line).hexdigest().encode() + b"\n"


def id_of(path: str) -> str:
    """The unique id as a record spells it; zeros if the file is not a VHD."""
    with vhdkit.open_disk(path, options=OpenOptions(lock=False)) as disk:
        found = disk.layer_ids[0]
    return "00" * 16 if found is None else found.replace("-", "")


def crafted(target: str, sources: list[tuple[str, str]], phase: str = "remove") -> bytes:
    """A record with chosen names and ids, as anyone could write it."""
    return signed(
        {
            "format": "vhdkit merge record 1",
            "phase": phase,
            "target": {"path": target, "unique_id": id_of(target)},
            "sources": [{"path": path, "unique_id": unique_id} for path, unique_id in sources],
            "relink": False,
        }
    )


GONE = ("gone.avhd", "77" * 16)  # a leaf that never existed


def victims() -> dict[str, bytes]:
    """Files that have nothing to do with a merge, and their content."""
    Path("sub").mkdir()
    Path("notes.txt").write_bytes(b"important")
    Path("raw.img").write_bytes(os.urandom(4096))
    Path("sub/deep.txt").write_bytes(b"deep")
    Path("../outside.txt").write_bytes(b"outside")
    vhdkit.create_image("base.vhd", 1 << 20)
    vhdkit.create_image("other.vhd", 1 << 20)
    vhdkit.create_child("others.avhd", "other.vhd")
    vhdkit.create_child("child.avhd", "base.vhd")
    os.symlink("notes.txt", "link.avhd")
    os.symlink("child.avhd", "link-to-it.avhd")
    return {name: Path(name).read_bytes() for name in VICTIMS}


VICTIMS = ("notes.txt", "raw.img", "sub/deep.txt", "../outside.txt", "other.vhd", "others.avhd", "link.avhd")
NULL = "00" * 16


@pytest.mark.parametrize(
    "sources",
    [
        [("notes.txt", NULL)],
        [GONE, ("raw.img", NULL)],
        [GONE, ("sub/deep.txt", NULL), ("notes.txt", NULL)],
        [GONE, ("../outside.txt", NULL)],
        [GONE, ("link.avhd", NULL)],
        [GONE, ("notes.txt", "11" * 16)],
        [GONE, ("other.vhd", "own")],
        [GONE, ("others.avhd", "own")],
        [GONE, ("link-to-it.avhd", "own")],
        [GONE, ("raw.img", "base")],
    ],
    ids=lambda sources: sources[-1][0] + " " + sources[-1][1][:2],
)
@pytest.mark.parametrize("phase", ["remove", "relink", "copy"])
@pytest.mark.parametrize("verb", ["resume", "open", "snapshot", "gc"])
def test_crafted_record_removes_nothing(sources: list[tuple[str, str]], phase: str, verb: str) -> None:
    """INV-RECORD-PROVEN: anyone can write names and ids into a record: no file is removed unless it is a layer of that
    merge, and a refusal is a typed error."""
    before = victims()
    filled = [
        (path, id_of(path) if one == "own" else id_of("base.vhd") if one == "base" else one) for path, one in sources
    ]
    Path(sidecar_path("base.vhd", KIND)).write_bytes(crafted("base.vhd", filled, phase))
    try:
        if verb == "resume":
            vhdkit.resume_merge("base.vhd")
        elif verb == "open":
            vhdkit.open_disk("base.vhd", writable=True).close()
        elif verb == "snapshot":
            vhdkit.snapshot("base.vhd", "new.avhd")
        else:
            vhdkit.collect_garbage(".", ["base.vhd", "others.avhd", "child.avhd"], delete=True)
    except errors.VhdkitError as error:
        assert str(error).isprintable()
    assert {name: Path(name).read_bytes() for name in VICTIMS} == before
    assert Path("child.avhd").exists() and Path("link-to-it.avhd").is_symlink()
    vhdkit.check("base.vhd")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda document: document.pop("sources"),
        lambda document: document.update(sources=7),
        lambda document: document.update(sources=[]),
        lambda document: document.update(sources=[None]),
        lambda document: document.update(sources=[{"path": 1, "unique_id": "11" * 16}]),
        lambda document: document.update(sources=[{"path": "a\0b", "unique_id": "11" * 16}]),
        lambda document: document.update(sources=[{"path": "", "unique_id": "11" * 16}]),
        lambda document: document.update(sources=[{"path": "x", "unique_id": None}]),
        lambda document: document.update(sources=[{"path": "x", "unique_id": "1"}]),
        lambda document: document.update(sources=[{"path": "x", "unique_id": NULL}]),
        lambda document: document.update(sources=[{"path": "base.vhd", "unique_id": "11" * 16}]),
        lambda document: document.update(target=[]),
        lambda document: document.update(target={"path": "x", "unique_id": NULL}),
        lambda document: document["target"].update(renewed_id=NULL),
        lambda document: document["target"].update(renewed_id="22"),
        lambda document: document["target"].update(renewed_id=GONE[1]),
        lambda document: document["sources"][0].update(renewed_id="22" * 16),
        lambda document: document.update(phase="destroy"),
        lambda document: document.update(phase=[]),
        lambda document: document.update(relink="yes"),
        lambda document: document.update(format=0),
        lambda document: document.clear(),
    ],
)
def test_malformed_records_are_damaged(spoil: Callable[[dict[str, Any]], object]) -> None:
    """`check` and resuming report a malformed record as "damaged"; the image beside it opens."""
    vhdkit.create_image("base.vhd", 1 << 20)
    document = json.loads(crafted("base.vhd", [GONE]).partition(b"\n")[0])
    spoil(document)
    Path(sidecar_path("base.vhd", KIND)).write_bytes(signed(document))
    with pytest.raises(errors.InvalidArgument, match="damaged"):
        vhdkit.resume_merge("base.vhd")
    assert [one.code for one in vhdkit.check("base.vhd")] == ["merge-record-ignored"]
    assert "damaged" in vhdkit.check("base.vhd")[0].message
    vhdkit.open_disk("base.vhd", writable=True).close()


@pytest.mark.usefixtures("each_format")
def test_names_of_other_images_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A merge stopped after its last removal, and the merged layer's name now belongs to another image. That image
    opens, is written to and stays, and the record is removed."""
    names = make_chain(2)
    stopped(monkeypatch, names, 4)  # the leaf is gone, the record is not
    assert os.path.exists(sidecar_path(names[1], KIND)) and not os.path.exists(names[0])
    before = content(names[1])
    vhdkit.create_child(names[0], names[1])
    assert vhdkit.resume_merge(names[1]).left == (os.path.realpath(names[0]),)
    write(names[0], 77)
    assert content(names[1]) == before and content(names[0]) != before
    assert not os.path.exists(sidecar_path(names[1], KIND))


@pytest.mark.parametrize("settled", [True, False])
@pytest.mark.usefixtures("each_format")
def test_snapshot_after_a_nearly_completed_merge(settled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A merge stopped after its last removal: the next default snapshot gets that name and makes a leaf that opens,
    even if a reader of the base prevented the removal of the record."""
    base, leaf = f"disk{family().base_suffix}", family().child("disk")
    vhdkit.create_image(base, 1 << 20, disk_format=family().kind)
    vhdkit.create_child(leaf, base)
    write(leaf, 1, writes=2, zeros=0)
    before = content(leaf)
    stopped(monkeypatch, [leaf, base], 4)
    if settled:
        assert vhdkit.snapshot(base) == leaf
        assert not os.path.exists(sidecar_path(base, KIND))
    else:
        with vhdkit.open_disk(base):
            assert vhdkit.snapshot(base) == leaf
        assert os.path.exists(sidecar_path(base, KIND))
    assert content(leaf) == before
    write(leaf, 2, writes=2, zeros=0)
    assert content(base) == before
    assert not [one for one in vhdkit.check(leaf) if one.severity is vhdkit.Severity.ERROR]


@pytest.mark.usefixtures("each_format")
def test_a_leaf_that_was_merged_is_not_resized(monkeypatch: pytest.MonkeyPatch) -> None:
    """A merge whose data is complete is completed before the leaf is resized; the target then has the new size."""
    names = make_chain(2)
    before = content(names[0])
    stopped(monkeypatch, names, 3)
    with pytest.raises(vhdkit.NotFound, match="was merged into"):
        vhdkit.resize(names[0], len(before) + (1 << 20))
    assert not os.path.exists(names[0]) and not os.path.exists(sidecar_path(names[1], KIND))
    vhdkit.resize(names[1], len(before) + (1 << 20))
    assert content(names[1]).startswith(before)


@pytest.mark.parametrize("verb", ["merge", "rebase"])
@pytest.mark.usefixtures("each_format")
def test_the_chain_of_a_complete_merge_stays(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base of merged layers does not change once the data is complete, or the merge could not be completed."""
    names = make_chain(4)
    before = content(names[0])
    stopped(monkeypatch, names, 3)
    with pytest.raises(vhdkit.ImageInUse, match="was interrupted") as refusal:
        if verb == "merge":
            vhdkit.merge(names[1], relink_children=True)
        else:
            vhdkit.rebase(names[1], names[2])
    assert all(os.path.exists(name) for name in names)
    assert "--resume" in str(refusal.value.hint)
    assert vhdkit.resume_merge(names[1]).removed == tuple(os.path.realpath(name) for name in names[:-1])
    assert content(names[-1]) == before


def follow_hint(problem: str) -> list[str]:
    """The command in a hint or a message of `check`: from `vhdkit` to the end of the quotation."""
    words = problem[problem.index("vhdkit merge") :].partition("`")[0].partition(";")[0]
    return shlex.split(words)[1:]


@pytest.mark.parametrize("step", range(1, 6))
@pytest.mark.parametrize("layout", ["beside", "above"])
@pytest.mark.parametrize("by_check", [True, False])
@pytest.mark.usefixtures("each_format_nightly")
def test_the_command_in_the_hint_completes_the_merge(
    step: int, layout: str, by_check: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever a merge stopped, and wherever its files are, the command that `check` or a refused open prints
    completes it; a second one is not needed."""
    from vhdkit.cli.main import main

    names = make_chain(3)
    if layout == "above":
        os.mkdir("sub")
        os.rename(names[2], f"sub/{names[2]}")
        vhdkit.rebase(names[1], f"sub/{names[2]}")
        names[2] = f"sub/{names[2]}"
    before = content(names[0])
    stopped(monkeypatch, names, step)
    if step == 1:
        assert vhdkit.merge_under_way(names[0]) is None
        return
    [hint] = [one.message for one in vhdkit.check(names[2]) if one.code == "merge-unfinished"]
    if by_check:
        words = follow_hint(hint)
    else:
        words = ["open"]
        try:
            vhdkit.open_disk(names[2], writable=True).close()
        except errors.VhdkitError as error:
            assert error.hint is not None
            allowed = "--allow-parent-dir" in error.hint and "vhdkit merge" not in error.hint
            more = ["--allow-parent-dir", "."] if allowed else []
            words = ["merge", "--resume", names[2], *more] if allowed else follow_hint(error.hint)
    if words != ["open"]:
        with pytest.raises(SystemExit) as end:
            main(words)
        assert end.value.code == 0
    assert content(names[2]) == before
    assert not os.path.exists(names[0]) and not os.path.exists(names[1])
    assert not [one for one in vhdkit.check(names[2]) if one.code.startswith("merge")]


@pytest.mark.usefixtures("each_format")
def test_a_lost_leaf_has_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the leaf of a merge that was still copying is gone for good, the error names the record, and without the
    record the image can be used as it is."""
    names = make_chain(2)
    stopped(monkeypatch, names, 2)
    os.unlink(names[0])
    with pytest.raises(errors.NotFound) as refused:
        vhdkit.resume_merge(names[1])
    record = sidecar_path(names[1], KIND)
    assert refused.value.hint is not None and record in refused.value.hint
    os.rename(record, "aside")
    vhdkit.open_disk(names[1], writable=True).close()


def test_record_of_0_1_0_without_a_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server of 0.1.0 could die with its leaf's last bits unflushed and the record at "remove": the error on opening
    names a way out, which leads to a disk that reads as the leaf's file does."""
    names = make_chain(2)
    stopped(monkeypatch, names, 3)
    intent = intent_of(names[1])
    assert intent is not None and intent.phase is Phase.REMOVE
    other = make_chain_again(names)
    with pytest.raises(errors.InvalidArgument) as refused:
        vhdkit.open_disk(names[1], writable=True)
    assert refused.value.hint is not None
    assert follow_hint(refused.value.hint)[:2] == ["merge", "--resume"]
    vhdkit.resume_merge(names[1])
    assert content(names[1]) == other


def make_chain_again(names: list[str]) -> bytes:
    """Change the content of the leaf's file, as if the last flush had not happened; return what it reads as now."""
    raw = Path(sidecar_path(names[1], KIND)).read_bytes()
    os.unlink(sidecar_path(names[1], KIND))
    write(names[0], 1234, writes=3, zeros=1)
    other = content(names[0])
    Path(sidecar_path(names[1], KIND)).write_bytes(raw)
    return other
