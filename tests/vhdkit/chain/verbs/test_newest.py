# SPDX-License-Identifier: Apache-2.0
"""The newest image of a line after a server's death: the same command line finds it, whatever the server was doing."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import vhdkit
from tests import noting
from tests.vhdkit.chain.verbs.test_live_merge import SIZE, disk_as_opened_now, make_chain, write_some
from tests.vhdkit.chain.verbs.test_merge_recovery import GONE, crafted, id_of
from tests.vhdkit.formats.test_remember import killed
from vhdkit import errors
from vhdkit.chain.engine.chain import Chain
from vhdkit.chain.names.options import OpenOptions
from vhdkit.chain.records import pending
from vhdkit.chain.records.intent import KIND
from vhdkit.chain.verbs import newest
from vhdkit.chain.verbs.live import freezing
from vhdkit.chain.verbs.live_merge import live_merge
from vhdkit.chain.verbs.merge_steps import RealNames
from vhdkit.chain.verbs.newest import newest_leaf
from vhdkit.folder import sidecar_path
from vhdkit.formats.vhd.dynamic import DynamicImage
from vhdkit.formats.vhdx.blocks import VhdxImage
from vhdkit.serve.opening import ExportRequest, OpenMode, open_exports
from vhdkit.store import FileStore, Store


class Killed(BaseException):
    """The server is killed here."""


def killed_at(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Kill the server before its n-th change of a name or a record."""
    seen = 0

    def counted(honest: Callable[..., None]) -> Callable[..., None]:
        def step(*words: object) -> None:
            nonlocal seen
            seen += 1
            if seen == number:
                raise Killed
            honest(*words)

        return step

    for name in ("write", "remove_record", "remove"):
        monkeypatch.setattr(RealNames, name, counted(getattr(RealNames, name)))


def let_go(chain: Chain) -> None:
    """What the kernel does to the files of a killed process."""
    for layer in chain.layers:
        if isinstance(layer, DynamicImage | VhdxImage):
            killed(layer)
        else:
            layer.store.close()


def merged_live(chain: Chain, first: int, target: int) -> Chain:
    """One pass of a live merge."""
    with live_merge(chain, first, target) as merging:
        merging.copy()
        chain, problem = merging.exchange()
        assert problem is None
        merging.done()
    return chain


def served(path: Path) -> bytes:
    """What clients read when this command line serves it again: `serve PATH --follow-leaf`."""
    [export] = open_exports([ExportRequest(str(path))], OpenMode(noting.options(), follow_leaf=True))
    try:
        assert export.disk.writable
        export.disk.write(0, export.disk.read(0, 512))
        return export.disk.read(0, SIZE)
    finally:
        export.disk.close()


BASES = ("dynamic", pytest.param("vhdx", marks=pytest.mark.nightly))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("named", [0, 1, 2])
@pytest.mark.parametrize("step", range(1, 6))
def test_killed_in_a_live_merge(
    step: int, named: int, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """INV-MERGE-PRESERVES: killed at any step of a merge of lower layers, the server continues with the leaf,
    whichever image of the line its command line names, as long as that exists."""
    paths, model = make_chain(tmp_path, 3, base, random.Random(step))
    chain = Chain.open(paths[0], writable=True)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, step)
        merged_live(chain, 1, 2)
    let_go(chain)
    if paths[named].exists():
        assert newest_leaf(paths[named], OpenOptions()) == str(paths[0])
        assert served(paths[named]) == model
    assert disk_as_opened_now(paths[0]) == model
    if step > 2:  # the copying was complete
        served(paths[2])
        assert not paths[1].exists() and not os.path.exists(sidecar_path(paths[2], KIND))


def test_a_source_removed_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not an error if another program removes a merged layer while the newest image is searched."""
    paths, _ = make_chain(tmp_path, 3, "dynamic", random.Random(1))
    chain = Chain.open(paths[0], writable=True)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, 4)
        merged_live(chain, 1, 2)
    let_go(chain)
    paths[1].unlink()
    monkeypatch.setattr(newest, "is_there", lambda one: True)  # it was there at the time of the check
    assert newest_leaf(paths[2], OpenOptions()) == str(paths[0])


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("named", [0, 1, 2])
@pytest.mark.parametrize("step", range(1, 5))
def test_killed_in_a_live_merge_of_the_leaf(
    step: int, named: int, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """INV-MERGE-PRESERVES: the leaf has writes that were not flushed when its own merge begins; killed at any step, a
    restart by the same command line completes the merge and continues serving."""
    rng = random.Random(step)
    paths, model = make_chain(tmp_path, 3, base, rng)
    chain = Chain.open(paths[0], writable=True)
    write_some(chain, model, rng, 4)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, step)
        merged_live(chain, 0, 1)
    let_go(chain)
    if step == 1:
        return  # nothing had begun, and nothing was flushed
    assert served(paths[named]) == model
    assert paths[0].exists() == (step == 2)


def test_merges_of_different_ages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records of three merges, stopped at three phases in three lives of a server, are not confused."""
    rng = random.Random(7)
    paths, model = make_chain(tmp_path, 8, "dynamic", rng)
    for first, target, step in ((6, 7, 2), (4, 5, 3), (1, 2, 4)):
        chain = Chain.open(paths[0], writable=True)
        write_some(chain, model, rng, 2)
        chain.flush()
        with monkeypatch.context() as patch, pytest.raises(Killed):
            killed_at(patch, step)
            merged_live(chain, first, target)
        let_go(chain)
    assert len([name for name in os.listdir(tmp_path) if name.endswith("merge")]) > 1
    for path in paths:
        if path.exists():
            assert newest_leaf(path, OpenOptions()) == str(paths[0])
    assert served(paths[7]) == model
    assert served(paths[7]) == model
    assert disk_as_opened_now(paths[0]) == model


def test_killed_while_the_merged_leaf_is_frozen_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A leaf is merged in passes and frozen anew for each. Killed after a relink, there are new names above it."""
    rng = random.Random(3)
    paths, model = make_chain(tmp_path, 2, "dynamic", rng)
    chain = Chain.open(paths[0], writable=True)
    for name in ("second.avhd", "third.avhd"):
        with freezing([(chain, str(tmp_path / name))]) as prepared:
            [chain] = prepared.freeze()
            prepared.done()
        write_some(chain, model, rng, 2)
        with monkeypatch.context() as patch, pytest.raises(Killed):
            killed_at(patch, 4)  # relinked, not removed
            merged_live(chain, 1, len(chain.layers) - 1)
        let_go(chain)
        assert newest_leaf(paths[1], OpenOptions()) == str(tmp_path / name)
        assert served(paths[1]) == model
        chain = Chain.open(tmp_path / name, writable=True)
    chain.close()


def test_a_crafted_record_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record that says the image was merged into a foreign one does not make that one served."""
    monkeypatch.chdir(tmp_path)
    vhdkit.create_image("disk.vhd", 1 << 20)
    vhdkit.create_image("evil.vhd", 1 << 20)
    Path(sidecar_path("evil.vhd", KIND)).write_bytes(crafted("evil.vhd", [GONE, ("disk.vhd", id_of("disk.vhd"))]))
    assert newest_leaf("disk.vhd", OpenOptions()) == "disk.vhd"


@pytest.fixture
def notes(tmp_path: Path) -> Iterator[Path]:
    """A folder for notes, in use while the test runs."""
    folder = tmp_path / "notes"
    folder.mkdir()
    noting.use_folder(str(folder))
    yield folder
    noting.use_folder(None)


def test_merging_the_leaf_leaves_no_notes(notes: Path, tmp_path: Path) -> None:
    """A live merge of the leaf under `--remember` leaves neither descriptors nor files of its notes."""
    rng = random.Random(5)
    paths, model = make_chain(tmp_path, 5, "dynamic", rng)
    chain = Chain.open(paths[0], writable=True, options=noting.options())
    before = None
    for _ in range(3):
        write_some(chain, model, rng, 3)
        chain = merged_live(chain, 0, 1)
        assert list(notes.iterdir()) == []
        opened = len(os.listdir("/proc/self/fd")) - len(chain.layers)
        assert before in (None, opened)
        before = opened
    write_some(chain, model, rng, 3)
    let_go(chain)  # killed
    assert served(paths[3]) == model


def test_a_missing_image(tmp_path: Path) -> None:
    """A missing image, of which no record says where its content is, is not found."""
    with pytest.raises(errors.NotFound):
        newest_leaf(tmp_path / "gone.vhd", OpenOptions())


@pytest.mark.parametrize("step", range(6))
def test_every_open_of_a_server_passes_the_folder_of_notes(
    step: int, notes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """INV-ANSWERED-SURVIVES: every image that a chain with notes opens for writing (new leaves, targets, relinked
    children, completed merges) gets the folder. Without it, answered writes would be dropped as another program's."""
    seen: list[tuple[str, str | None]] = []
    honest = pending.settle

    def settled(store: FileStore) -> None:
        seen.append((store.name, store.notes_folder))
        honest(store)

    made = DynamicImage.__init__

    def initialised(self: DynamicImage, store: Store, *words: Any, **more: Any) -> None:
        if more.get("writable") and isinstance(store, FileStore) and type(store) is FileStore:
            seen.append((store.name, store.notes_folder))
        made(self, store, *words, **more)

    rng = random.Random(step)
    paths, model = make_chain(tmp_path, 4, "dynamic", rng)
    monkeypatch.setattr(pending, "settle", settled)
    monkeypatch.setattr(DynamicImage, "__init__", initialised)
    chain = Chain.open(paths[0], writable=True, options=noting.options())
    with freezing([(chain, str(tmp_path / "new.avhd"))]) as prepared:
        [chain] = prepared.freeze()
        prepared.done()
    write_some(chain, model, rng, 3)
    chain = merged_live(chain, 2, 3)
    for first, target in ((1, 2), (0, 1)):
        with monkeypatch.context() as patch:
            killed_at(patch, step)
            try:
                chain = merged_live(chain, first, target)
            except Killed:
                let_go(chain)
                assert served(paths[3]) == model
                chain = Chain.open(newest_leaf(paths[3], noting.options()), writable=True, options=noting.options())
    assert len(chain.layers) < 5
    let_go(chain)
    assert served(paths[3]) == model
    assert {folder for _, folder in seen} == {str(notes)}, seen
