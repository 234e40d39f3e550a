# SPDX-License-Identifier: Apache-2.0
"""Commands killed with SIGKILL at random moments, on real files: a bounded loop over a table of scenes.

    prepare a folder -> run the command in a separate process -> kill it -> check -> recover, sometimes killed, too
    -> check -> recover completely -> check

`SCENES` is the table; a scene says what is prepared, which command is run, what must be true after any kill, and how
to recover. `script/soak` runs `python -m tests.soak SECONDS [SCENE...]`; `test_soak.py` runs each scene briefly. The
command runs in a fork of this process, which saves starting an interpreter for each of hundreds of kills.
"""

from __future__ import annotations

import argparse
import functools
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import vhdkit
from tests import soak_cut, soak_interrupted, soak_live, soak_names, soak_remember, soak_running, soak_snapshots
from vhdkit.cli.main import main as vhdkit_main
from vhdkit.units import KIB, MIB

Work: TypeAlias = Sequence[str] | Callable[[], None]


@dataclass(frozen=True, slots=True)
class Scene:
    """One thing that is killed. Everything happens in its own folder, the working directory.

    `prepare` makes the files, the same each time. `command` is what follows `vhdkit`, or a function. `look` raises
    AssertionError if something is wrong after a kill; its `done` is true once recovery has finished. `recover` is the
    next command to run, or None if nothing is left to do.
    """

    name: str
    prepare: Callable[[], None]
    command: Work
    look: Callable[[bool], None]
    recover: Callable[[], Work | None]


@dataclass(slots=True)
class Tally:
    """What a run did."""

    kills: int = 0
    finished: int = 0  # commands that were faster than their killer
    recoveries: int = 0
    states: dict[str, int] = field(default_factory=dict)  # what the folder looked like after a kill


def run_killed(command: Work, seconds: float | None) -> bool:
    """Run `vhdkit COMMAND`, or the function, in a separate process and kill it after that time; True if it was
    killed."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 1)
        if seconds is not None:
            os.dup2(null, 2)
        try:
            if callable(command):
                command()
                os._exit(0)
            vhdkit_main(list(command))
        except SystemExit as end:
            os._exit(end.code if isinstance(end.code, int) else 1)
        finally:
            os._exit(70)
    if seconds is not None:
        time.sleep(seconds)  # the moment of the kill is random
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return True
    assert os.waitstatus_to_exitcode(status) == 0, f"{command}: {os.waitstatus_to_exitcode(status)}"
    return False


def soak(scene: Scene, seconds: float, seed: int = 1, *, kills: int = 0) -> Tally:
    """Kill the scene's command for that long, and at least that often.

    Raises AssertionError; the folder is then kept and named.
    """
    tally, rng, here = Tally(), random.Random(seed), os.getcwd()
    end = time.monotonic() + seconds
    base = Path(tempfile.mkdtemp(prefix="vhdkit-soak-"))
    try:
        (base / "fresh").mkdir()
        os.chdir(base / "fresh")
        scene.prepare()
        os.chdir(base)
        duration = 0.2
        while time.monotonic() < end or tally.kills < kills:
            shutil.rmtree(base / "work", ignore_errors=True)
            shutil.copytree(base / "fresh", base / "work")
            os.chdir(base / "work")
            duration = _one(scene, rng, duration, tally)
            os.chdir(base)
    except AssertionError as error:
        error.add_note(f"{scene.name}, seed {seed}: the folder is {base}")
        os.chdir(here)
        raise
    os.chdir(here)
    shutil.rmtree(base)
    return tally


def _one(scene: Scene, rng: random.Random, duration: float, tally: Tally) -> float:
    """Kill one command, check, recover; returns how long the command takes, as far as that is known."""
    begin = time.monotonic()
    killed = run_killed(scene.command, rng.uniform(0, duration))
    if killed:
        tally.kills += 1
        duration *= 1.02  # until it sometimes finishes: kills reach its very end
    else:
        tally.finished += 1
        duration = max((time.monotonic() - begin) * 0.98, 0.002)
    state = " ".join(sorted(name for name in os.listdir() if not name.endswith(".part")))
    tally.states[state] = tally.states.get(state, 0) + 1
    scene.look(False)
    command = scene.recover()
    if command is not None and rng.random() < 0.4:
        tally.kills += run_killed(command, rng.uniform(0, duration))
        scene.look(False)
        command = scene.recover()
    if command is not None:
        run_killed(command, None)
        tally.recoveries += 1
    scene.look(True)
    return duration


# -- merge ------------------------------------------------------------------------------------------------------

_DISK = 24 * MIB
_BLOCK = 512 * KIB
_LAYERS = ("leaf.avhd", "middle.avhd", "base.vhd")


def _scribble(path: str, rng: random.Random, writes: int) -> None:
    with vhdkit.open_disk(path, writable=True) as disk:
        for _ in range(writes):
            size = rng.choice((512, 4096, 65_536, _BLOCK))
            disk.write(rng.randrange(_DISK - size) // 512 * 512, rng.randbytes(size))
        disk.write_zeroes(rng.randrange(_DISK - _BLOCK), _BLOCK)


def _make_chain() -> None:
    rng = random.Random("soak")
    vhdkit.create_image("base.vhd", _DISK, block_size_bytes=_BLOCK)
    _scribble("base.vhd", rng, 40)
    for child, parent in (("middle.avhd", "base.vhd"), ("leaf.avhd", "middle.avhd")):
        vhdkit.create_child(child, parent)
        _scribble(child, rng, 40)
    Path("expected").write_bytes(_content("leaf.avhd"))


def _make_chain_with_child() -> None:
    _make_chain()
    vhdkit.create_child("child.avhd", "leaf.avhd")


def _content(path: str) -> bytes:
    with vhdkit.open_disk(path) as disk:
        return disk.read(0, disk.size_bytes)


def _look_at_merge(done: bool) -> None:
    """The leaf, or once it is gone the base, and a child if there is one, read as before."""
    expected = Path("expected").read_bytes()
    there = [name for name in _LAYERS if os.path.exists(name)]
    readable = "leaf.avhd" if "leaf.avhd" in there else "base.vhd"
    assert _content(readable) == expected, f"{readable} reads otherwise"
    if os.path.exists("child.avhd"):
        assert _content("child.avhd") == expected, "the child reads otherwise"
    if done:
        assert there == ["base.vhd"], f"{there} are left"
        bad = [one for one in vhdkit.check("base.vhd") if one.severity is vhdkit.Severity.ERROR]
        assert not bad, bad
        records = [name for name in os.listdir() if name.endswith("vhdkit-merge")]
        assert not records, records


def _recover_merge() -> Sequence[str] | None:
    if vhdkit.merge_under_way("base.vhd") is not None:
        return ("merge", "--resume", "base.vhd")
    if not os.path.exists("leaf.avhd"):
        return None
    relink = ("--relink",) if os.path.exists("child.avhd") else ()
    return ("merge", "leaf.avhd", "--into", "base.vhd", *relink)


# -- compact and resize -----------------------------------------------------------------------------------------


def _make_image_with_gaps() -> None:
    """Blocks of zeros before and between blocks of data, in the base and in a child."""
    rng = random.Random("gaps")
    vhdkit.create_image("base.vhd", _DISK, block_size_bytes=_BLOCK)
    with vhdkit.open_disk("base.vhd", writable=True) as disk:
        for number in range(_DISK // _BLOCK):
            disk.write(number * _BLOCK, rng.randbytes(_BLOCK))
            if number % 3:
                disk.write(number * _BLOCK, bytes(_BLOCK))
    Path("expected").write_bytes(_content("base.vhd"))


def _make_fixed() -> None:
    vhdkit.create_image("base.vhd", _DISK, disk_format=vhdkit.DiskFormat.FIXED)
    _scribble("base.vhd", random.Random("fixed"), 40)
    Path("expected").write_bytes(_content("base.vhd"))


def _make_full() -> None:
    """A dynamic image with all blocks, the first of which has to make room for a longer BAT."""
    vhdkit.create_image("base.vhd", _DISK, block_size_bytes=_BLOCK)
    with vhdkit.open_disk("base.vhd", writable=True) as disk:
        disk.write(0, random.Random("full").randbytes(_DISK))
    Path("expected").write_bytes(_content("base.vhd"))


def _look_at_size(sizes: tuple[int, ...]) -> Callable[[bool], None]:
    """The disk has its old size or the last of `sizes`, which it has at the end, and reads as before."""

    def look(done: bool) -> None:
        expected, found = Path("expected").read_bytes(), _content("base.vhd")
        assert len(found) in sizes, f"a disk of {len(found)} bytes"
        assert found == expected[: len(found)].ljust(len(found), b"\0"), "the disk reads otherwise"
        if done:
            assert len(found) == sizes[-1]
            bad = [one for one in vhdkit.check("base.vhd") if one.severity is vhdkit.Severity.ERROR]
            assert not bad, bad

    return look


def _look_at_large(done: bool) -> None:
    """Like `_look_at_size`, for a disk whose end is too far away to read everything."""
    expected = Path("expected").read_bytes()
    with vhdkit.open_disk("base.vhd") as disk:
        assert disk.size_bytes in (_DISK, _LARGER) and (not done or disk.size_bytes == _LARGER)
        assert disk.read(0, _DISK) == expected, "the disk reads otherwise"
        rest = disk.extents(_DISK, disk.size_bytes - _DISK)
        assert all(extent.kind is vhdkit.ExtentKind.ZERO for extent in rest), "there is data after the old end"


def _again(*command: str) -> Callable[[], Sequence[str]]:
    return lambda: command


_LARGER = 4096 * MIB  # its BAT is 32 KiB longer

SCENES = {
    scene.name: scene
    for scene in (
        Scene("merge", _make_chain, ("merge", "leaf.avhd", "--into", "base.vhd"), _look_at_merge, _recover_merge),
        Scene(
            "merge-relink",
            _make_chain_with_child,
            ("merge", "leaf.avhd", "--into", "base.vhd", "--relink"),
            _look_at_merge,
            _recover_merge,
        ),
        Scene(
            "live-merge",
            soak_live.make_chain,
            soak_live.merge_while_writing,
            soak_live.look,
            lambda: soak_live.merge_while_writing,
        ),
        Scene(
            "live-merge-vhdx",
            lambda: soak_live.make_chain(".vhdx"),
            soak_live.merge_while_writing,
            soak_live.look,
            lambda: soak_live.merge_while_writing,
        ),
        Scene(
            "names",
            soak_names.prepare,
            soak_names.work,
            soak_names.look,
            lambda: soak_names.finish,
        ),
        Scene(
            "remember",
            soak_remember.prepare,
            soak_remember.serve_and_change,
            soak_remember.look,
            lambda: soak_remember.serve_and_change,
        ),
        Scene(
            "remember-vhdx",
            soak_remember.prepare_vhdx,
            soak_remember.serve_and_change,
            soak_remember.look,
            lambda: soak_remember.serve_and_change,
        ),
        Scene(
            "compact",
            _make_image_with_gaps,
            ("compact", "base.vhd"),
            _look_at_size((_DISK,)),
            _again("compact", "base.vhd"),
        ),
        Scene(
            "resize-dynamic",
            _make_full,
            ("resize", "base.vhd", "4G"),
            _look_at_large,
            _again("resize", "base.vhd", "4G"),
        ),
        Scene(
            "resize-fixed",
            _make_fixed,
            ("resize", "base.vhd", "40M"),
            _look_at_size((_DISK, 40 * MIB)),
            _again("resize", "base.vhd", "40M"),
        ),
    )
}

# Not in the table: their machine survives from kill to kill, and the next commands find what one has damaged.
OTHERS: dict[str, Callable[[float, int], Counter[str]]] = {
    "snapshots": lambda seconds, seed: soak_snapshots.run(1, seed, seconds=seconds),
    "snapshots-running": lambda seconds, seed: soak_snapshots.run(1, seed, seconds=seconds, running=True),
    "running": soak_running.run,
    "interrupted": soak_interrupted.run,
    **{scene: functools.partial(soak_cut.run, scene) for scene in soak_cut.SCENES},
}


def main() -> None:
    """Divide the time among the scenes, and report what was done."""
    parser = argparse.ArgumentParser(prog="script/soak", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("seconds", type=float, help="for all scenes together")
    parser.add_argument("scenes", nargs="*", choices=[[], *SCENES, *OTHERS], default=[], help="only these")
    parser.add_argument("--seed", type=int, default=1, help="another number, other moments")
    options = parser.parse_args()
    names = options.scenes or [*SCENES, *OTHERS]
    for name in names:
        if name in OTHERS:
            done = OTHERS[name](options.seconds / len(names), options.seed)
            print(f"{name}: {done.total()} kills and commands")
            for what, count in done.most_common():
                print(f"    {count:5} x  {what}")
            continue
        tally = soak(SCENES[name], options.seconds / len(names), options.seed)
        print(f"{name}: {tally.kills} kills, {tally.finished} in time, {tally.recoveries} recoveries")
        for state, count in sorted(tally.states.items(), key=lambda one: -one[1]):
            print(f"    {count:5} x  {state}")


if __name__ == "__main__":
    main()
