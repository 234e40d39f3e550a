# SPDX-License-Identifier: Apache-2.0
"""The numbers of a long benchmark, which is run a piece at a time: what was measured stays in one JSON file.

    with Pieces.of(path, "backup", {"gib": 16}) ...

Decides the form of the file, and that it is replaced whole after each piece, so that a run that is killed loses one
piece. Numbers of different settings are never mixed: a file that was made with others is refused. Must not know what
is measured.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.common import Row, report

_COLUMNS = ["", "measured", "beside", "ratio", "goal"]


@dataclass(slots=True)
class Measured:
    """A line of the table. `beside`: what was measured in the same rounds, and its name. `goal`: the highest good
    ratio, or the highest good value if nothing is beside.
    """

    name: str
    values: list[float]
    beside: list[float] | None = None
    beside_name: str = ""
    goal: float | None = None

    @classmethod
    def of(cls, name: str, row: Row, beside: Row | None = None, goal: float | None = None) -> Measured:
        """From rows."""
        if beside is None:
            return cls(name, row.values, goal=goal)
        return cls(name, row.values, beside.values, beside.name, goal)

    @property
    def judged(self) -> float:
        """What the goal is about: the median of the ratios of each round, or of the values."""
        if self.beside is None:
            return statistics.median(self.values)
        return statistics.median(own / other for own, other in zip(self.values, self.beside, strict=True))

    def words(self) -> list[str]:
        """The cells of the line."""
        beside = "" if self.beside is None else f"{statistics.median(self.beside):.3f} ({self.beside_name})"
        ratio = "" if self.beside is None else f"{self.judged:.2f}"
        goal = "" if self.goal is None else f"<= {self.goal:.2f} {'met' if self.judged <= self.goal else 'MISSED'}"
        return [self.name, f"{statistics.median(self.values):.3f}", beside, ratio, goal]


@dataclass
class Pieces:
    """What was measured so far, by the name of the piece, and the file that has it."""

    title: str
    settings: Mapping[str, object]
    path: Path | None = None
    lines: dict[str, list[Measured]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, path: Path | None, title: str, settings: Mapping[str, object]) -> Pieces:
        """Those that the file has, if there is one. Ends the program if it was made with other settings."""
        made = cls(title, settings, path)
        if path is not None and path.exists():
            document = json.loads(path.read_text(encoding="utf-8"))
            if document.get("settings") != settings:
                raise SystemExit(
                    f"{path} has numbers of {document.get('settings')}, not of {settings}: name another file"
                )
            for name, piece in document["pieces"].items():
                made.lines[name] = [Measured(**line) for line in piece["lines"]]
                made.seconds[name] = piece["seconds"]
        return made

    def add(self, name: str, lines: list[Measured], seconds: float) -> None:
        """Keep the numbers of a piece."""
        self.lines[name], self.seconds[name] = lines, round(seconds, 1)
        if self.path is not None:
            replace_whole(self.path, json.dumps(self._document(), indent=1) + "\n")

    def _document(self) -> dict[str, object]:
        pieces = {
            name: {"seconds": self.seconds[name], "lines": [asdict(line) for line in lines]}
            for name, lines in self.lines.items()
        }
        machine = {"cpus": os.cpu_count(), "python": platform.python_version(), "kernel": platform.release()}
        return {"benchmark": self.title, "machine": machine, "settings": dict(self.settings), "pieces": pieces}

    def show(self) -> None:
        """Print the table of all pieces that were measured, and the JSON."""
        lines = [line for piece in self.lines.values() for line in piece]
        data = {line.name: {"ratio": line.judged, "rounds": line.values} for line in lines}
        report(self.title, _COLUMNS, [line.words() for line in lines], {"rows": data}, None)


def replace_whole(path: Path, text: str) -> None:
    """Replace a file, so that it is whole also after a kill."""
    new = path.with_name(f"{path.name}.new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)


def need_space(folder: Path, size_bytes: int) -> None:
    """End the program if the folder has less space than this."""
    free = shutil.disk_usage(folder).free
    if free < size_bytes:
        raise SystemExit(
            f"{folder} has {free >> 20} MiB free and {size_bytes >> 20} are needed: give --dir, or less --gib"
        )
