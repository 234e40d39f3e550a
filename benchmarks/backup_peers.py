# SPDX-License-Identifier: Apache-2.0
"""Nights of one disk by vhdkit, borg and restic in turn: seven after a full one. For `benchmarks/backup.py`.

    folder/state.json     what is done: a step is one night of one program
           disk.*         the chain for vhdkit, the raw file for the others
           PROGRAM        its repository

Decides what each program is asked to do, and how a run goes on where the last one stopped: that takes half an hour for
a large disk, of which borg and restic read all of it in every night. Between two steps a run may end. One that was
killed within a step, whose work may be half done, begins anew.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.backup_disk import Disk, save, space_of
from benchmarks.backup_live import PAGE
from benchmarks.common import has, timed
from benchmarks.pieces import Measured, replace_whole

NIGHTS = 7  # after the full one
OURS = "vhdkit"
_BEGIN = {"borg": ("borg", "init", "-e", "none"), "restic": ("restic", "init", "-q", "-r")}


@dataclass(slots=True)
class _State:
    """How far it is. `done`: the programs that have saved this night. `step`: what was begun and has not ended."""

    kind: str
    size_bytes: int
    leaf: str
    night: int = 0
    is_changed: bool = False
    done: list[str] = field(default_factory=list)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    space: dict[str, list[float]] = field(default_factory=dict)
    longest: dict[str, float] = field(default_factory=dict)
    step: str | None = None


class Peers:
    """The nights of a kind, in a folder that is kept until they are complete."""

    def __init__(
        self, folder: Path, kind: str, size_bytes: int, programs: tuple[str, ...], nights: int = NIGHTS
    ) -> None:
        self._folder = folder
        self._kind = kind
        self._size_bytes = size_bytes
        self._nights = nights
        self._names = [name for name in programs if name == OURS or has(name)]

    def go_on(self, is_time_for: Callable[[float], bool]) -> list[Measured] | None:
        """Do step after step while there is time for as many seconds as the next one probably takes, and at least
        one. Returns the lines, or None if there is more to do.
        """
        state = self._begun()
        is_first = True
        while state.night <= self._nights:
            left = [name for name in self._names if name not in state.done]
            expected = state.longest.get("change" if not state.is_changed else left[0], 0.0)
            if not is_first and not is_time_for(expected):
                print(
                    f"peers, {self._kind}: night {state.night} of {self._nights} comes next",
                    file=sys.stderr,
                    flush=True,
                )
                return None
            is_first = False
            self._step(state, "change" if not state.is_changed else left[0])
            if state.is_changed and len(state.done) == len(self._names):
                state.night, state.is_changed, state.done = state.night + 1, False, []
                self._keep(state)
        return self._lines(state)

    # -- steps ------------------------------------------------------------------------------------------------------

    def _begun(self) -> _State:
        with contextlib.suppress(FileNotFoundError):
            state = _State(**json.loads((self._folder / "state.json").read_text(encoding="utf-8")))
            asked = (self._kind, self._size_bytes)
            if state.step is None and (state.kind, state.size_bytes) == asked and set(state.done) <= set(self._names):
                return state
            print(f"peers, {self._kind}: beginning anew: the last run was killed in a step, or had other settings",
                  file=sys.stderr, flush=True)  # fmt: skip
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        disk = Disk.made(self._folder, self._size_bytes)
        for name in self._names:
            if name in _BEGIN:
                self._run(*_BEGIN[name], self._folder / name)
        state = _State(self._kind, self._size_bytes, str(disk.leaf))
        self._keep(state)
        return state

    def _step(self, state: _State, name: str) -> None:
        """The changes of a night, or the night of a program."""
        state.step = name
        self._keep(state)
        begin = time.monotonic()
        disk = Disk(self._folder, self._size_bytes, 0, Path(state.leaf), self._folder / "disk.raw")
        places = disk.places(self._kind, 100 + state.night)
        if name == "change":
            disk.change(places, 100 + state.night)
            os.sync()
            state.is_changed = True
        else:
            place = self._folder / name
            before = space_of(place)
            seconds = timed(lambda: self._night(name, disk, state.night))
            state.leaf = str(disk.leaf)
            state.done.append(name)
            if state.night:  # the first one is full
                state.seconds.setdefault(name, []).append(seconds)
                state.space.setdefault(name, []).append((space_of(place) - before) / (len(places) * PAGE))
            print(f"peers, {self._kind}: night {state.night} by {name}: {seconds:.1f} s", file=sys.stderr, flush=True)
        state.longest[name] = max(state.longest.get(name, 0.0), time.monotonic() - begin)
        state.step = None
        self._keep(state)

    def _night(self, name: str, disk: Disk, number: int) -> None:
        place = self._folder / name
        if name == "borg":
            self._run("borg", "create", f"{place}::{number}", disk.raw.name)
        elif name == "restic":
            self._run("restic", "backup", "-q", "-r", place, disk.raw.name)
        else:
            save(disk, place)

    def _run(self, *words: str | Path) -> None:
        home = self._folder / "home"
        environment = {
            **os.environ, "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK": "yes", "BORG_BASE_DIR": str(home),
            "RESTIC_PASSWORD": "benchmark", "RESTIC_CACHE_DIR": str(home),
        }  # fmt: skip
        done = subprocess.run(
            [*map(str, words)], env=environment, cwd=self._folder, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"{words[0]} failed: {done.stderr.strip()[-1000:]}")

    def _keep(self, state: _State) -> None:
        replace_whole(self._folder / "state.json", json.dumps(asdict(state)))

    # -- lines ------------------------------------------------------------------------------------------------------

    def _lines(self, state: _State) -> list[Measured]:
        lines = []
        for name in self._names:
            on = f"{name}, {self._kind} night"
            if name == OURS:
                lines += [
                    Measured(f"{on}, s", state.seconds[name]),
                    Measured(f"{on}, bytes per changed byte", state.space[name]),
                ]
            else:
                lines += [
                    Measured(f"{on}, s", state.seconds[name], state.seconds[OURS], OURS),
                    Measured(f"{on}, bytes per changed byte", state.space[name], state.space[OURS], OURS),
                ]
        return lines
