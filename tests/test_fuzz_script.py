# SPDX-License-Identifier: Apache-2.0
"""`script/fuzz` runs every target."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.support import ROOT


def test_script_fuzz_runs_the_requested_targets() -> None:
    """It runs the named targets, prints the seed, and fails for an unknown target."""
    environment = {**os.environ, "VHDKIT_PYTHON": sys.executable, "SEED": "7"}
    command = ["bash", str(ROOT / "script" / "fuzz"), "0", "fuzz_chain"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "seed 7" in done.stdout and "fuzz_chain: " in done.stdout and "0 kinds of failure" in done.stdout
    done = subprocess.run([*command[:3], "no_such"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
