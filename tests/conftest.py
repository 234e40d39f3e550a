# SPDX-License-Identifier: Apache-2.0
"""Fixtures for every test, and how long Hypothesis searches.

`HYPOTHESIS_PROFILE` chooses a profile: `default` tries other examples in every run, and four times as many with
`--nightly`; `ci` (chosen by `CI=true`) tries the same few in every run, so that a failed run can be repeated;
`random` tries a few others, given by a seed (`script/properties`); `long` searches for minutes.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, is_hypothesis_test, settings

from tests.leftovers import Run
from tests.scheduling import shared_out
from tests.support import in_ci, samples_dir
from tests.warm_commands import end_shared

_RUN = pytest.StashKey[Run]()
_LEFT = pytest.StashKey[list[str]]()

# A background runner may pass on SIGINT, SIGQUIT and SIGHUP as ignored, but they must stop programs under test.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# The tests do not depend on settings of the user who runs them.
os.environ.pop("VHDKIT_PARENT_DIRS", None)
os.environ["XDG_CONFIG_HOME"] = "/nonexistent"
# Tests start a thousand processes: without bytecode on disk each would compile all of both packages again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# No deadline: the first example pays for imports, and the time for file access depends on how busy the disk is.
# Explicit: if CI is set, Hypothesis derandomizes by itself.
settings.register_profile(
    "default", deadline=None, derandomize=False, print_blob=True, suppress_health_check=[HealthCheck.too_slow],
    max_examples=50,
)  # fmt: skip
settings.register_profile(
    "ci", parent=settings.get_profile("default"), derandomize=True, database=None, max_examples=40
)
settings.register_profile("nightly", parent=settings.get_profile("default"), max_examples=200)
settings.register_profile("long", parent=settings.get_profile("default"), max_examples=5000)
settings.register_profile("random", parent=settings.get_profile("default"), database=None, max_examples=50)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if in_ci() else "default"))


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--nightly` also runs the full matrices, `--properties` runs only what Hypothesis searches."""
    parser.addoption("--nightly", action="store_true", help="run the tests marked nightly as well: hours on two cores")
    parser.addoption("--properties", action="store_true", help="run nothing but the tests that Hypothesis searches")


def pytest_configure(config: pytest.Config) -> None:
    """Sizes of matrices are chosen while the tests are collected (`support.daily_or_nightly`).

    The run gets its own temporary folder, which its workers inherit.
    """
    if config.getoption("--nightly"):
        os.environ["VHDKIT_NIGHTLY"] = "1"
        if not in_ci() and "HYPOTHESIS_PROFILE" not in os.environ:
            settings.load_profile("nightly")
    if not hasattr(config, "workerinput") and not config.option.collectonly:
        config.stash[_RUN] = Run()


@pytest.hookimpl(trylast=True)  # the workers have ended by then
def pytest_sessionfinish(session: pytest.Session) -> None:
    """A run that left something behind has failed."""
    end_shared()
    run = session.config.stash.get(_RUN, None)
    if run is not None:
        session.config.stash[_LEFT] = left = run.end()
        if left and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Report what was left behind."""
    if left := config.stash.get(_LEFT, []):
        terminalreporter.section("left behind by the tests", sep="=", red=True)
        for line in left:
            terminalreporter.write_line(line)


def pytest_collection() -> None:
    """What is made now stays: looking for garbage meanwhile finds nothing."""
    gc.disable()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the full matrices out of an everyday run, and everything but properties out of a properties run.

    pytest-xdist's workers, which all collect the same, put the rest in the order of `tests.scheduling`.
    """
    left_out = []
    if not config.getoption("--nightly"):
        left_out += [item for item in items if item.get_closest_marker("nightly") is not None]
    if config.getoption("--properties"):
        left_out += [item for item in items if not _is_property(item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]
    if (worker := getattr(config, "workerinput", None)) is not None:
        items[:] = shared_out(items, lambda item: item.nodeid.partition("::")[0], worker["workercount"])


def pytest_collection_finish() -> None:
    """Objects made while collecting stay to the end: the garbage collector need not examine them again and again."""
    gc.enable()
    gc.collect()
    gc.freeze()


def _is_property(item: pytest.Item) -> bool:
    """True for a test whose examples Hypothesis chooses."""
    if item.get_closest_marker("searched") is not None:
        return True
    return isinstance(item, pytest.Function) and is_hypothesis_test(item.obj)


@pytest.fixture
def samples() -> Path:
    """The folder of real images; the test is skipped where it is absent."""
    return samples_dir()


@pytest.fixture(params=(0, 0o022, 0o777), ids=("lets everybody in", "usual", "takes everything"))
def umask(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run the test under each umask. The umask belongs to the whole process: code that changes it fails."""
    change = os.umask

    def refuse(mask: int) -> int:
        raise AssertionError("files that other threads make at this moment get these rights")

    before = change(request.param)
    monkeypatch.setattr(os, "umask", refuse)
    yield
    change(before)
