# SPDX-License-Identifier: Apache-2.0
"""Fixtures for every test, and how hard Hypothesis searches.

`HYPOTHESIS_PROFILE` chooses a profile: `default` looks at other examples in every run; `ci` (chosen by
`CI=true`) looks at the same ones in every run, so a red run can be repeated; `long` searches for minutes.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.support import in_ci, samples_dir

# A runner in the background may hand SIGINT and SIGHUP down as ignored; programs under test are to be stopped by them.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# No deadline: the first example pays for imports, and files on a busy disk take what they take.
settings.register_profile("default", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", parent=settings.get_profile("default"), derandomize=True, database=None)
settings.register_profile("long", parent=settings.get_profile("default"), max_examples=5000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if in_ci() else "default"))


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--nightly` runs the whole matrices too."""
    parser.addoption("--nightly", action="store_true", help="run the tests marked nightly as well: hours on two cores")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the whole matrices out of an everyday run."""
    if config.getoption("--nightly"):
        return
    nightly = [item for item in items if item.get_closest_marker("nightly") is not None]
    if nightly:
        config.hook.pytest_deselected(items=nightly)
        items[:] = [item for item in items if item.get_closest_marker("nightly") is None]


@pytest.fixture
def samples() -> Path:
    """The folder of real images; the test is skipped where it is absent."""
    return samples_dir()
