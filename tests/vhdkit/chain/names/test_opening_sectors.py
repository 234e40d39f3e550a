# SPDX-License-Identifier: Apache-2.0
"""A chain whose images have different sector sizes is refused by every verb that opens it."""

from __future__ import annotations

from pathlib import Path

import pytest

import vhdkit
from tests.harness.vhdx_builder import LINKAGE, Vhdx
from vhdkit import errors
from vhdkit.chain.names.opening import open_layers
from vhdkit.chain.verbs.describe import describe_chain
from vhdkit.errors import CorruptReason
from vhdkit.units import MIB


@pytest.mark.parametrize(("above", "below"), [(512, 4096), (4096, 512)])
def test_other_sectors_than_the_parent_are_refused(tmp_path: Path, above: int, below: int) -> None:
    """A child and its parent have logical sectors of one size; else nothing opens the chain, and both are named."""
    base, leaf = tmp_path / "base.vhdx", tmp_path / "leaf.avhdx"
    base.write_bytes(Vhdx(MIB, sector_bytes=below).store().contents())
    leaf.write_bytes(Vhdx(MIB, sector_bytes=above, parent=LINKAGE, linkage=b"l" * 16).store().contents())
    before = leaf.read_bytes()
    for writable in (False, True):
        with pytest.raises(errors.CorruptImage, match=rf"of {above} bytes, but its .* of {below}") as caught:
            open_layers(leaf, writable=writable)
        assert caught.value.reason is CorruptReason.CHAIN_SECTOR_SIZE and caught.value.path == str(leaf)
        assert f"vhdkit rebase {leaf} --parent" in str(caught.value)
    assert leaf.read_bytes() == before
    assert [(one.code, one.severity) for one in vhdkit.check(leaf)] == [("chain-sector-size", vhdkit.Severity.ERROR)]
    chain = describe_chain(leaf)
    assert [one.image.path for one in chain.layers] == [str(leaf), str(base)]
    assert chain.damaged and f"sectors of {below}" in (chain.problem or "")
    with pytest.raises(errors.CorruptImage):
        vhdkit.merge(leaf)
    open_layers(base)[0].close()
