# SPDX-License-Identifier: Apache-2.0
"""Merges under an open chain that are refused before anything changes."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import vhdkit
from tests.vhdkit.chain.verbs.test_live_merge import SIZE, content, make_chain
from vhdkit import errors
from vhdkit.chain.engine.chain import Chain
from vhdkit.chain.verbs.live_merge import live_merge


@pytest.mark.parametrize("base", ["dynamic", "vhdx"])
def test_a_layer_with_other_children_is_not_merged(base: str, tmp_path: Path) -> None:
    """A child outside the chain, of the target or of a source, is named, and nothing changes."""
    rng = random.Random(9)
    paths, model = make_chain(tmp_path, 4, base, rng)
    for number in (1, 2):
        other = tmp_path / f"other{number}{paths[0].suffix}"
        vhdkit.create_child(other, paths[number])
        before = {path: path.read_bytes() for path in paths}
        chain = Chain.open(paths[0], writable=True)
        with pytest.raises(errors.HasChildren, match=f"other{number}"), live_merge(chain, 1, 2):
            pass
        assert content(chain) == model
        chain.close()
        assert {path: path.read_bytes() for path in paths} == before
        other.unlink()


def test_layers_of_another_size_are_refused(tmp_path: Path) -> None:
    """A layer that is smaller than the disk would have to grow under its reader: refused, with what to do."""
    vhdkit.create_image(tmp_path / "base.vhd", SIZE)
    vhdkit.create_child(tmp_path / "a.avhd", tmp_path / "base.vhd")
    vhdkit.create_child(tmp_path / "b.avhd", tmp_path / "a.avhd")
    vhdkit.resize(tmp_path / "b.avhd", 2 * SIZE)
    chain = Chain.open(tmp_path / "b.avhd", writable=True)
    with pytest.raises(errors.InvalidArgument, match="another size"), live_merge(chain, 1, 2):
        pass
    chain.close()
