# SPDX-License-Identifier: Apache-2.0
"""A layer that would make its chain too deep to be opened is refused when it is made."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

import vhdkit
from vhdkit import errors
from vhdkit.chain.engine.chain import Chain
from vhdkit.chain.names import opening
from vhdkit.chain.verbs.live import freezing, scratch_child
from vhdkit.units import MIB

LIMIT = 3


def make_chain(folder: Path, depth: int, name: str = "layer") -> list[Path]:
    """Images of a chain, leaf first."""
    paths = [folder / f"{name}{number}.{'avhd' if number < depth - 1 else 'vhd'}" for number in range(depth)]
    vhdkit.create_image(paths[-1], MIB)
    for child, parent in zip(paths[-2::-1], paths[:0:-1], strict=True):
        vhdkit.create_child(child, parent)
    return paths


def freeze(leaf: Path) -> None:
    """A snapshot of an open chain."""
    with Chain.open(leaf, writable=True) as chain, freezing([(chain, None)]) as prepared:
        prepared.freeze()


def overlay(leaf: Path) -> None:
    """A nameless child of an open chain."""
    with Chain.open(leaf) as chain:
        scratch_child(chain, str(leaf.parent)).close()


def rebase(leaf: Path) -> None:
    """Another image becomes a child of the leaf."""
    [*_, child, parent] = make_chain(leaf.parent, 2, "other")
    vhdkit.rebase(child, leaf, unsafe_new_id=True)
    assert parent.exists()


def test_a_rebase_that_would_make_a_descendant_too_deep_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layers above the rebased image count, too."""
    paths = make_chain(tmp_path, 3)
    [deeper, twin] = [tmp_path / name for name in ("deeper.avhd", "twin.vhd")]
    vhdkit.convert(paths[-1], twin, "dynamic")
    vhdkit.create_child(deeper, twin)
    before = paths[1].read_bytes()
    monkeypatch.setattr(opening, "MAX_CHAIN_DEPTH", 3)
    with pytest.raises(errors.InvalidArgument, match="its chain would have 4 layers"):
        vhdkit.rebase(paths[1], deeper, unsafe_new_id=True)
    assert paths[1].read_bytes() == before
    vhdkit.rebase(paths[1], twin, unsafe_new_id=True)
    assert vhdkit.chain_paths(paths[0]) == [str(one) for one in (*paths[:2], twin)]


@pytest.mark.parametrize(
    "work",
    [
        lambda leaf: vhdkit.create_child(leaf.with_name("new.avhd"), leaf),
        vhdkit.snapshot,
        lambda leaf: vhdkit.clone(leaf, [leaf.with_name("new.avhd"), leaf.with_name("other.avhd")]),
        freeze,
        overlay,
        rebase,
    ],
    ids=["create_child", "snapshot", "clone", "freeze", "overlay", "rebase"],
)
def test_one_layer_too_many_is_refused(
    work: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last layer that can be opened can be made, and the next one is refused, leaving the chain as it is."""
    monkeypatch.setattr(opening, "MAX_CHAIN_DEPTH", LIMIT)
    allowed, full = tmp_path / "allowed", tmp_path / "full"
    allowed.mkdir()
    full.mkdir()
    work(make_chain(allowed, LIMIT - 1)[0])
    paths = make_chain(full, LIMIT)
    before = {path: path.read_bytes() for path in paths}
    with pytest.raises(errors.InvalidArgument, match=f"its chain would have {LIMIT + 1} layers"):
        work(paths[0])
    made = {"other0.avhd", "other1.vhd"} if work is rebase else set()
    assert set(os.listdir(full)) - made == {path.name for path in paths}
    assert {path: path.read_bytes() for path in paths} == before
    vhdkit.open_disk(paths[0], writable=True).close()
