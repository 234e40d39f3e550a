# SPDX-License-Identifier: Apache-2.0
"""`backup serve`: other programs take the change between two nights, bit for bit."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

import vhdkit
from tests.servers import serving
from tests.support import require_tool
from tests.support import run as run_tool
from tests.vhdkit.backup.repositories import Nights
from tests.vhdkit.cli.running import document, failure
from vhdkit.units import KIB, MIB

VERB = ("backup", "serve")


@pytest.fixture
def nights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Nights:
    """Three nights of one disk; in the third a part became zeros."""
    monkeypatch.chdir(tmp_path)
    rng = random.Random(3)
    made = Nights(tmp_path / "repo")
    made.add({"disk-0": {0: rng.randbytes(2 * MIB), 5 * MIB: b"first"}})
    made.add({"disk-0": {MIB: rng.randbytes(90 * KIB)}})
    made.add({"disk-0": {512 * KIB: bytes(64 * KIB), 7 * MIB + 100: b"x"}})
    return made


@pytest.mark.parametrize(("word", "how"), [("1..3", "layers"), ("3..1", "comparison")])
def test_nbdcopy_takes_the_change(nights: Nights, word: str, how: str) -> None:
    """What nbdcopy copies over a copy of the earlier night makes the later one of it, and is little; the map is the
    change, also as a dirty bitmap; the later night is leased meanwhile."""
    earlier, later = (nights.content[int(one)]["disk-0"] for one in word.split(".."))
    Path("copy.raw").write_bytes(earlier)
    program = require_tool("nbdcopy")
    with serving(nights.path, "web", word, "--socket", "s", verb=VERB) as server:
        [export] = server.ready["exports"]
        assert export["found_by"] == how and 0 < export["changed_bytes"] < MIB
        for name in ("base:allocation", f"qemu:dirty-bitmap:{word}"):
            found = run_tool([require_tool("nbdinfo"), f"--map={name}", "--json", server.uri]).stdout
            runs = json.loads(found)
            wanted = 0 if name == "base:allocation" else 1
            assert sum(one["length"] for one in runs if one["type"] == wanted) == export["changed_bytes"]
        [row] = document("backup", "list", nights.path, "web")["nights"][int(word[-1]) - 1 : int(word[-1])]
        assert row["leased"]["purpose"] == "a server of its changes"
        with serving("copy.raw", "--socket", "t") as target:
            run_tool([program, "--allocated", "--destination-is-zero", server.uri, target.uri])
            assert target.stop()[0] == 0
        assert Path("copy.raw").read_bytes() == later
        run_tool([program, "--no-extents", server.uri, "whole.raw"])
        assert Path("whole.raw").read_bytes() == later
        assert server.stop()[0] == 0
    assert all(one["leased"] is None for one in document("backup", "list", nights.path, "web")["nights"])


def test_wrong_words(nights: Nights) -> None:
    """Words that are not two nights are refused with an example, and nights that do not exist with those that do."""
    for word in ("1", "..3", "1..", ".."):
        assert "18..21" in failure("backup", "serve", nights.path, "web", word, code=2)
    assert "1 of" in failure("backup", "serve", nights.path, "web", "1..9", code=1)
    assert "disk-0" in failure("backup", "serve", nights.path, "web", "1..2", "--disk", "z", code=1)
    failure("backup", "serve", nights.path, "mail", "1..2", code=1)
    with vhdkit.open_disk(nights.image(1, "disk-0")) as disk:
        assert disk.read(5 * MIB, 5) == b"first"
