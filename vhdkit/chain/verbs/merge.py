# SPDX-License-Identifier: Apache-2.0
"""The verb `merge`: which layers of a chain are merged, and whether into one of them or into a new file.

Decides what the caller's paths mean. How the merge is done is decided in `merge_in_place` and `merge_to`; an
interrupted one is continued by `merge_recovery`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from vhdkit import errors
from vhdkit.arguments import AnyPath, checked
from vhdkit.chain.engine.chain import Progress
from vhdkit.chain.names.options import OpenOptions
from vhdkit.chain.verbs.merge_in_place import Merge, described, plan_in_place, prepare, run
from vhdkit.chain.verbs.merge_parts import index_of_layer, opened
from vhdkit.chain.verbs.merge_to import merge_to
from vhdkit.image import Layer


@checked
def merge(
    leaf: AnyPath,
    *,
    into: AnyPath | None = None,
    to: AnyPath | None = None,
    relink_children: bool = False,
    dry_run: bool = False,
    options: OpenOptions | None = None,
    progress: Progress | None = None,
) -> Merge:
    """Merge `leaf`, and the layers between it and its ancestor `into` (if None, its parent), into that ancestor.

    The ancestor then has the leaf's content and size, and the others are removed. With `to` the result is a new file
    and the chain stays. Every image of the chain is held meanwhile. `relink_children` repoints the leaf's children to
    the result; no other image may depend on any of the files that change. `dry_run` only reports what would be done.

    Raises InvalidArgument, HasChildren, ImageInUse, NoSpace, IoFailed and what opening raises. On error every image
    reads as before; `resume_merge`, or the same call, continues.
    """
    options = options or OpenOptions()
    with opened(leaf, options) as layers:
        index = _index_of(layers, into)
        if to is not None:
            if relink_children:
                raise errors.InvalidArgument("children cannot be repointed to a new file: leave out --to or --relink")
            return merge_to(layers, index, os.fsdecode(to), dry_run, progress)
        plan = plan_in_place(layers, index, relink_children=relink_children)
        with prepare(plan, options, dry_run=dry_run) as prepared:
            return described(prepared) if dry_run else run(prepared, progress)


def _index_of(layers: Sequence[Layer], into: AnyPath | None) -> int:
    """The index of the ancestor in the chain."""
    leaf = layers[0].store.name
    if len(layers) == 1:
        raise errors.InvalidArgument("has no parent: there is nothing to merge it into", path=leaf)
    if into is None:
        return 1
    return index_of_layer(layers, into, itself="cannot be merged into itself")
