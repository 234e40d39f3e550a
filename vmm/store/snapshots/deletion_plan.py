# SPDX-License-Identifier: Apache-2.0
"""The delete rule: which images are removed, which are merged into which, which stay. A pure function over files.

The rule is Hyper-V's. The dependants of an image are the files that stand on it, whatever made them. For an image that
no snapshot froze, that the machine does not write to and that no other machine uses, their number decides:

    none           it is removed now if it was made for this machine; a user's own image is never removed
    exactly one    that child is merged down INTO it, and takes its place under its name:

                       A <- (B) <- C        B was deleted        A <- B'        B' reads as C did
                                                                                C's file is gone

    two or more    it stays, hidden: two merges would need the space twice. It is judged again when one of them goes

What stands on an image to which the machine writes may be newer than its definition (`repair`): it stays unchanged.

So nothing is ever merged into an image whose content is still needed. Merges are combined into one step: if (B) and
(C) are both deleted, D goes into B.

`INV-DELETE-RULE`: whatever a plan does, every frozen image, the one written to, and everything on top of foreign
images reads the same bytes, under the paths that `Tree.merged` gives; only images that are `ours` are removed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from vmm.store.snapshots.tree import Image

NEWER = "it stands on the image that the machine writes to, and may hold what was written last (vmm repair)"
FOREIGN = "an image that was not made by vmm for this machine stands on it"


@dataclass(frozen=True, slots=True)
class LayerMerge:
    """`layers`, newest first, are merged into `target`, which then takes the place of the newest."""

    target: str
    layers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """The result of the rule. `unlink` is in a safe order of removal; `kept`: path -> why it stays hidden.

    `forget`: the user's own images for which there is nothing left to do.
    """

    unlink: tuple[str, ...] = ()
    merges: tuple[LayerMerge, ...] = ()
    kept: Mapping[str, str] = field(default_factory=dict)
    forget: tuple[str, ...] = ()


def plan(
    images: Mapping[str, Image],
    *,
    frozen: Iterable[str],
    live: Iterable[str],
    foreign: Mapping[str, Collection[str]] | None = None,
    held: Collection[str] = (),
) -> Plan:
    """Apply the rule to all images of a machine.

    `frozen`: images that snapshots need; `live`: images that the machine writes to; `foreign`: image -> files that
    stand on it and are not in `images`; `held`: images that other machines use, or that cannot
    be proved to be this one's.
    """
    foreign = foreign or {}
    pinned, live = {*frozen, *held}, set(live)
    newer = _standing_on(live, images) - pinned
    needed = {*pinned, *live, *newer}
    left = dict(images)
    unlink = _removable(left, needed, foreign)
    dependants = _dependants(left)
    mergeable: dict[str, str] = {}  # an image -> the one that is merged into it
    kept = dict.fromkeys(newer, NEWER)
    for path in left:
        if path in needed:
            continue
        ours, others = dependants[path], foreign.get(path, ())
        if len(ours) + len(others) >= 2:
            kept[path] = f"{len(ours) + len(others)} images stand on it"
        elif others:
            kept[path] = FOREIGN
        elif ours:
            problem = _obstacle(ours[0], left, foreign, held)
            if problem is None:
                mergeable[path] = ours[0]
            else:
                kept[path] = problem
    merges = tuple(_run(path, mergeable) for path in mergeable if path not in mergeable.values())
    forget = tuple(path for path, one in left.items() if not one.ours and not dependants[path] and path not in pinned)
    return Plan(tuple(unlink), merges, kept, forget)


def _standing_on(live: Collection[str], images: Mapping[str, Image]) -> set[str]:
    """The images above those that the machine writes to; a consistent machine has none."""
    found: set[str] = set()
    step = set(live)
    while step := {path for path, one in images.items() if one.parent in step and path not in found}:
        found |= step
    return found - set(live)


def _removable(left: dict[str, Image], needed: set[str], foreign: Mapping[str, Collection[str]]) -> list[str]:
    """Remove from `left`, and return, the images without dependants, repeatedly: children before parents."""
    found: list[str] = []
    while True:
        dependants = _dependants(left)
        leaves = [
            path
            for path, one in left.items()
            if one.ours and path not in needed and not dependants[path] and not foreign.get(path)
        ]
        if not leaves:
            return found
        found += leaves
        for path in leaves:
            del left[path]


def _dependants(images: Mapping[str, Image]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {path: [] for path in images}
    for path, one in images.items():
        if one.parent in found:
            found[one.parent].append(path)
    return found


def _obstacle(
    path: str, images: Mapping[str, Image], foreign: Mapping[str, Collection[str]], held: Collection[str]
) -> str | None:
    """Why the image at `path` cannot be merged away, though it is the only one on its parent."""
    if not images[path].ours:
        return FOREIGN
    if path in held:
        return "the image that stands on it stays: another machine uses it, or it may not be this machine's"
    if foreign.get(path):
        return "an image of another owner builds on the one that would be merged away"
    return None


def _run(target: str, mergeable: Mapping[str, str]) -> LayerMerge:
    """All images to be merged into the target, one on top of the other."""
    layers: list[str] = []
    step = target
    while step in mergeable:
        step = mergeable[step]
        layers.insert(0, step)
    return LayerMerge(target, tuple(layers))
