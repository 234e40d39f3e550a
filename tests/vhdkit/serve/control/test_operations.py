# SPDX-License-Identifier: Apache-2.0
"""Operations of the control socket on a server with clients: no write is lost, and sets are all or none."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import nbd_client as nbd
from tests.nbd_client import Client, Running
from tests.waiting import wait_until
from vhdkit import errors
from vhdkit.chain.names.options import OpenOptions
from vhdkit.chain.verbs.check import check
from vhdkit.chain.verbs.create import create_image
from vhdkit.disk import open_disk
from vhdkit.serve.control.confinement import confined_to
from vhdkit.serve.control.operations import Operations
from vhdkit.serve.control.server import BadParams
from vhdkit.serve.nbd.server import NbdServer
from vhdkit.serve.nbd.wire import Command, CommandFlag
from vhdkit.serve.opening import ExportRequest, ImageExport, OpenMode, open_exports
from vhdkit.units import KIB, MIB, PAGE_SIZE

SIZE = 8 * MIB
SECONDS = 30


class Bench:
    """Two exports, `a` and `b`, and what can be done with them."""

    def __init__(self, folder: Path, open_mode: OpenMode, suffix: str = ".vhd") -> None:
        self.folder = folder
        for name in ("a", "b"):
            if suffix == ".vhdx":
                create_image(folder / f"{name}.vhdx", SIZE, disk_format="vhdx", block_size_bytes=MIB)
            else:
                create_image(folder / f"{name}.vhd", SIZE, block_size_bytes=512 * KIB)
        wanted = [ExportRequest(str(folder / f"{name}{suffix}"), name) for name in ("a", "b")]
        self.exports: list[ImageExport] = open_exports(wanted, open_mode)
        self.server = NbdServer(self.exports)
        self.operations = Operations(self.server, self.exports)
        self.methods = self.operations.methods()
        self.running = Running(self.server)

    def do(self, name: str, **params: object) -> dict[str, object]:
        """Call a method as the control socket would: short ones on the loop, long ones on this thread."""
        method = self.methods[name]
        if method.takes_long or method.takes_minutes:
            return method.work(params)  # type: ignore[return-value]
        done: list[object] = []
        called = threading.Event()

        def call() -> None:
            try:
                done.append(method.work(params))
            except Exception as error:
                done.append(error)
            called.set()

        self.server.loop.post(call)
        assert called.wait(SECONDS)
        if isinstance(done[0], Exception):
            raise done[0]
        return done[0]  # type: ignore[return-value]

    def files(self) -> list[str]:
        """The names in the folder."""
        return sorted(path.name for path in self.folder.iterdir())


@contextlib.contextmanager
def bench_in(folder: Path, suffix: str = ".vhd", **open_mode: Any) -> Iterator[Bench]:
    """A bench that ends in any case."""
    one = Bench(folder, OpenMode(OpenOptions(), **open_mode), suffix)
    try:
        yield one
    finally:
        one.running.close()
    if one.running.failure is not None:
        raise one.running.failure


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    """Two writable exports."""
    with bench_in(tmp_path) as one:
        yield one


class Writer(threading.Thread):
    """A client that writes to its own half of an export and reads back until stopped; it keeps a model."""

    def __init__(self, client: Client, first: int, size: int, seed: int) -> None:
        super().__init__(daemon=True)
        self.client, self.first, self.size = client, first, size
        self.model = bytearray(size)
        self.rng = random.Random(seed)
        self.stopped = threading.Event()
        self.rounds = 0
        self.failure: BaseException | None = None

    def run(self) -> None:
        """Write, now and then with FUA, flush, read, compare."""
        try:
            while not self.stopped.is_set():
                self._round()
                self.rounds += 1
        except BaseException as failure:
            self.failure = failure

    def _round(self) -> None:
        rng, client = self.rng, self.client
        start = rng.randrange(self.size - 1)
        count = min(rng.choice([1, 700, PAGE_SIZE, 70_000, 300_000]), self.size - start)
        data = rng.randbytes(count)
        flags = CommandFlag.FUA if rng.random() < 0.1 else 0
        assert not client.call(Command.WRITE, self.first + start, count, flags=flags, payload=data).error
        self.model[start : start + count] = data
        if rng.random() < 0.1:
            assert not client.call(Command.FLUSH).error
        start = rng.randrange(self.size - 1)
        count = min(rng.choice([512, PAGE_SIZE, 200_000]), self.size - start)
        assert client.read(self.first + start, count) == self.model[start : start + count]

    def finish(self) -> bytearray:
        """Its model, if there was no error."""
        self.stopped.set()
        self.join(SECONDS)
        assert self.failure is None, self.failure
        return self.model


def write_on(writers: list[Writer], rounds: int) -> None:
    """Wait until each has written that many more rounds, or has failed."""
    goal = [writer.rounds + rounds for writer in writers]
    wait_until(
        lambda: all(one.rounds >= least or one.failure for one, least in zip(writers, goal, strict=True)),
        f"each client writes {rounds} rounds",
        SECONDS,
    )


def test_snapshots_under_writing_clients(bench: Bench) -> None:
    """INV-LIVE-PRESERVES: while clients write, flush and compare, both disks are frozen five times; nothing is lost.

    At the end each frozen layer holds the same as right after its snapshot.
    """
    half = SIZE // 2
    places = [("a", 0), ("a", half), ("b", 0), ("b", half)]
    writers = [Writer(bench.running.client(name), first, half, index) for index, (name, first) in enumerate(places)]
    for writer in writers:
        writer.start()
    frozen: dict[str, bytes] = {}
    for number in range(5):
        write_on(writers, 4)
        done = bench.do("snapshot")
        for row in done["snapshots"]:  # type: ignore[attr-defined]
            assert row["leaf"].endswith(f"{row['export']}{'' if not number else f'-{number}'}.avhd")
            frozen[row["frozen"]] = Path(row["frozen"]).read_bytes()
    models = [writer.finish() for writer in writers]
    bench.running.end()
    for name, model in (("a", models[0] + models[1]), ("b", models[2] + models[3])):
        with open_disk(bench.folder / f"{name}-4.avhd", writable=True) as disk:
            assert disk.read(0, SIZE) == model and len(disk.chain.layers) == 6
    for path, raw in frozen.items():
        assert Path(path).read_bytes() == raw, path


def test_a_set_is_all_or_none(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the second disk's flush fails, no child is left, no client is disconnected, and the next snapshot works."""
    client = bench.running.client("a")
    client.call(Command.WRITE, 0, 5, payload=b"hello")
    leaf = bench.exports[1].disk.chain.leaf

    def full() -> None:
        raise errors.NoSpace("no room", path="b.vhd")

    with monkeypatch.context() as broken:
        broken.setattr(leaf, "flush", full)
        with pytest.raises(errors.NoSpace):
            bench.do("snapshot")
    assert bench.files() == ["a.vhd", "b.vhd"]
    assert client.read(0, 5) == b"hello"
    assert not client.call(Command.WRITE, 0, 5, payload=b"later").error
    with pytest.raises(errors.AlreadyExists):
        bench.do("snapshot", exports={"a": None, "b": str(bench.folder / "a.vhd")})
    assert bench.files() == ["a.vhd", "b.vhd"]
    bench.do("snapshot", exports={"b": str(bench.folder / "x.avhd")})
    assert bench.files() == ["a.vhd", "b.vhd", "x.avhd"]
    assert client.read(0, 5) == b"later"


@pytest.mark.parametrize(
    ("params", "kind"),
    [
        ({"exports": {"nope": None}}, errors.NotFound),
        ({"exports": {}}, BadParams),
        ({"exports": ["a"]}, BadParams),
        ({"exports": {"a": "relative.avhd"}}, BadParams),
        ({"exports": {"a": "/x\0y"}}, BadParams),
        ({"exports": {"a": 7}}, BadParams),
        ({"export": "a"}, BadParams),
        ({"exports": {"a": "/no/such/folder/x.avhd"}}, errors.InvalidArgument),
    ],
)
def test_wrong_snapshots(bench: Bench, params: dict[str, object], kind: type[Exception]) -> None:
    """Wrong parameters are refused by name, and no file is made."""
    with pytest.raises(kind):
        bench.do("snapshot", **params)
    assert bench.files() == ["a.vhd", "b.vhd"]


def test_exports_that_cannot_be_frozen(tmp_path: Path) -> None:
    """Read-only exports and temporary overlays have no leaf to freeze."""
    for number, (open_mode, kind) in enumerate(
        (({"read_only": True}, errors.ReadOnly), ({"overlay": True}, errors.InvalidArgument))
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        with bench_in(folder, ".vhd", **open_mode) as bench, pytest.raises(kind):
            bench.do("snapshot")


def test_the_context_of_the_old_leaf_continues(bench: Bench) -> None:
    """A client that uses the old leaf's dirty bitmap also sees changes made after the snapshot."""
    client = bench.running.client("a", contexts=["qemu:allocation-depth"])
    client.call(Command.WRITE, 0, PAGE_SIZE, payload=bytes([1]) * PAGE_SIZE)
    bench.do("snapshot", exports={"a": None})
    client.call(Command.WRITE, 512 * KIB, PAGE_SIZE, payload=bytes([2]) * PAGE_SIZE)
    assert client.read(0, 1) == b"\1" and client.read(512 * KIB, 1) == b"\2"
    layers = bench.do("status")["exports"][0]["layers"]  # type: ignore[index]
    assert [layer["writable"] for layer in layers] == [True, False]


def test_a_disk_grows_and_shrinks_under_a_writing_client(bench: Bench) -> None:
    """INV-LIVE-PRESERVES: nothing is lost; connected clients keep the size, new ones see the new size."""
    client = bench.running.client("a")
    writer = Writer(client, 0, SIZE, 1)
    writer.start()
    write_on([writer], 11)
    for size in (4 * SIZE, 2 * SIZE, 3 * SIZE):
        words: dict[str, object] = {} if size == 4 * SIZE else {"shrink": True, "under_clients": True}
        assert bench.do("resize", export="a", size_bytes=size, **words)["size_bytes"] == size
        assert bench.running.client("a").size == size
        write_on([writer], 11)
    model = writer.finish()
    assert client.size == SIZE
    bench.running.end()
    with open_disk(bench.folder / "a.vhd") as disk:
        assert disk.size_bytes == 3 * SIZE and disk.read(0, 3 * SIZE) == bytes(model).ljust(3 * SIZE, b"\0")
    assert not check(bench.folder / "a.vhd")


def test_a_refused_resize_changes_nothing(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A size that would cut off data is refused, and so are wrong parameters; the disk is written to as before."""
    client = bench.running.client("a")
    assert not client.call(Command.WRITE, SIZE - PAGE_SIZE, PAGE_SIZE, payload=b"x" * PAGE_SIZE).error
    with pytest.raises(errors.InvalidArgument, match="would cut off data"):
        bench.do("resize", export="a", size_bytes=SIZE // 2, shrink=True, under_clients=True)
    assert not client.call(Command.WRITE, 0, PAGE_SIZE, payload=b"y" * PAGE_SIZE).error
    assert client.read(0, SIZE) == b"y" * PAGE_SIZE + bytes(SIZE - 2 * PAGE_SIZE) + b"x" * PAGE_SIZE
    for wrong in (None, "1G", True, -1):
        with pytest.raises(BadParams):
            bench.do("resize", export="a", size_bytes=wrong)
    bench.do("set-read-only", export="b")
    with pytest.raises(errors.ReadOnly):
        bench.do("resize", export="b", size_bytes=2 * SIZE)
    folder = tmp_path_factory.mktemp("overlay")
    with bench_in(folder, overlay=True) as other, pytest.raises(errors.InvalidArgument, match="overlay"):
        other.do("resize", export="a", size_bytes=2 * SIZE)


def test_shrinking_under_clients_needs_consent(bench: Bench) -> None:
    """INV-SHRINK-KEEPS: a smaller size needs one parameter, and another one while a client is connected."""
    bench.do("resize", export="a", size_bytes=2 * SIZE)
    with pytest.raises(errors.InvalidArgument, match="fewer than"):
        bench.do("resize", export="a", size_bytes=SIZE)
    client = bench.running.client("a")
    with pytest.raises(errors.ImageInUse, match="1 clients are connected"):
        bench.do("resize", export="a", size_bytes=SIZE, shrink=True)
    assert not client.call(Command.WRITE, 2 * SIZE - PAGE_SIZE, PAGE_SIZE, payload=b"z" * PAGE_SIZE).error
    assert not client.call(Command.WRITE, 2 * SIZE - PAGE_SIZE, PAGE_SIZE, payload=bytes(PAGE_SIZE)).error
    with pytest.raises(BadParams):
        bench.do("resize", export="a", size_bytes=SIZE, shrink=1)
    assert bench.do("resize", export="a", size_bytes=SIZE, shrink=True, under_clients=True)["size_bytes"] == SIZE


def test_read_only_and_back(bench: Bench) -> None:
    """Connected clients get EPERM for every kind of write, may read and flush, and can write again afterwards."""
    client = bench.running.client("a")
    assert not client.call(Command.WRITE, 0, 4, payload=b"kept").error
    bench.do("set-read-only")
    for command, payload in ((Command.WRITE, b"lost"), (Command.WRITE_ZEROES, b""), (Command.TRIM, b"")):
        assert client.call(command, 0, 4, payload=payload).error == 1
    assert client.read(0, 4) == b"kept" and not client.call(Command.FLUSH).error
    bench.do("snapshot", exports={"a": None})
    assert client.call(Command.WRITE, 0, 4, payload=b"lost").error == 1
    bench.do("set-read-only", export="a", read_only=False)
    assert not client.call(Command.WRITE, 0, 4, payload=b"more").error
    status = bench.do("status")
    assert [row["read_only"] for row in status["exports"]] == [False, True]  # type: ignore[attr-defined]
    for params in ({"read_only": 1}, {"export": 1}, {"exports": "a"}):
        with pytest.raises(BadParams):
            bench.do("set-read-only", **params)


def test_control_owners_are_confined(tmp_path: Path) -> None:
    """INV-CONTROL-CONFINED: the images that a control owner adds, and their leaves, are in the named folders only."""
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    for folder in (inside, outside):
        folder.mkdir(mode=0o755)
    for path in (inside / "more.vhd", outside / "secret.vhd"):
        create_image(path, SIZE, block_size_bytes=512 * KIB)
    (inside / "way").symlink_to(outside)
    (inside / "alias.vhd").symlink_to("more.vhd")
    before = {path: path.stat() for path in outside.iterdir()}
    with bench_in(inside) as bench:
        bench.methods = bench.operations.methods(confined_to([str(inside)]))
        refused: list[dict[str, object]] = [
            {"name": "x", "path": str(outside / "secret.vhd")},
            {"name": "x", "path": str(inside / "way" / "secret.vhd")},
            {"name": "x", "path": str(inside / ".." / "outside" / "secret.vhd")},
            {"name": "x", "path": str(inside / "more.vhd"), "parent_dirs": [str(outside)]},
            {"name": "x", "path": str(inside / "more.vhd"), "parent_dirs": [str(inside / "way")]},
            {"name": "x", "path": str(inside / "more.vhd"), "follow_leaf": True},
            {"name": "x", "path": str(inside / "more.vhd"), "known_images": [str(outside / "secret.vhd")]},
        ]
        for params in refused:
            with pytest.raises(errors.AccessDenied):
                bench.methods["add"].work(params)
        for method in ("snapshot", "prepare"):
            for path in (outside / "new.avhd", inside / "way" / "new.avhd", inside / ".." / "outside" / "new.avhd"):
                with pytest.raises(errors.AccessDenied):
                    bench.do(method, exports={"a": str(path)})
        assert {path: path.stat() for path in outside.iterdir()} == before
        wanted = {"name": "x", "path": str(inside / "alias.vhd"), "parent_dirs": [str(inside)]}
        added = bench.methods["add"].work(wanted)
        assert added["export"]["path"] == str(inside / "more.vhd")  # type: ignore[index]
        bench.do("snapshot", exports={"a": str(inside / "named.avhd"), "b": None})
        inside.chmod(0o777)  # from now on any user could put a link in the place of a file
        for exports in ({"a": str(inside / "again.avhd")}, {"a": None}):
            with pytest.raises(errors.AccessDenied, match="is writable by users other than"):
                bench.do("snapshot", exports=exports)


def test_disconnect(bench: Bench) -> None:
    """One client by its number, or all of an export; the others stay connected."""
    first, second, other = (bench.running.client(name) for name in ("a", "a", "b"))
    clients = bench.do("status")["clients"]
    assert [row["export"] for row in clients] == ["a", "a", "b"]  # type: ignore[attr-defined]
    bench.do("disconnect", client=clients[0]["client"])  # type: ignore[index]
    assert first.is_hung_up()
    assert second.read(0, 1) == b"\0"
    assert len(bench.do("disconnect", export="a")["clients"]) == 1  # type: ignore[arg-type]
    assert second.is_hung_up()
    assert other.read(0, 1) == b"\0"
    assert bench.running.client("a").read(0, 1) == b"\0"
    with pytest.raises(errors.NotFound):
        bench.do("disconnect", client=999)
    for params in ({}, {"client": "a"}, {"client": True}, {"client": 1, "export": "a"}):
        with pytest.raises(BadParams):
            bench.do("disconnect", **params)


def test_remove_completes_while_clients_reconnect(bench: Bench) -> None:
    """`remove` with `disconnect` completes while clients reconnect without a pause; then the export is gone."""
    stopped = threading.Event()
    refused: list[bool] = []

    def keep_reconnecting() -> None:
        while not stopped.is_set():
            with contextlib.closing((client := bench.running.connect()).sock):
                client.start()
                kind = client.option(nbd.GO, nbd.go_data("b"))[-1][0]
                if kind != nbd.ACK:
                    refused.append(kind == nbd.UNKNOWN)
                    return
                with contextlib.suppress(nbd.HungUp, OSError):
                    client.take(1)

    client = bench.running.client("b")
    client.call(nbd.WRITE, 0, payload=b"kept")
    threads = [threading.Thread(target=keep_reconnecting) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        assert bench.do("remove", export="b", disconnect=True) == {"export": "b"}
        assert client.is_hung_up()
        for thread in threads:  # each ends when it is refused
            thread.join(60)
    finally:
        stopped.set()
        for thread in threads:
            thread.join()
    assert refused == [True] * 3
    with open_disk(bench.folder / "b.vhd", writable=True) as disk:
        assert disk.read(0, 4) == b"kept"


def test_remove_while_the_server_ends(tmp_path: Path) -> None:
    """If disconnecting an export's last client ends the server, the export is flushed and closed all the same."""
    with bench_in(tmp_path) as bench:
        bench.server._exit_last = True
        client = bench.running.client("b")
        client.call(nbd.WRITE, 0, payload=b"kept")
        assert bench.do("remove", export="b", disconnect=True) == {"export": "b"}
        bench.running.join()
        with open_disk(bench.folder / "b.vhd", writable=True) as disk:
            assert disk.read(0, 4) == b"kept"


def test_status(bench: Bench) -> None:
    """Counters count, and an unknown parameter is refused."""
    client = bench.running.client("b")
    for _ in range(10):
        client.read(0, 512)
    client.read(0, 2 * MIB)
    client.call(Command.WRITE, 0, 2 * MIB, payload=bytes(2 * MIB))
    client.call(Command.FLUSH)
    status = bench.do("status")
    assert status["requests"] == 13 and sum(count for _, count in status["latency_us"]) == 13  # type: ignore[attr-defined]
    with pytest.raises(BadParams):
        bench.do("status", verbose=True)


def test_the_end_waits_for_a_snapshot(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server asked to stop during a snapshot completes it first, with a sound disk; later ones are refused."""
    client = bench.running.client("a")
    client.call(Command.WRITE, 0, 4, payload=b"kept")
    leaf = bench.exports[0].disk.chain.leaf
    seal, entered, gate = leaf.seal, threading.Event(), threading.Event()

    def slow() -> None:
        entered.set()
        assert gate.wait(SECONDS)
        seal()

    monkeypatch.setattr(leaf, "seal", slow)
    done: list[object] = []
    thread = threading.Thread(target=lambda: done.append(bench.do("snapshot", exports={"a": None})))
    thread.start()
    assert entered.wait(SECONDS)
    bench.do("shutdown")
    time.sleep(0.1)  # time in which a server that did not wait would end
    gate.set()
    thread.join(SECONDS)
    assert done
    bench.running.join()
    with open_disk(bench.folder / "a.avhd", writable=True) as disk:
        assert disk.read(0, 4) == b"kept"
    with pytest.raises(errors.VhdkitError):
        bench.do("snapshot", exports={"b": None})
    assert bench.files() == ["a.avhd", "a.vhd", "b.vhd"]


def test_a_new_leaf_must_be_where_it_will_be_found(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> None:
    """INV-LIVE-PRESERVES: if a child cannot be found, the frozen leaf could be written to again: refused."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    with pytest.raises(errors.InvalidArgument, match="outside the folders that are searched"):
        bench.do("snapshot", exports={"a": str(elsewhere / "a.avhd")})
    assert bench.files() == ["a.vhd", "b.vhd"] and not list(elsewhere.iterdir())


def test_a_new_leaf_has_a_name_of_its_format(bench: Bench) -> None:
    """A name of another format is refused in the words of `vhdkit snapshot`, and nothing is made."""
    with pytest.raises(errors.InvalidArgument, match=r"has the name of a VHDX, but its parent .* is a VHD") as caught:
        bench.do("snapshot", exports={"a": str(bench.folder / "new.avhdx")})
    assert "name the child .avhd;" in str(caught.value)
    assert bench.files() == ["a.vhd", "b.vhd"]


def test_an_export_in_use_stays(bench: Bench) -> None:
    """An export with a client is not removed; after the client has gone, what it wrote is in the file."""
    with bench.running.client("b") as client:
        client.call(Command.WRITE, 0, PAGE_SIZE, payload=b"x" * PAGE_SIZE)
        with pytest.raises(errors.ImageInUse, match="used by client"):
            bench.do("remove", export="b")

    def is_removed() -> bool:
        try:
            return bench.do("remove", export="b") == {"export": "b"}
        except errors.ImageInUse:
            return False

    wait_until(is_removed, "the server notices that the client has gone", SECONDS)
    with open_disk(bench.folder / "b.vhd", writable=True) as disk:
        assert disk.read(0, PAGE_SIZE) == b"x" * PAGE_SIZE
    assert [one.name for one in bench.server.catalog()] == ["a"]


def test_prepared_leaves_are_used(bench: Bench) -> None:
    """A prepared leaf is used by the same snapshot, which then makes no file, and by no other."""
    paths = {"a": str(bench.folder / "a1.avhd"), "b": str(bench.folder / "b1.avhd")}
    assert bench.do("prepare", exports=paths) == {"exports": paths}
    assert bench.files() == ["a.vhd", "a1.avhd", "b.vhd", "b1.avhd"]
    made = (bench.folder / "a1.avhd").stat().st_ino
    bench.do("snapshot", exports=paths)
    assert (bench.folder / "a1.avhd").stat().st_ino == made
    assert [export.disk.path for export in bench.exports] == [paths["a"], paths["b"]]
    bench.do("prepare", exports={"a": str(bench.folder / "a2.avhd")})
    other = str(bench.folder / "other.avhd")
    bench.do("snapshot", exports={"a": other})  # another one: the prepared leaf is removed
    assert bench.exports[0].disk.path == other and not (bench.folder / "a2.avhd").exists()
    with pytest.raises(errors.AlreadyExists):
        bench.do("prepare", exports={"a": paths["a"]})
    with pytest.raises(BadParams):
        bench.do("prepare", exports=7)


def test_unused_prepared_leaves_are_removed(bench: Bench) -> None:
    """On request, at a resize, for which they would be too small, and at the end."""
    path = str(bench.folder / "a1.avhd")
    ways: tuple[Callable[[], object], ...] = (
        lambda: bench.do("prepare", exports={}),
        lambda: bench.do("resize", export="a", size_bytes=2 * SIZE),
        bench.operations.close,
    )
    for forget in ways:
        bench.do("prepare", exports={"a": path})
        assert "a1.avhd" in bench.files()
        forget()
        assert "a1.avhd" not in bench.files()
    bench.do("prepare", exports={"a": path})
    Path(path).unlink()  # removed by another program
    bench.do("prepare", exports={})
    bench.do("snapshot", exports={"a": path})
    assert bench.exports[0].disk.path == path and bench.exports[0].disk.size_bytes == 2 * SIZE


def test_writes_continue_after_a_leaf_is_prepared(bench: Bench) -> None:
    """While its child is only prepared a leaf is still written to; then the child reads all of it."""
    path = str(bench.folder / "a1.avhd")
    bench.do("prepare", exports={"a": path})
    bench.exports[0].disk.write(4096, b"after" * 100)
    bench.do("snapshot", exports={"a": path})
    assert bench.exports[0].disk.read(4096, 500) == b"after" * 100
