# SPDX-License-Identifier: Apache-2.0
"""INV-BOUNDED in the normal test run: every seed of the fuzz targets, and several hundred mutations of them.

This module decides how much is replayed (about ten seconds) and what is out of proportion: a case may take five
seconds and, beyond a fixed amount of memory, a few times the bytes that its file stores. An everyday run counts the
memory that is used, a nightly one also what is only asked for. The long runs are `python -m
fuzz.fuzz_open`, `fuzz_chain` and `fuzz_merge`.
"""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from fuzz import (
    fuzz_chain,
    fuzz_hyperv,
    fuzz_merge,
    fuzz_nbd,
    fuzz_open,
    fuzz_repair,
    fuzz_switch,
    fuzz_vhdx_log,
    fuzz_vhdx_open,
    fuzz_vhdx_repair,
    fuzz_vhdx_tables,
    loop,
)
from fuzz.loop import MAX_CASE_SECONDS, Mutate, Target
from fuzz.make_corpus import MAX_SEED_BYTES, corpus
from fuzz.mutate import mutate_image
from fuzz.mutate_vhdx import mutate_vhdx
from fuzz.sparse import FuzzStore, Sparse, decode
from tests.support import daily_or_nightly
from vhdkit.formats.probe import FormatName
from vhdkit.serve.nbd.heap import trim
from vhdkit.units import KIB, MIB

TARGETS: dict[str, tuple[Target, Mutate]] = {
    "fuzz_open": (fuzz_open.target, mutate_image),
    "fuzz_chain": (fuzz_chain.target, fuzz_chain.mutate),
    "fuzz_hyperv": (fuzz_hyperv.target, fuzz_hyperv.mutate),
    "fuzz_merge": (fuzz_merge.target, fuzz_merge.mutate),
    "fuzz_repair": (fuzz_repair.target, mutate_image),
    "fuzz_nbd": (fuzz_nbd.target, fuzz_nbd.mutate),
    "fuzz_switch": (fuzz_switch.target, fuzz_switch.mutate),
    "fuzz_vhdx_log": (fuzz_vhdx_log.target, fuzz_vhdx_log.mutate),
    "fuzz_vhdx_open": (fuzz_vhdx_open.target, mutate_vhdx),
    "fuzz_vhdx_repair": (fuzz_repair.target, fuzz_vhdx_repair.mutate),
    "fuzz_vhdx_tables": (fuzz_vhdx_tables.target, fuzz_vhdx_tables.mutate),
}
CORPUS_OF = {
    "fuzz_repair": fuzz_repair.SEEDS,
    "fuzz_vhdx_log": fuzz_vhdx_log.SEEDS,
    "fuzz_vhdx_repair": fuzz_vhdx_repair.SEEDS,
}
SEEDS = [
    pytest.param(name, data, id=f"{name}-{file}")
    for name in TARGETS
    for file, data in loop.seeds(CORPUS_OF.get(name, name))
    if not (name == "fuzz_repair" and file.endswith("-2tib"))  # seconds each, and test_repair has such tables
]
BATCHES = [
    *(("fuzz_open", seed, 50) for seed in range(daily_or_nightly(2, 8))),
    *(("fuzz_chain", seed, 15) for seed in range(daily_or_nightly(2, 8))),
    *(("fuzz_hyperv", seed, 150) for seed in range(daily_or_nightly(1, 8))),
    *(("fuzz_merge", seed, 8) for seed in range(daily_or_nightly(2, 8))),
    *(("fuzz_repair", seed, 25) for seed in range(daily_or_nightly(2, 8))),
    *(("fuzz_nbd", seed, 150) for seed in range(3)),
    *(("fuzz_switch", seed, 200) for seed in range(3)),
    *(("fuzz_vhdx_log", seed, 40) for seed in range(daily_or_nightly(2, 8))),
    *(("fuzz_vhdx_open", seed, 20) for seed in range(daily_or_nightly(2, 8))),
    *(("fuzz_vhdx_repair", seed, 8) for seed in range(daily_or_nightly(2, 8))),
    *(("fuzz_vhdx_tables", seed, 400) for seed in range(daily_or_nightly(1, 4))),
]
FIXED_MEMORY = 128 * MIB  # the block map and the fine table of a disk of 2 TiB are 64 MiB
MEMORY_PER_STORED_BYTE = 12  # a table of 4 Mi entries is 16 MiB; a few arrays of 64-bit numbers are made from it


def replay(target: Target, data: bytes) -> None:
    """Replay one case within its bounds of time and memory."""
    stored = sum(len(raw) * repeat for _, raw, repeat in decode(data).records)
    peak = (peak_asked_for if daily_or_nightly(False, True) else peak_used)(lambda: loop.timed(target, data))
    limit = FIXED_MEMORY + MEMORY_PER_STORED_BYTE * stored
    assert peak <= limit, f"{peak // MIB} MiB for a file that stores {stored // KIB} KiB"


def peak_used(work: Callable[[], object]) -> int:
    """How many bytes of memory the work took in addition, as the kernel saw it."""
    trim()  # else what earlier work has freed would be used again, unseen
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    except OSError:
        return peak_asked_for(work)
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    """A size in bytes from this process's status."""
    (line,) = (one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith(f"{name}:"))
    return int(line.split()[1]) * KIB


def peak_asked_for(work: Callable[[], object]) -> int:
    """How many bytes the work had allocated at most, used or not. Takes three times as long."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("name", "data"), SEEDS)
def test_seed(name: str, data: bytes) -> None:
    """INV-BOUNDED holds for the seed, in time and memory."""
    replay(TARGETS[name][0], data)


@pytest.mark.parametrize(("name", "seed", "count"), BATCHES)
def test_mutations(name: str, seed: int, count: int) -> None:
    """INV-BOUNDED holds for mutations of the seeds, most of them with corrected checksums."""
    target, mutate = TARGETS[name]
    inputs = [
        data for file, data in loop.seeds(CORPUS_OF.get(name, name)) if not file.endswith("ib")
    ]  # large tables are slow
    for number, data in enumerate(loop.mutations(inputs, mutate, seed, count)):
        try:
            loop.timed(target, data)
        except Exception as error:
            error.add_note(f"mutation {number} of seed {seed}, as hex: {data[:4096].hex()}")
            raise


def test_the_corpus_matches_its_generator() -> None:
    """The seeds on disk are those of make_corpus, byte for byte; only found-* files may exist in addition."""
    for name, made in corpus().items():
        found = dict(loop.seeds(name))
        assert {file: data for file, data in found.items() if not file.startswith("found-")} == made
        assert all(len(data) <= MAX_SEED_BYTES for data in found.values())


def test_mutations_reach_deep() -> None:
    """INV-BOUNDED would mean little if mutations failed early: a good part of them still open."""
    inputs = [data for file, data in loop.seeds("fuzz_open") if not file.endswith("ib")]
    opened = sum(fuzz_open.opens(data) for data in loop.mutations(inputs, mutate_image, 1, 100))
    assert 20 < opened < 95


def test_vhdx_mutations_reach_deep() -> None:
    """INV-BOUNDED would mean little if mutations failed early: a good part of the VHDX files still open."""
    inputs = [data for _, data in loop.seeds("fuzz_vhdx_open")]
    opened = sum(fuzz_open.opens(data, FormatName.VHDX) for data in loop.mutations(inputs, mutate_vhdx, 1, 100))
    assert 20 < opened < 95


def test_vhdx_log_mutations_reach_replay() -> None:
    """INV-BOUNDED of the log is tested where it matters: in many mutations there is something to replay."""
    inputs = [data for _, data in loop.seeds("fuzz_vhdx_open")]
    made = loop.mutations(inputs, fuzz_vhdx_log.mutate, 1, 100)
    assert 20 < sum(map(fuzz_vhdx_log.replays, made)) < 95


def test_nbd_mutations_reach_requests() -> None:
    """INV-BOUNDED of the NBD server is tested where it matters: many mutations get as far as requests."""
    inputs = [data for _, data in loop.seeds("fuzz_nbd")]
    counts = [fuzz_nbd.reaches_requests(data) for data in loop.mutations(inputs, fuzz_nbd.mutate, 1, 200)]
    assert 25 < sum(count > 2 for count in counts) < 190


def test_slow_case_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Self-test: a case over its time bound fails."""
    assert MAX_CASE_SECONDS > 0
    monkeypatch.setattr(loop, "MAX_CASE_SECONDS", -1.0)
    with pytest.raises(loop.TooSlow):
        loop.timed(lambda data: None, b"")


def test_greedy_case_is_reported() -> None:
    """Self-test: a case over its memory bound fails."""

    def greedy(data: bytes) -> None:
        del data
        bytearray(b"x") * (FIXED_MEMORY + 2 * MIB)

    with pytest.raises(AssertionError, match="MiB for a file that stores 0 KiB"):
        replay(greedy, b"")
    assert peak_asked_for(lambda: greedy(b"")) > FIXED_MEMORY


def test_touching_the_outside_is_reported() -> None:
    """Self-test: opening a file outside the allowed folder, or any for writing, fails the chain target."""
    for event in (("open", "/etc/passwd", 0), ("os.listdir", "/etc", 0), ("open", "/allowed/leaf.vhd", 1)):
        with pytest.raises(AssertionError):
            fuzz_chain._judge([event], ["/allowed"], None)
    fuzz_chain._judge([("open", "/allowed/leaf.vhd", 2)], ["/allowed"], "/allowed/leaf.vhd")
    fuzz_chain._judge([("open", "/above/other.vhd", 0)], ["/above/allowed"], None, ["/above", "/"])
    with pytest.raises(AssertionError):
        fuzz_chain._judge([("open", "/above/outside/other.vhd", 0)], ["/above/allowed"], None, ["/above", "/"])


def test_the_real_path_is_checked(tmp_path: Path) -> None:
    """Self-test: a name beneath a descriptor, a descriptor's own name and a link are checked by where they lead."""
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "link").symlink_to("../secret")
    (tmp_path / "secret").write_bytes(b"secret")
    folder = os.open(tmp_path / "inside", os.O_RDONLY | os.O_DIRECTORY)
    owned: list[int] = []

    def work() -> None:
        owned.append(os.open("../secret", os.O_PATH, dir_fd=folder))
        owned.append(os.open(f"/proc/self/fd/{owned[0]}", os.O_RDONLY))
        owned.append(os.open("link", os.O_PATH | os.O_NOFOLLOW, dir_fd=folder))
        owned.append(os.open("link", os.O_RDONLY, dir_fd=folder))
        os.listdir(folder)

    try:
        seen = [path for _, path, _ in fuzz_chain._watch().during(work)]
    finally:
        for fd in (folder, *owned):
            os.close(fd)
    real = os.path.realpath(tmp_path)
    assert seen == [real + "/secret", real + "/secret", real + "/inside/link", real + "/secret", real + "/inside"]


def test_sparse_input_decodes_to_its_file() -> None:
    """Encoded files decode to the same: size, distant bytes, repeats, later records over earlier ones."""
    image = Sparse(1 << 40)
    image.put(3, b"ab", 1000)
    image.put(1 << 39, b"\xff" * 4, 512)
    image.put(100, b"over")
    again = decode(image.encode())
    store = FuzzStore(again)
    assert (again.size, store.size()) == (1 << 40, 1 << 40)
    for offset, size in ((0, 2200), (99, 6), ((1 << 39) - 7, 3000), ((1 << 40) - 5, 50)):
        assert store.pread(offset, size) == again.peek(offset, size) == image.peek(offset, size)
    assert decode(b"plain").peek(0, 9) == b"plain"
    assert [run[2] for run in store.data_runs(0, 1 << 40)] == [True, False, True, False]
