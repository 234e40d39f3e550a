# SPDX-License-Identifier: Apache-2.0
"""What counts as a sign that a guest has booted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vmm.api.restoring import signs
from vmm.api.restoring.signs import Shown, TrialWish, firmware_pictures, watch
from vmm.kvm.picture import Picture
from vmm.model.errors import WrongState
from vmm.store.state import MachineState

RUNNING = MachineState.RUNNING
SIZE = 64


def picture(shade: int, cursor: bool = False) -> Picture:
    """A screen of one shade of grey, with a block of 8 x 2 points if the cursor is on."""
    points = bytearray([shade]) * (SIZE * SIZE * 3)
    for row in range(2 if cursor else 0):
        points[row * SIZE * 3 : row * SIZE * 3 + 24] = bytes([255 - shade]) * 24
    return Picture(SIZE, SIZE, bytes(points))


class Guests:
    """A manager of one guest, which shows the next of some states at each look; a look is a second later."""

    def __init__(self, *looks: tuple[MachineState, str | None, bytes, Picture | None], resets: tuple[int, ...] = ()):
        self._looks = iter(looks)
        self._last = looks[-1]
        self._resets = resets
        self.now = -1

    def show(self, name: str) -> Any:
        """The machine at the next look."""
        self._last = next(self._looks, self._last)
        self.now += 1
        return SimpleNamespace(state=self._last[0], heartbeat=self._last[1], reason="it crashed")

    def events(self, name: str) -> list[Any]:
        """One for each reset so far, and another."""
        return [SimpleNamespace(name="started")] + [
            SimpleNamespace(name="reset") for look in self._resets if look <= self.now
        ]

    def guest(self, name: str) -> Any:
        """The inside of the machine at this look."""

        def seen() -> Picture:
            if self._last[3] is None:
                raise WrongState("has no screen")
            return self._last[3]

        return SimpleNamespace(console_log=lambda: self._last[2], picture=seen)


def watched(
    guests: Guests, wish: TrialWish, shown: Shown, seconds: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[str | None, str]:
    """The result of that many looks."""
    monkeypatch.setattr(signs, "looks", lambda timeout, every_seconds: iter([False] * seconds))
    monkeypatch.setattr(signs, "time", SimpleNamespace(monotonic=lambda: float(guests.now)))
    return watch(guests, "web", wish, shown)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wish", "looks", "seen", "words"),
    [
        ({}, [(RUNNING, "no contact", b""), (RUNNING, "ok", b"")], "heartbeat", "its agent answers"),
        ({}, [(RUNNING, "lost", b"")], None, "its agent does not answer within"),
        ({"expect": "in:"}, [(RUNNING, "ok", b"log"), (RUNNING, "ok", b"login:")], "text", "shows 'in:'"),
        ({"expect": "in:"}, [(RUNNING, "ok", b"log")], None, "does not show 'in:'"),
        ({}, [(RUNNING, "off", b""), (MachineState.OFF, None, b"")], None, "the machine is off: it crashed"),
    ],
)
def test_signs_of_life(
    wish: dict[str, Any], looks: list[Any], seen: str | None, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What counts as booting: the heartbeat, or what the user asks for; a machine that goes off has failed."""
    changing = [(*looks[min(number, len(looks) - 1)], picture(number)) for number in range(40)]
    found, said = watched(Guests(*changing), TrialWish(**wish), Shown(), 30, monkeypatch)
    assert found == seen and words in said


FIRMWARE = [picture(200), picture(201)]
BLINKING = [picture(9, cursor=number % 2 == 0) for number in range(40)]


@pytest.mark.parametrize(
    ("pictures", "resets", "is_sign"),
    [
        ([picture(shade) for shade in range(40)], (), True),
        ([FIRMWARE[number % 2] for number in range(40)], (), False),  # nothing that its firmware does not show
        (BLINKING, (), False),
        ([picture(number % 2) for number in range(40)], (), False),  # two in turn
        ([picture(0), picture(1), *BLINKING], (), False),  # a loader draws at once and ends
        ([picture(0), picture(1), *[picture(2)] * 20, picture(3)], (), True),
        ([picture(shade % 6) for shade in range(40)], tuple(range(6, 40, 6)), False),  # it starts again and again
        ([picture(shade) for shade in range(40)], tuple(range(6, 40, 6)), False),
        ([picture(shade) for shade in range(40)], (6,), True),  # it reset itself once
        ([None] * 40, (), False),
    ],
)
def test_pictures(
    pictures: list[Picture | None], resets: tuple[int, ...], is_sign: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """INV-TRIAL-PICTURES: a guest that shows what its firmware does not, and goes on without a reset, has booted."""
    guests = Guests(*((RUNNING, "off", b"", one) for one in pictures), resets=resets)
    found, words = watched(guests, TrialWish(screen=True), Shown(list(FIRMWARE)), 40, monkeypatch)
    assert (found == "screen") == is_sign
    assert "that its firmware does not show" in words and ("reset" in words) == bool(resets)


@pytest.mark.parametrize("end", [MachineState.OFF, RUNNING])
def test_pictures_of_a_firmware(end: MachineState, monkeypatch: pytest.MonkeyPatch) -> None:
    """The firmware has ended when the machine is off, or when nothing new was shown for a while."""
    shades = [1, 2, 2, 3, *[3] * 12, 4]  # the last change comes before it has rested
    looks = [(RUNNING, "off", b"", picture(shade, cursor=number % 3 == 0)) for number, shade in enumerate(shades)]
    guests = Guests(*looks, (end, "off", b"", picture(4)))
    monkeypatch.setattr(signs, "looks", lambda timeout, every_seconds: iter([False] * 100))
    monkeypatch.setattr(signs, "time", SimpleNamespace(monotonic=lambda: float(guests.now)))
    shown = firmware_pictures(guests, "web")  # type: ignore[arg-type]
    assert len(shown.pictures) == 4 and shown.new == [] and guests.now < 40
