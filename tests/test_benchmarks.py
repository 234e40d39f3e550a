# SPDX-License-Identifier: Apache-2.0
"""Nothing outlives a benchmark, neither its servers nor its files; a long one goes on where it stopped."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.backup_peers import OURS, Peers
from benchmarks.pieces import Measured, Pieces
from tests.support import ROOT
from tests.waiting import wait_until

PROGRAM = """
import signal, sys
from pathlib import Path
from benchmarks.common import arguments, start_beside, workplace
arguments("a benchmark").parse_args([])
with workplace(Path(sys.argv[1])):
    print(start_beside(["sleep", "100"], start_new_session=True).pid, flush=True)
    signal.pause()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_servers_die_with_the_benchmark(number: int, tmp_path: Path) -> None:
    """Whatever ends it, its servers end; unless it was killed, it removes its folder."""
    words = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            server = Path("/proc") / process.stdout.readline().strip()
            assert server.exists() and len(list(tmp_path.iterdir())) == 1
            process.send_signal(number)
            assert process.wait(60) != 0
        finally:
            process.kill()
    wait_until(lambda: not server.exists(), "the server ends")
    assert not list(tmp_path.iterdir()) or number == signal.SIGKILL


def test_pieces_stay_in_their_file(tmp_path: Path) -> None:
    """What was measured is there for the next run, which refuses a file of other settings."""
    path = tmp_path / "numbers.json"
    line = Measured("night, s", [3.0, 2.0, 9.0], [2.0, 2.0, 3.0], "loop", 1.5)
    Pieces.of(path, "backup", {"gib": 1}).add("nights", [line], 7.0)
    again = Pieces.of(path, "backup", {"gib": 1})
    assert again.lines == {"nights": [line]} and again.lines["nights"][0].judged == 1.5
    assert again.lines["nights"][0].words()[-1] == "<= 1.50 met"
    with pytest.raises(SystemExit, match="name another file"):
        Pieces.of(path, "backup", {"gib": 2})


def test_nights_of_peers_go_on(tmp_path: Path) -> None:
    """Nights go on where the last run stopped; one that was killed in a step begins anew."""

    def peers() -> Peers:
        return Peers(tmp_path / "peers", "random", 16 << 20, (OURS,), nights=2)

    def no_time(seconds: float) -> bool:
        return False

    def nights() -> int:
        return len(list((tmp_path / "peers" / OURS).glob("machines/*/nights/*")))

    for expected in 0, 1, 1, 2:  # a step is the changes of a night, or the night
        assert peers().go_on(no_time) is None and nights() == expected
    state = tmp_path / "peers" / "state.json"
    state.write_text(state.read_text().replace('"step": null', '"step": "vhdkit"'))
    assert peers().go_on(no_time) is None and nights() == 0
    lines = peers().go_on(lambda seconds: True)
    assert lines is not None and [len(line.values) for line in lines] == [2, 2] and nights() == 3
