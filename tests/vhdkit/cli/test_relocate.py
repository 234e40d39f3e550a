# SPDX-License-Identifier: Apache-2.0
"""`vhdkit relocate`."""

from __future__ import annotations

from pathlib import Path

import vhdkit
from tests.vhdkit.cli.running import document, failure, good, make_chain, names


def test_relocate_moves_and_reports(folder: Path) -> None:
    """A dry run lists what would move; then it moves, and the chain is sound in its new place."""
    content = make_chain()
    Path("new place").mkdir()
    assert "would move" in good("relocate", "leaf.avhd", "new place", "--dry-run")
    result = document("relocate", "leaf.avhd", "new place")
    assert [Path(one["new"]).name for one in result["moves"]] == ["leaf.avhd", "middle.avhd", "base.vhd"]
    assert names(folder) == ["new place"]
    assert "clean" in good("check", "new place/leaf.avhd")
    Path("flat.raw").write_bytes(content)
    assert "equal" in good("compare", "new place/leaf.avhd", "flat.raw")
    assert "unchanged: " in good("relocate", "new place/leaf.avhd", "new place")


def test_refusals(folder: Path) -> None:
    """No folder, a taken name, a busy chain, an inner layer: each has its exit code."""
    make_chain()
    Path("new").mkdir()
    failure("relocate", "leaf.avhd", "nowhere", code=1)
    failure("relocate", "middle.avhd", "new", code=5)
    with vhdkit.open_disk("leaf.avhd"):
        failure("relocate", "leaf.avhd", "new", code=5)
    Path("new/base.vhd").touch()
    failure("relocate", "leaf.avhd", "new", code=1)
    assert names(folder / "new") == ["base.vhd"]
