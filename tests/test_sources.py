# SPDX-License-Identifier: Apache-2.0
"""The nodes that the rules over the project's source look at."""

from __future__ import annotations

import ast

from tests.sources import nodes_of, tree_of
from tests.support import ROOT


def test_no_node_is_missed() -> None:
    """The nodes are those of `ast.walk`, in its order, of files with all kinds of syntax."""
    for path in (*sorted((ROOT / "tests").glob("*.py"))[:10], ROOT / "vhdkit" / "store.py"):
        text = path.read_text(encoding="utf-8")
        assert list(nodes_of(text)) == list(ast.walk(tree_of(text)))
    text = "match x:\n    case {'a': [1, *rest], **others} if y: ...\nasync def f(a, /, *, b=1): [c async for c in d]"
    assert list(nodes_of(text)) == list(ast.walk(tree_of(text)))
