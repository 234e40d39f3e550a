# SPDX-License-Identifier: Apache-2.0
"""Backups of disks that are served: clients go on, nothing of theirs is lost, and names are as they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

import vhdkit
from tests.vhdkit.serve.control.test_merging import finished, writers_of
from tests.vhdkit.serve.control.test_operations import SIZE, Bench, bench_in, write_on
from vhdkit import errors
from vhdkit.backup.manifest import How
from vhdkit.backup.night import Writing
from vhdkit.backup.repository import create_repository
from vhdkit.backup.restore import restore
from vhdkit.backup.single import SavedDisk, SingleWishes, save_line
from vhdkit.chain.names.options import OpenOptions
from vhdkit.serve.control.client import ControlClient
from vhdkit.serve.control.saving import ServedLine, _export

KEEP = SingleWishes("a", keep_reference=True)


class Direct:
    """The control client of a bench, which calls without a socket."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench

    def call(self, method: str, **params: object) -> Any:
        """The result of a call."""
        return self._bench.do(method, **params)


def save(bench: Bench, wishes: SingleWishes) -> SavedDisk:
    """Save export a in the repository beside its folder."""
    leaf = bench.exports[0].disk.path
    client = cast(ControlClient, Direct(bench))
    line = ServedLine(client, "a", leaf, str(Path(leaf).parent), "bench:a")
    with create_repository(Path(leaf).parent / "repo") as repository:
        return save_line(line, repository, "a", wishes, OpenOptions())


def night(bench: Bench, number: int) -> bytes:
    """What a night reads."""
    folder = Path(bench.exports[0].disk.path).parent
    new = folder / f"restored-{number}.vhd"
    restore(folder / "repo", f"a@{number}", new)
    with vhdkit.open_disk(new) as disk:
        return disk.read(0, disk.size_bytes)


@pytest.mark.parametrize("suffix", [".vhd", pytest.param(".vhdx", marks=pytest.mark.nightly)])
@pytest.mark.parametrize("keeps", [False, True])
def test_nights_under_writing_clients(tmp_path: Path, suffix: str, keeps: bool) -> None:
    """INV-LIVE-PRESERVES, INV-MERGE-PRESERVES: nights are saved while clients write; their data is all there, each
    night is a state that the disk was in, and the chain does not grow."""
    with bench_in(tmp_path, suffix) as bench:
        first, writers = bench.exports[0].disk.path, writers_of(bench)
        found = []
        for _ in range(3):
            write_on(writers, 5)
            saved = save(bench, KEEP if keeps else SingleWishes("a"))
            found.append(saved.manifest.disks[0].how)
            layers = [layer.store.name for layer in bench.exports[0].disk.chain.layers]
            assert layers == ([saved.leaf, first] if keeps else [first])
        assert found == [How.FULL, *[How.LAYERS if keeps else How.COMPARED] * 2]
        if keeps:
            with vhdkit.open_disk(first) as disk:
                assert disk.read(0, SIZE) == night(bench, 3)
        finished(bench, writers, layers[0], len(layers))


def test_a_night_that_fails_leaves_the_export_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a night cannot be written, the new child is merged back, and clients noticed nothing."""
    with bench_in(tmp_path) as bench:
        first, writers = bench.exports[0].disk.path, writers_of(bench)
        before = bench.files()

        def fail(night: Writing, *args: object, **options: object) -> None:
            write_on(writers, 3)
            raise errors.NoSpace("the disk is full")

        monkeypatch.setattr(Writing, "save", fail)
        for wishes in (KEEP, SingleWishes("a")):
            with pytest.raises(errors.NoSpace):
                save(bench, wishes)
            assert [layer.store.name for layer in bench.exports[0].disk.chain.layers] == [first]
        assert [one for one in bench.files() if one != "repo"] == before
        finished(bench, writers, first, 1)


def export(name: str, **more: object) -> dict[str, object]:
    """An export as `status` lists it."""
    return {"name": name, "overlay": False, "read_only": False, "path": f"/{name}.vhd", "layers": []} | more


@pytest.mark.parametrize(
    ("exports", "name", "error"),
    [
        ([export("a")], "b", errors.NotFound),
        ([export("a"), export("b")], None, errors.InvalidArgument),
        ([export("a", overlay=True)], None, errors.InvalidArgument),
        ([export("a", read_only=True)], "a", errors.ReadOnly),
    ],
)
def test_which_export_is_meant(
    exports: list[dict[str, object]], name: str | None, error: type[vhdkit.VhdkitError]
) -> None:
    """One export is taken, or the one that is named; one that cannot be frozen is refused before anything happens."""
    with pytest.raises(error):
        _export({"exports": exports}, name, "socket")
    assert _export({"exports": [export("a"), export("b")]}, "b", "socket")["name"] == "b"


@pytest.mark.parametrize("keeps", [False, True])
def test_layers_that_killed_backups_froze(tmp_path: Path, keeps: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What backups that were killed after the freeze have left is saved by the next one, and merged."""
    with bench_in(tmp_path, ".vhd") as bench:
        first, writers = bench.exports[0].disk.path, writers_of(bench)
        wishes = KEEP if keeps else SingleWishes("a")

        def killed(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as context:
            context.setattr(Writing, "save", killed)
            context.setattr(ServedLine, "give_back", killed)
            for _ in range(2):
                write_on(writers, 3)
                with pytest.raises(KeyboardInterrupt):
                    save(bench, wishes)
        assert len(bench.exports[0].disk.chain.layers) == 3
        write_on(writers, 3)
        saved = save(bench, wishes)
        layers = [layer.store.name for layer in bench.exports[0].disk.chain.layers]
        assert layers == ([saved.leaf, first] if keeps else [first])
        if keeps:
            with vhdkit.open_disk(first) as disk:
                assert disk.read(0, SIZE) == night(bench, 1)
        finished(bench, writers, layers[0], len(layers))
