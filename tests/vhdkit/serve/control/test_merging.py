# SPDX-License-Identifier: Apache-2.0
"""Merging under clients: none of their writes is lost, they wait only for moments, and a merge can always be
cancelled."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

import vhdkit
from tests.vhdkit.serve.control.test_operations import SIZE, Bench, Writer, bench_in, write_on
from tests.waiting import wait_until
from vhdkit import errors
from vhdkit.chain.names.options import OpenOptions
from vhdkit.disk import open_disk
from vhdkit.serve.control import merging
from vhdkit.serve.control.server import BadParams
from vhdkit.serve.nbd.wire import Command
from vhdkit.units import MIB

HALF = SIZE // 2
EACH = pytest.mark.parametrize("suffix", [".vhd", ".vhdx"])
ALSO_NIGHTLY = pytest.mark.parametrize("suffix", [".vhd", pytest.param(".vhdx", marks=pytest.mark.nightly)])


def has_copied(bench: Bench) -> bool:
    """Whether the merge of the first export has copied something."""
    return bool((bench.do("status")["exports"][0]["merge"] or {}).get("done_bytes"))  # type: ignore[index]


def frozen_often(bench: Bench, times: int, writers: list[Writer]) -> list[str]:
    """Freeze export a that many times while the writers write; returns its layers, leaf first."""
    for _ in range(times):
        write_on(writers, 3)
        bench.do("snapshot", exports={"a": None})
    return [layer.store.name for layer in bench.exports[0].disk.chain.layers]


def writers_of(bench: Bench) -> list[Writer]:
    """Two clients of export a, each writing to its half."""
    writers = [Writer(bench.running.client("a"), first, HALF, index) for index, first in enumerate((0, HALF))]
    for writer in writers:
        writer.start()
    return writers


def finished(bench: Bench, writers: list[Writer], leaf: str, depth: int) -> None:
    """What the writers wrote is in the files, in that many layers."""
    model = b"".join(bytes(writer.finish()) for writer in writers)
    bench.running.end()
    with open_disk(leaf, writable=True) as disk:
        assert disk.read(0, SIZE) == model and len(disk.chain.layers) == depth
    assert [one for one in vhdkit.check(leaf) if one.severity is vhdkit.Severity.ERROR] == []


@EACH
def test_middle_layers_under_writing_clients(tmp_path: Path, suffix: str) -> None:
    """INV-MERGE-PRESERVES: layers below the leaf become one while clients write and compare; their files go."""
    with bench_in(tmp_path, suffix) as bench:
        writers = writers_of(bench)
        layers = frozen_often(bench, 4, writers)
        below = Path(layers[4]).read_bytes()
        done = bench.do("merge", export="a", layer=layers[1], into=layers[3])
        assert done["merged"] == layers[1:3] and done["into"] == layers[3] and done["leaf"] == layers[0]
        assert 0 < done["held_seconds"] < 30 and done["passes"] == 1  # type: ignore[operator]
        assert [layer.store.name for layer in bench.exports[0].disk.chain.layers] == [layers[0], *layers[3:]]
        assert not Path(layers[1]).exists() and not Path(layers[2]).exists()
        assert Path(layers[4]).read_bytes() == below
        finished(bench, writers, layers[0], 3)


@EACH
def test_a_leaf_under_writing_clients(tmp_path: Path, suffix: str) -> None:
    """The whole chain becomes one image while clients write: in passes, then a moment in which they wait."""
    with bench_in(tmp_path, suffix) as bench:
        writers = writers_of(bench)
        layers = frozen_often(bench, 2, writers)
        done = bench.do("merge", export="a", into=layers[-1])
        assert done["leaf"] == layers[-1] and done["into"] == layers[-1]
        write_on(writers, 3)
        bench.do("snapshot", exports={"a": None})  # the layer that took over the writes is an ordinary leaf
        leaf = bench.exports[0].image_path
        finished(bench, writers, leaf, 2)
        assert sorted(path.name for path in tmp_path.iterdir()) == [f"a.a{suffix[1:]}", f"a{suffix}", f"b{suffix}"]


@ALSO_NIGHTLY
def test_a_leaf_that_grows_too_fast_is_left(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """If data is written faster than it is merged, it stays in a leaf; the result says so, and nothing is lost."""
    monkeypatch.setattr(merging, "LAST_PASS_BYTES", -1)
    monkeypatch.setattr(merging, "PATIENT_BYTES", -1)
    monkeypatch.setattr(merging, "MAX_PASSES", 2)
    with bench_in(tmp_path, suffix) as bench:
        writers = writers_of(bench)
        layers = frozen_often(bench, 1, writers)
        with pytest.raises(errors.ImageInUse, match="grows faster"):
            bench.do("merge", export="a", into=layers[-1])
        finished(bench, writers, bench.exports[0].image_path, 2)


@EACH
def test_cancelled_in_the_middle(tmp_path: Path, suffix: str) -> None:
    """Status shows a slow merge; it locks the chain and stops at once when cancelled; the next one completes."""
    with bench_in(tmp_path, suffix) as bench:
        writers = writers_of(bench)
        layers = frozen_often(bench, 3, writers)
        failures: list[BaseException] = []

        def merge() -> None:
            try:
                bench.do("merge", export="a", layer=layers[1], into=layers[2], max_rate_bytes=1)
            except errors.VhdkitError as failure:
                failures.append(failure)

        thread = threading.Thread(target=merge)
        thread.start()
        wait_until(lambda: has_copied(bench), "the merge copies")
        refused: list[tuple[str, dict[str, object]]] = [
            ("snapshot", {}),
            ("resize", {"export": "a", "size_bytes": 2 * SIZE}),
            ("merge", {"export": "a"}),
            ("remove", {"export": "a"}),
        ]
        for method, params in refused:
            with pytest.raises(errors.ImageInUse, match="being merged"):
                bench.do(method, **params)
        bench.do("snapshot", exports={"b": None})
        assert bench.do("cancel") == {"exports": ["a"]} and bench.do("cancel", export="b") == {"exports": []}
        thread.join(30)
        assert [type(one) for one in failures] == [errors.Cancelled]
        assert bench.do("status")["exports"][0]["merge"] is None  # type: ignore[index]
        bench.do("merge", export="a", layer=layers[1], into=layers[2])
        finished(bench, writers, layers[0], 3)


@ALSO_NIGHTLY
def test_a_merge_waits_for_a_snapshot_under_way(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A merge requested during a snapshot merges below the new leaf; nothing written to that is lost."""
    with bench_in(tmp_path, suffix) as bench:
        client = bench.running.client("a")
        client.call(Command.WRITE, 0, 3, payload=b"old")
        for _ in range(2):
            bench.do("snapshot", exports={"a": None})
        layers = [layer.store.name for layer in bench.exports[0].disk.chain.layers]
        leaf = bench.exports[0].disk.chain.leaf
        seal, entered, gate = leaf.seal, threading.Event(), threading.Event()

        def slow() -> None:
            entered.set()
            assert gate.wait(30)
            seal()

        monkeypatch.setattr(leaf, "seal", slow)
        freezing = threading.Thread(target=lambda: bench.do("snapshot", exports={"a": None}))
        freezing.start()
        assert entered.wait(30)
        done: list[dict[str, object]] = []
        merge = threading.Thread(target=lambda: done.append(bench.do("merge", export="a", layer=layers[1])))
        merge.start()
        merge.join(0.3)
        gate.set()
        freezing.join(30)
        client.call(Command.WRITE, 0, 3, payload=b"new")
        merge.join(30)
        assert done and client.read(0, 3) == b"new"
        newest = bench.exports[0].image_path
        assert done[0]["leaf"] == newest and newest not in layers
        bench.running.end()
    with open_disk(newest, writable=True) as disk:
        assert disk.read(0, 3) == b"new" and len(disk.chain.layers) == 3


@ALSO_NIGHTLY
def test_a_stopping_server_cancels_its_merge(tmp_path: Path, suffix: str) -> None:
    """The server does not wait for a slow merge when it ends, and closes no file that the merge uses."""
    with bench_in(tmp_path, suffix) as bench:
        writers = writers_of(bench)
        layers = frozen_often(bench, 2, writers)
        model = b"".join(bytes(writer.finish()) for writer in writers)
        failures: list[BaseException] = []

        def merge() -> None:
            try:
                bench.do("merge", export="a", layer=layers[1], max_rate_bytes=1)
            except errors.VhdkitError as failure:
                failures.append(failure)

        thread = threading.Thread(target=merge)
        thread.start()
        wait_until(lambda: has_copied(bench), "the merge copies")
        bench.running.end()
        thread.join(30)
        assert [type(one) for one in failures] == [errors.Cancelled]
    with open_disk(layers[0], writable=True) as disk:
        assert disk.read(0, SIZE) == model
    assert vhdkit.resume_merge(layers[1]).target == layers[2]


def test_refused_merges(tmp_path: Path) -> None:
    """Unknown layers, layers in the wrong order, a single image, wrong parameters, read-only exports."""
    with bench_in(tmp_path) as bench:
        client = bench.running.client("a")
        client.call(Command.WRITE, 0, 5, payload=b"hello")
        with pytest.raises(errors.InvalidArgument, match="no parent"):
            bench.do("merge", export="a")
        bench.do("snapshot", exports={"a": None})
        layers = [layer.store.name for layer in bench.exports[0].disk.chain.layers]
        for params, kind in (
            ({"export": "nope"}, errors.NotFound),
            ({"export": "a", "layer": "/nowhere"}, errors.InvalidArgument),
            ({"export": "a", "layer": layers[1]}, errors.InvalidArgument),
            ({"export": "a", "layer": layers[1], "into": layers[0]}, errors.InvalidArgument),
            ({"export": "a", "into": layers[0]}, errors.InvalidArgument),
            ({"export": "a", "max_rate_bytes": 0}, BadParams),
            ({"export": "a", "max_rate_bytes": True}, BadParams),
            ({"export": "a", "layer": 7}, BadParams),
            ({"export": "a", "speed": 7}, BadParams),
        ):
            with pytest.raises(kind):
                bench.do("merge", **params)
        assert client.read(0, 5) == b"hello"
        bench.do("set-read-only", export="a")
        bench.do("merge", export="a", into=layers[1])  # the files can still be changed
        assert client.read(0, 5) == b"hello" and bench.files() == ["a.vhd", "b.vhd"]


def test_a_server_that_has_ended_freezes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the server ends while a disk is flushed beside its clients, the snapshot is refused and leaves no file."""
    with bench_in(tmp_path) as bench:
        bench.running.client("a").call(Command.WRITE, 0, 4, payload=b"kept")
        disk = bench.exports[0].disk
        flush = disk.flush

        def ending() -> None:
            bench.do("shutdown")
            bench.running.join()
            flush()

        monkeypatch.setattr(disk, "flush", ending)
        with pytest.raises(errors.InvalidArgument, match="has ended"):
            bench.do("snapshot", exports={"a": None})
        with open_disk(bench.folder / "a.vhd", writable=True) as again:
            assert again.read(0, 4) == b"kept"
        assert bench.files() == ["a.vhd", "b.vhd"]


def test_clients_write_while_a_snapshot_flushes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a disk has to write before it is frozen is flushed before its clients wait."""
    with bench_in(tmp_path) as bench:
        client, disk, written = bench.running.client("a"), bench.exports[0].disk, list[int]()
        flush = disk.flush

        def flushing() -> None:
            flush()
            assert not client.call(Command.WRITE, len(written) * MIB, 4, payload=b"late").error  # hangs if it is held
            written.append(len(written))

        monkeypatch.setattr(disk, "flush", flushing)
        bench.do("snapshot", exports={"a": None})
        assert written == [0, 1]
        with open_disk(bench.folder / "a.vhd", options=OpenOptions(lock=False)) as frozen:
            assert [frozen.read(at * MIB, 4) for at in written] == [b"late", b"late"]
