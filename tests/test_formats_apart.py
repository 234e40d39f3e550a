# SPDX-License-Identifier: Apache-2.0
"""No module outside the formats knows a particular format: neither by an import nor by the class of an open image."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.sources import nodes_of
from tests.support import python_files
from tests.test_layering import imports_of, is_in, module_of

# The formats themselves, and the classes of their open images: only for the contract's own side.
FORMATS = ("vhdkit.formats.vhd", "vhdkit.formats.raw", "vhdkit.formats.linear")
IMAGES = {"DynamicImage", "FixedImage", "LinearImage"}
# What the chain may use of the formats: the contract, the list, and modules that do not know images.
OF_EVERY_FORMAT = {
    "vhdkit.formats",
    "vhdkit.formats.azure",
    "vhdkit.formats.bits",
    "vhdkit.formats.draft",
    "vhdkit.formats.filesystems",
    "vhdkit.formats.format",
    "vhdkit.formats.partitions",
    "vhdkit.formats.probe",
    "vhdkit.formats.recall",
    "vhdkit.formats.remember",
    "vhdkit.formats.undo",
}
BAD: tuple[tuple[str, str], ...] = (
    ("vhdkit/chain/verbs/merge.py", "from vhdkit.formats.vhd import layout"),
    ("vhdkit/chain/verbs/merge.py", "def later():\n    from vhdkit.formats.vhd.move import cut_end"),
    ("vhdkit/chain/verbs/merge.py", "from vhdkit.formats.linear import LinearImage"),
    ("vhdkit/chain/verbs/merge.py", "from vhdkit.formats.raw import open_raw"),
    ("vhdkit/cli/create.py", "import vhdkit.formats.vhd.dynamic"),
    ("vhdkit/disk.py", "isinstance(layer, DynamicImage)"),
    ("vhdkit/serve/opening.py", "isinstance(layer, images.FixedImage | images.LinearImage)"),
)
GOOD: tuple[tuple[str, str], ...] = (
    ("vhdkit/chain/verbs/merge.py", "from vhdkit import formats\nfrom vhdkit.formats.format import Format"),
    ("vhdkit/formats/undo.py", "from vhdkit.formats.vhd.layout import FOOTER_SIZE"),
)


def check_formats(path: str, source: str) -> Iterator[str]:
    """Outside the formats, modules use `formats.format.Format`, never a particular format or a class of images."""
    here = module_of(path)
    if not is_in(here, "vhdkit") or is_in(here, "vhdkit.formats"):
        return
    for line, module, name in imports_of(path, source):
        inner = f"{module}.{name}".rstrip(".")
        if any(is_in(inner, one) for one in FORMATS):
            yield f"{path}:{line}: {inner} is one format's; ask the contract (formats.format)"
        elif is_in(here, "vhdkit.chain") and is_in(module, "vhdkit.formats") and module not in OF_EVERY_FORMAT:
            yield f"{path}:{line}: {module} is not among the modules that know no format"
    for node in nodes_of(source):
        if isinstance(node, ast.Name | ast.Attribute) and getattr(node, "id", getattr(node, "attr", "")) in IMAGES:
            yield f"{path}:{node.lineno}: a class of one format's images; ask the layer or its format"


def test_no_module_outside_knows_a_format() -> None:
    """Every file of vhdkit follows the rule."""
    complaints = [one for path, source in python_files("vhdkit") for one in check_formats(path, source)]
    assert not complaints, "\n" + "\n".join(complaints)


@pytest.mark.parametrize(("path", "source"), BAD)
def test_the_rule_can_fail(path: str, source: str) -> None:
    """Self-test: the rule complains about a line that breaks it."""
    assert list(check_formats(path, source))


@pytest.mark.parametrize(("path", "source"), GOOD)
def test_the_rule_lets_good_code_pass(path: str, source: str) -> None:
    """Self-test: the contract, and a format's own side, are accepted."""
    assert list(check_formats(path, source)) == []
