# SPDX-License-Identifier: Apache-2.0
"""The disk sizes that Azure accepts."""

from __future__ import annotations

import pytest

from vhdkit.formats.azure import azure_size
from vhdkit.units import GIB, KIB, MIB


@pytest.mark.parametrize(
    ("size_bytes", "azure"), [(1, MIB), (512, MIB), (MIB, MIB), (MIB + 512, 2 * MIB), (GIB + KIB, GIB + MIB)]
)
def test_azure_sizes_are_whole_mebibytes(size_bytes: int, azure: int) -> None:
    """Azure accepts only whole MiB; a size is rounded up, never down."""
    assert azure_size(size_bytes) == azure
