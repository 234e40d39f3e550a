# SPDX-License-Identifier: Apache-2.0
"""Applies or undoes a switch and kills itself with SIGKILL at a chosen point; run in a network namespace.

    python -m tests.vmm.net.applying_victim apply|undo|kill-apply|kill-undo SWITCH.json FOLDER [STRIDE]

Points are counted over everything that changes the host or the journal, before and after each. `kill-apply` applies in
a child that is killed at the first point, undoes, compares with the state from before, and so on with the next
point (every STRIDE-th); `kill-undo` is killed while undoing. Prints how many points there were.
"""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from vmm.net import dhcp, nft, settings
from vmm.net.applying import Applying
from vmm.net.bridge import Kernel
from vmm.net.dhcp import Dnsmasq
from vmm.net.switch_spec import SwitchSpec

# Everything that must be as before, except lifetimes, counters and names of groups, which are not part of the state.
STATE = r"""
ip -j addr | sed -E 's/"(valid|preferred)_life_time":[0-9]+//g'
ip -4 route show table all; ip -6 route show table all | grep -v ^fe80 | sed -E 's/expires [0-9]+sec//'
nft -s list ruleset
head -v /proc/sys/net/ipv4/conf/*/forwarding /proc/sys/net/ipv6/conf/*/disable_ipv6
ps -o args= -p "$(ip netns pids $(ip netns identify) | tr '\n' ',')0" | grep dnsmasq
true
"""


class Counter:
    """Counts points, and kills this process at one of them."""

    def __init__(self) -> None:
        self.count = 0
        self.point = -1

    def wrapped(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with a point before and after it."""

        def step(*arguments: Any, **named: Any) -> Any:
            self.passed()
            result = function(*arguments, **named)
            self.passed()
            return result

        return step

    def passed(self) -> None:
        """A point."""
        if self.count == self.point:
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += 1


COUNTER = Counter()


def in_child(work: Callable[[], object], point: int) -> int:
    """Run the call in a child that is killed at that point; return how the child ended."""
    child = os.fork()
    if child == 0:
        COUNTER.count, COUNTER.point = 0, point
        work()
        os._exit(0)
    return os.waitpid(child, 0)[1]


def kill_everywhere(verb: str, one: Applying, stride: int) -> int:
    """See the module's docstring; returns how many points were reached."""

    def state() -> str:
        return subprocess.run(["sh", "-c", STATE], capture_output=True, text=True, check=True).stdout

    before = state()
    for point in itertools.count(0, stride):
        if verb == "kill-undo":
            one.apply()
        ended = in_child(one.apply if verb == "kill-apply" else one.undo, point)
        one.undo()
        after = state()
        assert after == before, f"killed at {point}:\n{before}\nis now:\n{after}"
        if ended == 0:
            return point
        assert ended == signal.SIGKILL, ended
    raise AssertionError


def count_everything() -> None:
    """Make a point of everything that changes the host or the journal."""
    for name in (
        "add_bridge", "remove_bridge", "set_up", "set_master", "add_address", "remove_address", "add_route",
    ):  # fmt: skip
        setattr(Kernel, name, COUNTER.wrapped(getattr(Kernel, name)))
    for owner, name in (
        (Dnsmasq, "ensure"), (Dnsmasq, "stop"), (dhcp, "spawn_detached"),
        (Applying, "_write"), (nft, "run"), (settings, "write"),
        (settings, "_save"),
    ):  # fmt: skip
        setattr(owner, name, COUNTER.wrapped(getattr(owner, name)))


def main() -> None:
    """See above."""
    verb, path, folder = sys.argv[1:4]
    os.environ["VMM_RUNTIME"] = os.path.dirname(os.path.abspath(folder))
    count_everything()
    with open(path, "rb") as file:
        spec = SwitchSpec.model_validate_json(file.read())
    one = Applying(spec, folder, os.path.join(folder, "leases"))
    if verb in ("apply", "undo"):
        getattr(one, verb)()
    else:
        print(kill_everywhere(verb, one, int(sys.argv[4])))


if __name__ == "__main__":
    main()
