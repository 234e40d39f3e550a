# SPDX-License-Identifier: Apache-2.0
"""Snapshots of machines: a tree of states to which a machine can return, with its disks and, if it ran, its memory.

    tree      the model: snapshots, "now", the images that were made for them. Pure
    rule      which image goes, which is merged into which, which stays: a function over files. Pure
    store     the tree on disk, its lock, its journal
    survey    what else stands on an image
    create    the steps that a snapshot of a machine takes; `capture` those of one that runs, in its worker
    apply     going back; `delete` removing; `fold` merging, in a process of its own
    settle    what an interrupted step means, and how it is finished or taken back

The drawing of all files is in docs/snapshots.md.
"""
