# SPDX-License-Identifier: Apache-2.0
"""What vmm records about formats agrees with what vhdkit does."""

from __future__ import annotations

import pytest

from vhdkit import formats
from vmm.model.formats import IMAGE_FORMATS, ImageFormat, child_format, child_suffix, is_image_format


def test_all_formats_are_known() -> None:
    """A machine can have a disk of every format that vhdkit has."""
    assert sorted(IMAGE_FORMATS) == sorted(one.name for one in formats.FORMATS)
    assert all(map(is_image_format, IMAGE_FORMATS)) and not is_image_format("qcow2") and not is_image_format([])


@pytest.mark.parametrize("kind", IMAGE_FORMATS)
def test_children_are_those_that_vhdkit_makes(kind: ImageFormat) -> None:
    """A child has the format and the suffix that vhdkit gives it."""
    made = formats.named(formats.named(kind).child_format)
    assert child_format(kind) == made.name and child_suffix(kind) == made.child_suffix


def test_a_definition_without_a_format_is_of_0_1_0() -> None:
    """That version knew VHD and raw disks only, and the children of both are VHDs."""
    assert (child_format(None), child_suffix(None)) == ("vhd", ".avhd")
