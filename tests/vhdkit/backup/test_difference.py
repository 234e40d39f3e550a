# SPDX-License-Identifier: Apache-2.0
"""What changed between two nights: written over the earlier one it gives the later one, however it was found."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

import vhdkit
from tests.support import daily_or_nightly
from tests.vhdkit.backup.pruned import make
from tests.vhdkit.backup.repositories import Nights
from vhdkit import errors
from vhdkit.backup import difference
from vhdkit.backup.difference import ChangedDisk, FoundBy, NightChange, changed_by_comparison, changed_by_layers
from vhdkit.backup.leases import leases
from vhdkit.backup.night import no_stages
from vhdkit.backup.pruning import delete
from vhdkit.backup.serving import opened_changes
from vhdkit.chain.engine.chain import Chain
from vhdkit.units import KIB, MIB, SECTOR_SIZE


def applied(change: NightChange, earlier: bytes, later: bytes) -> bytes:
    """The earlier disk, made as long as the later one, with the changed parts of the later one."""
    result = bytearray(earlier[: len(later)].ljust(len(later), b"\0"))
    for begin, end in zip(change.begins, change.ends, strict=True):
        result[begin * SECTOR_SIZE : end * SECTOR_SIZE] = later[begin * SECTOR_SIZE : end * SECTOR_SIZE]
    return bytes(result)


def drawn_chain(folder: Path, rng: random.Random, extension: str, depth: int) -> list[tuple[str, bytes]]:
    """Images, each a child of the one before, with what each reads: data, zeros and parts of sectors, some grown."""
    size = 4 * MIB
    found: list[tuple[str, bytes]] = []
    for number in range(depth):
        path = str(folder / f"{number}.{extension if number == 0 else 'a' + extension}")
        if number == 0:
            kind = "vhdx" if extension == "vhdx" else "dynamic"
            vhdkit.create_image(path, size, disk_format=kind, block_size_bytes=MIB)
        else:
            vhdkit.create_child(path, found[-1][0])
            if rng.random() < 0.3:
                size += MIB
                vhdkit.resize(path, size)
        with vhdkit.open_disk(path, writable=True) as disk:
            for _ in range(rng.randrange(6)):
                offset = rng.randrange(size - 300 * KIB)
                if rng.random() < 0.4:
                    disk.write_zeroes(offset // MIB * MIB, rng.choice([MIB, 4096]))
                else:
                    disk.write(offset, rng.randbytes(rng.choice([1, 512, 5000, 200 * KIB])))
            disk.flush()
            found.append((path, disk.read(0, disk.size_bytes)))
    return found


@pytest.mark.parametrize("extension", ["vhd", "vhdx"])
def test_a_change_makes_the_later_disk(tmp_path: Path, extension: str) -> None:
    """The change by layers and by comparison each make the later disk of the earlier one, also where it became zeros
    or longer; layers own at least what differs."""
    rng = random.Random(f"change {extension}")
    for run in range(daily_or_nightly(4, 60)):
        folder = tmp_path / str(run)
        folder.mkdir()
        images = drawn_chain(folder, rng, extension, 4)
        later = images[-1]
        with Chain.open(later[0]) as chain:
            for index in range(4):
                path, content = images[3 - index]
                change = changed_by_layers(chain.layers, index)
                assert applied(change, content, later[1]) == later[1], (run, index)
                with Chain.open(path) as earlier:
                    compared = changed_by_comparison(chain, earlier)
                    assert applied(compared, content, later[1]) == later[1], (run, index)
                    back = changed_by_comparison(earlier, chain)
                    assert applied(back, later[1], content) == content
                assert all(a < b for a, b in zip(change.ends, change.begins[1:], strict=False))


def test_a_changed_disk_shows_the_change(tmp_path: Path) -> None:
    """Extents cover any range without gaps, DATA where it may have changed; reads are those of the later disk."""
    rng = random.Random(4)
    images = drawn_chain(tmp_path, rng, "vhd", 3)
    with Chain.open(images[-1][0]) as chain:
        change = changed_by_layers(chain.layers, 2)
        disk = ChangedDisk(chain, change, "1..3")
        expected = bytearray(len(images[-1][1]) // SECTOR_SIZE)
        for begin, end in zip(change.begins, change.ends, strict=True):
            expected[begin:end] = b"\1" * (end - begin)
        for _ in range(50):
            first = rng.randrange(len(expected))
            count = rng.randrange(1, len(expected) - first + 1)
            seen = bytearray()
            for one in disk.extents(first * SECTOR_SIZE, count * SECTOR_SIZE, find_holes=True):
                assert one.sector_index == first + len(seen) and (one.layer_index == 0) is (one.kind == "data")
                seen += bytes([one.layer_index + 1]) * one.sector_count
            assert seen == expected[first : first + count]
        assert disk.read(0, disk.size_bytes) == images[-1][1] and disk.layer_ids == ("1..3",)
        with pytest.raises(errors.ReadOnly):
            disk.write(0, b"x")


def test_the_number_of_runs_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of too many runs those that lie close together become one: nothing that changed is left out."""
    monkeypatch.setattr(difference, "MAX_RUNS", 10)
    runs = [(number * 300, number * 300 + 1) for number in range(500)]
    change = difference._change(runs, FoundBy.COMPARISON)
    assert len(change.begins) <= 10
    for first, stop in runs:
        assert any(begin <= first and stop <= end for begin, end in zip(change.begins, change.ends, strict=True))


def changes_of(nights: Nights, word: str, disk: str = "a") -> tuple[NightChange, bytes]:
    """The change A..B of a disk, and what it reads as."""
    earlier, _, later = word.partition("..")
    with nights.machine() as machine, opened_changes(machine, earlier, later, [disk], no_stages) as found:
        assert [one.night for one in leases(machine.repository.root)] == [found[0].later.night]
        return found[0].disk.change, found[0].disk.read(0, found[0].disk.size_bytes)


def test_nights_of_a_repository(tmp_path: Path) -> None:
    """In a line the change comes from layers; from a branch, backwards and after a prune it is right all the same; and
    a disk that is new is all of it."""
    nights = make(tmp_path / "repo")  # 5 stands on 2
    nights.add({"a": {0: b"8"}, "c": {4096: b"new"}})
    for _ in range(2):
        for word, how in (
            ("3..4", FoundBy.LAYERS), ("2..7", FoundBy.LAYERS), ("4..5", FoundBy.COMPARISON),
            ("7..3", FoundBy.COMPARISON), ("6..6", FoundBy.LAYERS), ("4..8", FoundBy.COMPARISON),
        ):  # fmt: skip
            earlier, later = (nights.content[int(one)]["a"] for one in word.split(".."))
            change, content = changes_of(nights, word)
            assert content == later and applied(change, earlier, later) == later
            assert change.found_by is how, word
        if 1 in nights.content:
            with nights.machine() as machine:
                delete(machine, 1)
            del nights.content[1]
    change, content = changes_of(nights, "7..8", "c")
    assert change.found_by is FoundBy.ALL and applied(change, b"", content) == content
    with pytest.raises(errors.NotFound, match="no disk 'z'"):
        changes_of(nights, "2..3", "z")
    with nights.machine() as machine:
        assert leases(machine.repository.root) == []
    assert not os.path.exists(tmp_path / "repo/leases") or os.listdir(tmp_path / "repo/leases") == []
