# SPDX-License-Identifier: Apache-2.0
"""Sequences of verbs, cut at every point, followed by any verb (`tests/exhaustive.py`).

Every run takes a sample of the cuts in one and two verbs; `script/test --nightly` takes all sequences of three.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.exhaustive import Explorer, Wrong, main, scratch
from tests.exhaustive_verbs import KINDS, VERBS
from tests.harness.folder_power import FolderPower
from tests.support import daily_or_nightly
from vhdkit import folder
from vhdkit.chain.verbs import relocate
from vhdkit.store import FileStore


def _explore(
    depth: int,
    *,
    sample: int = 1,
    after_sample: int = 1,
    verbs: tuple[str, ...] = tuple(VERBS),
    first: tuple[str, ...] = (),
) -> Explorer:
    with scratch() as base:
        explorer = Explorer(base, sample=sample, after_sample=after_sample, verbs=verbs)
        explorer.explore(depth, first=first)
    return explorer


def test_cuts_in_one_verb() -> None:
    """Whichever verb is cut at whatever point, every disk reads correctly and each verb that follows succeeds."""
    counts = _explore(1, after_sample=daily_or_nightly(6, 1)).counts
    assert counts["verbs"] >= len(VERBS) - 2
    assert counts["cuts"] > 50 and counts["verbs after a cut"] > 100


def test_a_sample_of_cuts_in_two_verbs() -> None:
    """The second of two verbs may be cut as well. Each verb is the second one; every day a quarter of them begin."""
    first = tuple(VERBS)[:: daily_or_nightly(4, 1)]
    counts = _explore(2, sample=17, after_sample=5, first=first).counts
    assert counts["cuts"] > 12


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("verb", VERBS)
def test_cuts_in_one_verb_on_vhdx(verb: str) -> None:
    """The same with VHDX: one verb, a sample of its cuts, and then each verb."""
    with scratch() as base:
        explorer = Explorer(base, sample=5, after_sample=3, kind=KINDS["vhdx"])
        explorer.explore(1, first=(verb,))


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("first", VERBS)
def test_cuts_in_three_verbs(first: str) -> None:
    """All sequences of up to three verbs, each cut of the last one, each verb after it."""
    with scratch() as base:
        explorer = Explorer(base)
        explorer.explore(3, first=(first,))
        assert explorer.counts["cuts"]


def test_a_flush_without_effect_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Self-test: a file system that breaks its promises loses a disk, and that is reported."""
    monkeypatch.setattr(FileStore, "sync", lambda self: None)
    with pytest.raises(Wrong, match=r"main"):
        _explore(1, verbs=("write", "merge"))


def test_a_name_that_is_not_flushed_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Self-test: a folder that is never flushed loses the merged image, or keeps the removed one."""
    for module in (folder, relocate):
        monkeypatch.setattr(module, "sync_directory", lambda directory: None)
    with pytest.raises(Wrong):
        _explore(2, verbs=("relocate", "write"))


def test_the_same_seed_gives_the_same_cuts(tmp_path: Path) -> None:
    """A failure is repeated with its seed, which determines identifiers, times and torn pages."""
    runs = []
    for _ in range(2):
        explorer = Explorer(tmp_path, sample=10_000)
        state = explorer.start()
        explorer.step(state, "snapshot", "7")
        runs.append(state.key)
    assert runs[0] == runs[1]


def test_cuts_lose_what_was_not_flushed(tmp_path: Path) -> None:
    """The recorder gives the file as last flushed and as it is now, and the names of both times."""
    place = tmp_path / "here"
    place.mkdir()
    (place / "one").write_bytes(b"old")

    def work() -> None:
        (place / "one").write_bytes(b"new")
        (place / "two").write_bytes(b"two")
        (place / "one").unlink()

    power = FolderPower(place, "1")
    power.run(work)
    found = [dict(cut.files) for cut in power.cuts]
    assert {"one": b"new", "two": b"two"} in found
    assert {"two": b"two"} in found and {"two": b""} in found
    assert {"one": b"new"} in found


def test_the_command_line_reports_its_counts(capsys: pytest.CaptureFixture[str]) -> None:
    """`python -m tests.exhaustive` says how much it judged."""
    assert main(["--depth", "1", "--verbs", "snapshot", "write"]) == 0
    assert "verbs after a cut" in capsys.readouterr().out
