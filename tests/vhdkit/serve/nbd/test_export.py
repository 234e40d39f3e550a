# SPDX-License-Identifier: Apache-2.0
"""Commands on a disk through a real server: block status, zeros, trims, names, what is advertised."""

from __future__ import annotations

import itertools
import random
import struct
from pathlib import Path

import pytest

from tests import nbd_client as nbd
from tests.harness.model import walk_sector
from tests.harness.power import DISK_SIZE, LINK, Scene, open_mem
from tests.harness.stores import MemStore
from tests.nbd_client import (
    EINVAL,
    ENOTSUP,
    FAST_ZERO,
    NO_HOLE,
    READ,
    REQ_ONE,
    STATUS,
    TRIM,
    WRITE,
    ZEROES,
    Client,
    serving,
)
from tests.vhdkit.serve.disks import SIZE, child, empty, export_of, sparse
from vhdkit import OpenOptions, create_image, errors, open_disk
from vhdkit.formats.probe import open_layer
from vhdkit.formats.vhd.create import create_differencing
from vhdkit.image import Layer
from vhdkit.readahead import Budget
from vhdkit.serve.nbd.export import Export
from vhdkit.uncached import KEPT_BYTES, CacheMode
from vhdkit.units import GIB, KIB, MIB, SECTOR_SIZE

pytestmark = pytest.mark.timeout(120)
ALLOCATION, DEPTH, DIRTY = "base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:"
BOTH = pytest.mark.parametrize("extended", [False, True], ids=["structured", "extended"])


def deep(depth: int = 4) -> Scene:
    """A chain of `depth` layers with partial bitmaps over a base; each layer owns some sectors."""
    scene, rng = child(5), random.Random(5)
    leaf, parents, content = scene.leaf, list(scene.parents), bytearray(scene.content)
    for number in range(depth - 1):
        parents.insert(0, open_layer(leaf.copy(frozen=True)))
        leaf = MemStore(f"layer {number}.avhd")
        create_differencing(leaf, DISK_SIZE, LINK, block_size_bytes=512 * KIB)
        with open_mem(leaf, parents, writable=True) as disk:
            for _ in range(4):
                size = rng.randint(1, 90) * SECTOR_SIZE
                offset = rng.randrange(0, SIZE - size, SECTOR_SIZE)
                content[offset : offset + size] = data = rng.randbytes(size)
                disk.write(offset, data)
    return Scene(leaf, parents, bytes(content))


def runs_of(client: Client, context: str, offset: int, length: int, *, flags: int = 0) -> list[tuple[int, int]]:
    """The descriptors of one context, checked for what row 37 requires of all of them."""
    answer = client.call(STATUS, offset, length, flags=flags)
    assert answer.error == 0, answer
    assert set(answer.statuses) == set(client.contexts), "row 37: one chunk per context"
    runs = next(answer.statuses[number] for number, name in client.contexts.items() if name == context)
    sizes = [size for size, _ in runs]
    assert runs and all(sizes) and len(runs) <= 1 << 20
    assert sum(sizes[:-1]) < length and offset + sum(sizes) <= client.size
    assert all(before[1] != after[1] for before, after in itertools.pairwise(runs)), "equal neighbours"
    assert not flags & REQ_ONE or (len(runs) == 1 and sizes[0] <= length)
    return runs


def whole_map(client: Client, context: str, *, flags: int = 0) -> list[tuple[int, int]]:
    """The descriptors of the whole disk, in as many requests as necessary."""
    found: list[tuple[int, int]] = []
    offset = 0
    while offset < client.size:
        for size, state in runs_of(client, context, offset, min(client.size - offset, 1 << 31), flags=flags):
            found.append((size, state))
            offset += size
    return found


def by_sector(runs: list[tuple[int, int]]) -> list[int]:
    """The state of each sector."""
    return [state for size, state in runs for _ in range(size // SECTOR_SIZE)]


def owners(scene: Scene) -> list[int]:
    """For each sector, the layer that owns it by the plain rule; -1 for none."""
    layers: list[Layer] = [open_layer(scene.leaf), *scene.parents]
    return [walk_sector(layers, index)[0] for index in range(SIZE // SECTOR_SIZE)]


@BOTH
@pytest.mark.parametrize("flags", [0, REQ_ONE])
def test_maps_agree_with_the_layers(extended: bool, flags: int) -> None:
    """Rows 37, 38 and 40, INV-SECTOR-RULE: allocation, depth and dirty bitmaps agree with the layers' sectors."""
    scene = deep()
    export = export_of(scene)
    owned = owners(scene)
    ids = [str(one) for one in export.disk.layer_ids]
    dirty = [DIRTY + one for one in dict.fromkeys(ids)]
    with serving(export) as running:
        client = running.client(extended=extended, contexts=[ALLOCATION, DEPTH, *dirty])
        assert by_sector(whole_map(client, DEPTH, flags=flags)) == [owner + 1 for owner in owned]
        for context in dirty:
            depth = ids.index(context.removeprefix(DIRTY))
            assert by_sector(whole_map(client, context, flags=flags)) == [int(0 <= one <= depth) for one in owned]
        states = by_sector(whole_map(client, ALLOCATION, flags=flags))
        assert set(states) <= {0, 3}
        for index, state in enumerate(states):
            sector = scene.content[index * SECTOR_SIZE : (index + 1) * SECTOR_SIZE]
            assert not state & 2 or not any(sector), "row 38: ZERO where there is data"
            assert state or owned[index] >= 0


@BOTH
def test_status_of_odd_ranges(extended: bool) -> None:
    """Row 37: ranges inside sectors and at the very end are answered without empty runs."""
    scene = child()
    with serving(export_of(scene)) as running:
        client = running.client(extended=extended, contexts=[ALLOCATION])
        for offset, length in ((0, 1), (1, 1), (511, 2), (SIZE - 1, 1), (3, SIZE - 3), (SIZE - 513, 512)):
            for flags in (0, REQ_ONE):
                assert sum(size for size, _ in runs_of(client, ALLOCATION, offset, length, flags=flags)) <= length
        assert client.call(STATUS, SIZE, 1).error == client.call(STATUS, 0, SIZE + 1).error == EINVAL


@BOTH
def test_runs_beyond_4_gib(extended: bool) -> None:
    """Rows 35 and 37: runs of more than 4 GiB are cut to 32 bits, and complete with extended headers."""
    with serving(export_of(sparse(2040 * GIB))) as running:
        client = running.client(extended=extended, contexts=[ALLOCATION, DEPTH])
        size = client.size
        if extended:
            assert runs_of(client, ALLOCATION, 0, size) == [(size, 3)]
            assert runs_of(client, DEPTH, 7 * GIB + 1, size - 9 * GIB, flags=REQ_ONE) == [(size - 9 * GIB, 0)]
            assert client.call(ZEROES, 0, 5 * GIB).error == client.call(TRIM, 0, 5 * GIB).error == 0
            assert client.call(nbd.CACHE, 0, 5 * GIB).error == 0
        else:
            [(length, state)] = runs_of(client, ALLOCATION, 0, (1 << 32) - 1)
            assert state == 3 and length % 4096 == 0 and length > 4 * GIB - MIB
            assert client.call(ZEROES, 0, (1 << 32) - 1).error == 0


def test_status_is_bounded() -> None:
    """Rows 13 and 37: a chequered disk is answered in bounded pieces, and repeated requests cover all of it."""
    scene = empty()
    with open_mem(scene.leaf, writable=True) as disk:
        for offset in range(0, SIZE, 2 * SECTOR_SIZE):
            disk.write(offset, b"x" * SECTOR_SIZE)
    with serving(export_of(scene)) as running:
        client = running.client(contexts=[ALLOCATION, DEPTH])
        assert by_sector(whole_map(client, ALLOCATION)) == [index % 2 * 3 for index in range(SIZE // SECTOR_SIZE)]


def test_filter() -> None:
    """With extended headers a payload selects contexts; a malformed one is EINVAL and drained."""
    with serving(export_of(child())) as running:
        client = running.client(extended=True, contexts=[ALLOCATION, DEPTH])
        assert client.flags & nbd.STATUS_PAYLOAD
        for number in client.contexts:
            answer = client.call(STATUS, 512, payload=struct.pack(">QI", 4096, number))
            assert list(answer.statuses) == [number] and not answer.error
        crooked = (
            struct.pack(">QI", 4096, 99),
            struct.pack(">QII", 4096, 1, 1),
            b"x" * 8,
            b"x" * 5000,
            b"x" * 100_000,
        )
        for payload in crooked:
            assert client.call(STATUS, 512, payload=payload).error == EINVAL
        assert client.call(STATUS, 0, 512).error == 0


def test_contexts_of_another_export() -> None:
    """Row 19: contexts that were set for another export are invalid: BLOCK_STATUS is EINVAL."""
    with serving(export_of(child(), name="a"), export_of(child(), name="b")) as running:
        client = running.connect().start(structured=True)
        replies = client.option(nbd.SET_META, nbd.meta_data([ALLOCATION], "a"))
        assert len(replies) == 2
        client.go("b")
        assert client.call(STATUS, 0, 512).error == EINVAL


def test_holes_are_not_sent_as_zeros() -> None:
    """Row 34: sectors without an owner are sent as a hole without bytes; with DF as zeros."""
    with serving(export_of(sparse(64 * MIB))) as running, running.client(structured=True) as client:
        assert client.call(WRITE, 5 * MIB, payload=b"x" * 4096).error == 0
        answer = client.call(READ, 0, 16 * MIB)
        content = answer.content(0, 16 * MIB)
        assert content.strip(b"\0") == b"x" * 4096 and content.index(b"x") == 5 * MIB
        assert sum(size for _, size in answer.holes) >= 10 * MIB
        explicit = client.call(READ, 0, MIB, flags=nbd.DF)
        assert explicit.data == [(0, bytes(MIB))]


# -- zeros and trims --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [0, NO_HOLE, FAST_ZERO, nbd.FUA | NO_HOLE])
def test_write_zeroes(flags: int) -> None:
    """Row 39: the range reads as zeros, whatever it or a parent held; neighbours are unchanged."""
    scene, rng = child(), random.Random(6)
    model = bytearray(scene.content)
    with serving(export_of(scene)) as running, running.client() as client:
        for _ in range(12):
            offset = rng.randrange(SIZE)
            length = rng.randint(1, min(SIZE - offset, rng.choice((600, 5000, SIZE))))
            assert client.call(ZEROES, offset, length, flags=flags).error == 0
            model[offset : offset + length] = bytes(length)
            assert client.read(0, SIZE) == model


def test_no_hole_allocates_space() -> None:
    """Row 39: with NO_HOLE the range is allocated in the file."""
    export = export_of(empty())
    with serving(export) as running:
        client = running.client(contexts=[DEPTH])
        assert client.call(ZEROES, 0, 64 * KIB).error == 0
        assert client.call(ZEROES, MIB, 64 * KIB, flags=NO_HOLE).error == 0
        assert by_sector(whole_map(client, DEPTH))[MIB // SECTOR_SIZE] == 1


def test_fast_zero_fails_fast() -> None:
    """Row 39: if zeros are not faster than data, FAST_ZERO is ENOTSUP and the data is unchanged."""

    class Slow(MemStore):
        def punches(self) -> bool:
            return False

    scene = child()
    slow = Slow("slow.avhd", sectors=dict(scene.leaf._sectors), size_bytes=scene.leaf.size())
    with serving(export_of(scene, store=slow)) as running, running.client() as client:
        assert client.flags & nbd.CAN_FAST_ZERO
        assert client.call(ZEROES, 0, SIZE, flags=FAST_ZERO).error == ENOTSUP
        assert client.call(ZEROES, 0, SIZE, flags=FAST_ZERO | NO_HOLE).error == ENOTSUP
        assert client.read(0, SIZE) == scene.content


def test_trim() -> None:
    """A trim changes nothing outside its range, which reads as zeros or as before."""
    scene = empty()
    with serving(export_of(scene)) as running, running.client() as client:
        assert client.call(WRITE, 0, payload=b"x" * SIZE).error == 0
        assert client.call(TRIM, 1000, 100_000, flags=nbd.FUA).error == 0
        content = client.read(0, SIZE)
        assert content[:1000] == b"x" * 1000 and content[101_000:] == b"x" * (SIZE - 101_000)
        assert set(content[1000:101_000]) <= set(b"x\0")


# -- what is advertised -----------------------------------------------------------------------------------------


def test_flags_say_what_is_served() -> None:
    """Row 23: HAS_FLAGS always, and the flag of every command that is supported."""
    with serving(export_of(child(), name="rw"), export_of(child(), name="ro", read_only=True)) as running:
        common = nbd.HAS_FLAGS | nbd.CAN_FLUSH | nbd.CAN_FUA | nbd.MULTI_CONN | nbd.CAN_CACHE
        writes = nbd.CAN_TRIM | nbd.CAN_ZERO | nbd.CAN_FAST_ZERO
        assert running.client("rw").flags == common | writes
        assert running.client("rw", structured=True).flags == common | writes | nbd.CAN_DF
        assert running.client("ro").flags == common | nbd.READ_ONLY


@pytest.mark.parametrize("name", ["x" * 4097, "a\0b", "\udcff"])
def test_names_that_cannot_be_requested(name: str) -> None:
    """Row 13: such a name is refused when the export is made."""
    with pytest.raises(errors.InvalidArgument):
        Export(name, open_mem(empty().leaf))
    with pytest.raises(errors.InvalidArgument):
        Export("fine", open_mem(empty().leaf), description="a\0b")


@pytest.mark.parametrize("cache", ["writeback", "none"])
def test_what_may_be_read_ahead(tmp_path: Path, cache: str) -> None:
    """Of a disk that is kept out of the page cache no more is prefetched than stays in there until it is read."""
    create_image(tmp_path / "disk.vhd", 64 * MIB)
    with open_disk(tmp_path / "disk.vhd", options=OpenOptions(cache=CacheMode(cache))) as disk:
        export, shared = Export("", disk), Budget()
        before = shared.left_bytes
        budget = export.read_ahead(shared)
        assert export.read_ahead(shared) is budget
        assert budget.left_bytes == (KEPT_BYTES if cache == "none" else before)
        assert budget.take(KEPT_BYTES) and shared.left_bytes == before - KEPT_BYTES
        assert budget.take(1) is (cache == "writeback")
