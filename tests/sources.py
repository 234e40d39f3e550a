# SPDX-License-Identifier: Apache-2.0
"""Syntax trees for the tests that read the project's source: each file is parsed and walked once for all rules.

Rules look at one file after another, so only the last one is kept: a tree is large.
"""

from __future__ import annotations

import ast
from functools import lru_cache


@lru_cache(maxsize=1)
def tree_of(text: str) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(text)


@lru_cache(maxsize=1)
def nodes_of(text: str) -> tuple[ast.AST, ...]:
    """All nodes of a file's tree, in the order of `ast.walk`, which takes twice as long."""
    nodes: list[ast.AST] = [tree_of(text)]
    for node in nodes:  # grows meanwhile
        for name in node._fields:
            value = getattr(node, name, None)
            if isinstance(value, list):
                nodes += [one for one in value if isinstance(one, ast.AST)]
            elif isinstance(value, ast.AST):
                nodes.append(value)
    return tuple(nodes)
