# SPDX-License-Identifier: Apache-2.0
"""Makes and deletes a switch with commands that are killed at chosen points; run in a network namespace.

    python -m tests.vmm.net.switch_victim create|delete STRIDE WORDS-OF-CREATE...

Points are counted as in `applying_victim`, over the switch's own files too. After each kill the commands must work,
say what is wrong, and finish or undo what was begun. Prints how many points there were, and how often a switch was
unfinished.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys

import click
from click.testing import CliRunner, Result

from tests.vmm.net.applying_victim import COUNTER, STATE, count_everything, in_child
from tests.waiting import becomes
from vmm.api import doctor
from vmm.cli import switch
from vmm.host.proc import is_locked
from vmm.model import errors, paths
from vmm.net import switches
from vmm.net.host_side import HostSide


def run(command: click.Command, *words: str) -> Result:
    """Run a command and return its result; an error raised by vmm is in its `exception`."""
    done = CliRunner().invoke(command, list(words))
    assert done.exception is None or isinstance(done.exception, (errors.VmmError, SystemExit)), done.exception
    return done


def good(command: click.Command, *words: str) -> str:
    """The output of a command that must succeed."""
    done = run(command, *words)
    assert done.exit_code == 0, (words, done.output, done.exception)
    return done.output


def look(name: str) -> bool:
    """Check after a kill that switches can be listed and shown, and that an unfinished one is reported; True if one
    is."""
    listed = [one["name"] for one in json.loads(good(switch.list_command, "--json"))]
    assert listed == switches.names()
    if name not in listed:
        return False
    lock = os.path.join(HostSide(switches.load(name)).folder, "change.lock")
    becomes(lambda: not is_locked(lock))  # processes that the killed one was just starting
    shown = json.loads(good(switch.show_command, name, "--json"))
    is_unfinished = any(one["what"] == "unfinished" for one in shown["faults"])
    (check,) = doctor._check_switches()
    assert (f"vmm switch delete {name} restores this host" in str(check.found)) is is_unfinished, check
    again = run(switch.create_command, name, *sys.argv[4:])
    assert isinstance(again.exception, errors.AlreadyExists), again
    assert (again.exception.hint is not None) is is_unfinished, again.exception.hint
    return is_unfinished


def main() -> None:
    """See above."""
    verb, stride, name = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    count_everything()
    for owner, attribute in ((paths, "write_whole"), (os, "unlink"), (shutil, "rmtree")):
        setattr(owner, attribute, COUNTER.wrapped(getattr(owner, attribute)))

    def state() -> str:
        return subprocess.run(["sh", "-c", STATE], capture_output=True, text=True, check=True).stdout

    before, unfinished = state(), 0
    for point in itertools.count(0, stride):
        if verb == "delete":
            good(switch.create_command, name, *sys.argv[4:])
            ended = in_child(lambda: good(switch.delete_command, name), point)
        else:
            ended = in_child(lambda: good(switch.create_command, name, *sys.argv[4:]), point)
        unfinished += look(name)
        if name in switches.names():
            good(switch.delete_command, name)
        assert switches.names() == []
        assert os.listdir(paths.switches_folder()) in ([".lock"], [])
        after = state()
        assert after == before, f"killed at {point}:\n{before}\nis now:\n{after}"
        if ended == 0:
            print(json.dumps([point, unfinished]))
            return
        assert ended == signal.SIGKILL, ended


if __name__ == "__main__":
    main()
