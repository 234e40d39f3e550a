# SPDX-License-Identifier: Apache-2.0
"""Interrupted merges of images whose ids change: what the record names, and that nothing else is removed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

import vhdkit
from tests.vhdkit.chain.verbs.test_merge import (
    FAMILIES,
    Stopped,
    content,
    families,
    files,
    make_chain,
    stop_at,
    stopped,
    write,
)
from tests.vhdkit.chain.verbs.test_merge_recovery import signed
from vhdkit import errors
from vhdkit.chain.records.intent import KIND, Phase, intent_of
from vhdkit.folder import sidecar_path
from vhdkit.formats.vhdx.blocks import VhdxImage
from vhdkit.formats.vhdx.format import VHDX
from vhdkit.image import Piece
from vhdkit.store import FileStore
from vhdkit.units import MIB


@pytest.fixture(autouse=True)
def _vhdx_in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    families.append(FAMILIES["vhdx"])
    yield
    families.pop()


def id_of(path: str) -> bytes:
    """The DataWriteGuid."""
    with FileStore.open(path) as store:
        return VHDX.linkage_id(store) or b""


def parents_of(path: str) -> tuple[bytes, ...]:
    """The ids that an image records for its parent."""
    with FileStore.open(path) as store:
        parent = VHDX.facts(store).parent
    assert parent is not None
    return parent.linkage_ids


def test_every_attempt_gives_the_target_the_id_of_the_first_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The record has the present id and the next one before the target gets it, and the layer above records both, the
    new one first; so does every later attempt. In the end children record the new one alone."""
    names = make_chain(3)
    vhdkit.create_child("child.avhdx", names[0])
    before, old = content(names[0]), id_of(names[2])
    honest, seen = VhdxImage.copy_in, []

    def copy_in(self: VhdxImage, pieces: Sequence[Piece]) -> None:
        intent = intent_of(names[2])
        assert intent is not None and intent.phase is Phase.COPY
        seen.append((intent.target.ids, parents_of(names[1])))
        honest(self, pieces)
        self.flush()
        raise errors.IoFailed("stopped")

    for number in range(3):
        with monkeypatch.context() as patch, pytest.raises(errors.IoFailed):
            patch.setattr(VhdxImage, "copy_in", copy_in)
            if number == 1:
                vhdkit.resume_merge(names[1])
            else:
                vhdkit.merge(names[0], into=names[2], relink_children=True)
        assert content("child.avhdx") == before
    (recorded, above), *others = seen
    assert recorded[0] == old and above == (recorded[1], old) and set(others) == {(recorded, above)}
    vhdkit.resume_merge(names[2])
    assert files() == ["base.vhdx", "child.avhdx"] and content("child.avhdx") == before
    assert id_of(names[2]) == recorded[1] and parents_of("child.avhdx") == (recorded[1],)


def test_a_target_with_an_id_from_another_program_is_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    """A target that was written to behind a merge's back is not the one of the record, nor the parent of its child."""
    names = make_chain(2)
    stopped(monkeypatch, names, 2)
    record = Path(sidecar_path(names[1], KIND))
    raw = record.read_bytes()
    record.unlink()
    os.mkdir("away")
    os.rename(names[0], f"away/{names[0]}")  # where no child is looked for
    write(names[1], 5)
    os.rename(f"away/{names[0]}", names[0])
    os.rmdir("away")
    record.write_bytes(raw)
    there = {name: Path(name).read_bytes() for name in files()}
    with pytest.raises(errors.ParentMismatch):
        vhdkit.resume_merge(names[1])
    assert {name: Path(name).read_bytes() for name in files()} == there


@pytest.mark.parametrize("step", [3, 4])
def test_a_leaf_that_another_program_wrote_to_stays(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """INV-RECORD-PROVEN: once the record says complete, the leaf is known only by its id. With another one it is left
    and reads as written; the images that are removed are not needed for that."""
    names = make_chain(2)
    vhdkit.create_child("child.avhdx", names[0])
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, step)
        vhdkit.merge(names[0], relink_children=True)
    record = Path(sidecar_path(names[1], KIND))
    raw = record.read_bytes()
    record.unlink()
    write(names[0], 5)
    record.write_bytes(raw)
    before, there = content(names[0]), files()
    if step == 3:  # relink
        with pytest.raises(errors.InvalidArgument, match="was written to since") as refused:
            vhdkit.resume_merge(names[1])
        assert refused.value.hint is not None and str(record) in refused.value.hint and files() == there
    else:
        done = vhdkit.resume_merge(names[1])
        assert done.removed == () and done.left == (os.path.realpath(names[0]),)
        assert files() == sorted(["base.vhdx", "child.avhdx", names[0]])
    assert content(names[0]) == before


GONE = ("gone.avhdx", b"\x77" * 16)
VICTIMS = ("notes.txt", "other.vhdx", "others.avhdx", "raw.img")


@pytest.mark.parametrize("phase", Phase)
@pytest.mark.parametrize("verb", ["resume", "open", "gc"])
@pytest.mark.parametrize(
    "sources",
    [
        [("notes.txt", b"\x11" * 16)],
        [("raw.img", b"\x11" * 16)],
        [("others.avhdx", None)],
        [("other.vhdx", None)],
        [GONE, ("others.avhdx", None)],
        [GONE, ("other.vhdx", None)],
        [GONE, ("child.avhdx", b"\x11" * 16)],
        [("others.avhdx", None), ("child.avhdx", None)],
    ],
    ids=lambda sources: "+".join(path for path, _ in sources),
)
def test_a_crafted_record_removes_nothing(sources: list[tuple[str, bytes | None]], verb: str, phase: Phase) -> None:
    """INV-RECORD-PROVEN: anyone can write names and ids into a record beside a VHDX: files that are no layers of that
    chain stay, and so does a child whose id is another one."""
    Path("notes.txt").write_bytes(b"important")
    Path("raw.img").write_bytes(os.urandom(4096))
    for base, child in (("base", "child"), ("other", "others")):
        vhdkit.create_image(f"{base}.vhdx", MIB, disk_format="vhdx")
        vhdkit.create_child(f"{child}.avhdx", f"{base}.vhdx")
    write("child.avhdx", 1, writes=2, zeros=0)
    before = {name: Path(name).read_bytes() for name in (*VICTIMS, "child.avhdx")}
    document = {
        "format": "vhdkit merge record 1",
        "phase": phase.value,
        "target": {"path": "base.vhdx", "unique_id": id_of("base.vhdx").hex(), "renewed_id": "99" * 16},
        "sources": [{"path": path, "unique_id": (own or id_of(path)).hex()} for path, own in sources],
        "relink": False,
    }
    Path(sidecar_path("base.vhdx", KIND)).write_bytes(signed(document))
    try:
        if verb == "resume":
            vhdkit.resume_merge("base.vhdx")
        elif verb == "open":
            vhdkit.open_disk("base.vhdx", writable=True).close()
        else:
            vhdkit.collect_garbage(".", ["base.vhdx", "others.avhdx", "child.avhdx"], delete=True)
    except errors.VhdkitError as error:
        assert str(error).isprintable()
    assert {name: Path(name).read_bytes() for name in before} == before
