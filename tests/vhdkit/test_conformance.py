# SPDX-License-Identifier: Apache-2.0
"""Every format fulfils the layer contract; a format without a row in `tests/conformance.py` fails here."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests import conformance
from tests.conformance import CHECKS, LAYER_METHODS, SUBJECTS, Subject


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_conformance(check: Callable[[Subject], None], subject: Subject) -> None:
    """The layer contract, one check for one kind of layer: see the docstring of the check."""
    check(subject)


def test_every_layer_class_is_registered() -> None:
    """A class of a format module that answers `extents` has a row in the suite."""
    assert conformance.classes_with_layer_methods() == {subject.layer_class for subject in SUBJECTS}


def test_every_opener_is_registered() -> None:
    """A function of a format module that opens an image has a row in the suite."""
    assert conformance.openers() == {subject.opener for subject in SUBJECTS}


def test_every_check_runs() -> None:
    """Every check of the suite is in its table."""
    written = {check for name, check in vars(conformance).items() if name.startswith("check_")}
    assert written == set(CHECKS)


def test_the_contract_lists_its_names() -> None:
    """The names that a layer must have are read from the protocol itself."""
    assert {"store", "size_bytes", "extents", "write", "write_zeroes", "trim", "flush", "close"} <= LAYER_METHODS
