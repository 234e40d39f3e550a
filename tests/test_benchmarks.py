# SPDX-License-Identifier: Apache-2.0
"""Nothing outlives a benchmark: neither its servers nor its files."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

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
