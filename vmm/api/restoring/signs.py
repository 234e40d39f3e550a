# SPDX-License-Identifier: Apache-2.0
"""Signs that a guest has booted, and how long to wait for them.

Decides what counts as booting. The guest's agent answers; or, as the user asks, its serial console shows a text, or
its screen shows pictures that its firmware alone does not show. A machine that goes off, or does none of that in time,
has not booted. Must not know what the machine was made from.

A firmware that finds nothing to boot draws several pictures, a boot loader that fails draws some more, and under each
text a cursor blinks. So a sign is not that the screen changes, but that it shows what is new (`INV-TRIAL-PICTURES`):
unlike everything that the same machine shows with empty disks, and unlike everything that it has shown before, by more
than a cursor; `_PICTURES` times within more than `_DRAWS_SECONDS`, since a loader that fails draws at once; and that
the guest does not reset itself for `_STAYS_SECONDS` after. That shows that a system draws, not that it works.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from vmm.api.manager import Manager
from vmm.model.errors import VmmError
from vmm.model.waiting import looks
from vmm.store.state import MachineState

if TYPE_CHECKING:
    from vmm.kvm.picture import Picture

TRIAL_SECONDS = 300.0
FIRMWARE_SECONDS = 120.0  # at most; UEFI without KVM needs half a minute to find that there is nothing to boot
_QUIET_SECONDS = 15.0  # without a new picture: it has ended. SeaBIOS and OVMF rest for at most five
_FIRMWARE_LOOK_SECONDS = 0.1  # it shows some pictures for a moment
_LOOK_SECONDS = 0.5  # a look asks the worker and takes a picture
_PICTURES = 3
_DRAWS_SECONDS = 3.0
_STAYS_SECONDS = 10.0
_MAX_PICTURES = 32  # that are remembered, of one to twelve MiB; a firmware shows fewer than ten
Sign = Literal["heartbeat", "text", "screen"]


@dataclass(frozen=True, slots=True)
class TrialWish:
    """What counts as booting: the agent's heartbeat; with `expect` only that text on the serial console; with
    `screen` also what the screen shows.
    """

    expect: str | None = None
    screen: bool = False
    seconds: float = TRIAL_SECONDS


@dataclass
class Shown:
    """What a screen has shown: all of it, and when each picture appeared that was new, since the last reset."""

    pictures: list[Picture] = field(default_factory=list)
    new: list[float] = field(default_factory=list)
    resets: int = 0

    def look(self, manager: Manager, name: str) -> None:
        """Take the picture that it shows now. A machine without a screen, or that does not answer, shows none."""
        with contextlib.suppress(VmmError):
            picture = manager.guest(name).picture()
            if not any(picture.shows_the_same_as(one) for one in self.pictures):
                self.new.append(time.monotonic())
                if len(self.pictures) < _MAX_PICTURES:
                    self.pictures.append(picture)
        resets = sum(event.name == "reset" for event in manager.events(name))
        if resets != self.resets:
            self.resets, self.new = resets, []

    @property
    def is_sign(self) -> bool:
        """True if a system draws."""
        if len(self.new) < _PICTURES or self.new[-1] - self.new[0] < _DRAWS_SECONDS:
            return False
        return time.monotonic() - self.new[_PICTURES - 1] >= _STAYS_SECONDS

    @property
    def words(self) -> str:
        """For the report."""
        count = len(self.new)
        pictures = f"its screen has shown {count} picture{'' if count == 1 else 's'} that its firmware does not show"
        if not self.resets:
            return pictures
        return f"{pictures} since it reset itself, which it did {self.resets} time{'' if self.resets == 1 else 's'}"


def firmware_pictures(manager: Manager, name: str) -> Shown:
    """What a machine shows that was just started and has nothing to boot from."""
    shown = Shown()
    begin = time.monotonic()
    for _ in looks(FIRMWARE_SECONDS, every_seconds=_FIRMWARE_LOOK_SECONDS):
        shown.look(manager, name)
        if manager.show(name).state not in (MachineState.RUNNING, MachineState.STARTING):
            break
        if time.monotonic() - max([begin, *shown.new]) >= _QUIET_SECONDS:
            break
    return Shown(shown.pictures)


def watch(manager: Manager, name: str, wish: TrialWish, shown: Shown) -> tuple[Sign | None, str]:
    """Wait for a sign that the guest has booted. `shown`: what its firmware shows. Returns which sign it was, and what
    was seen in words.
    """
    last = "nothing was seen of the guest"
    for _ in looks(wish.seconds, every_seconds=_LOOK_SECONDS):
        info = manager.show(name)
        if info.state not in (MachineState.RUNNING, MachineState.STARTING):
            reason = f": {info.reason}" if info.reason else ""
            state = "unknown" if info.state is None else info.state.value
            return None, f"the machine is {state}{reason}; {last}"
        if wish.expect is not None:
            if wish.expect.encode() in manager.guest(name).console_log():
                return "text", f"its console shows {wish.expect!r}"
            last = f"its console does not show {wish.expect!r}"
            continue
        if info.heartbeat == "ok":
            return "heartbeat", "its agent answers"
        last = "its agent does not answer"
        if wish.screen:
            shown.look(manager, name)
            if shown.is_sign:
                return "screen", shown.words
            last += f", and {shown.words}"
    return None, f"{last} within {wish.seconds:.0f} s"
