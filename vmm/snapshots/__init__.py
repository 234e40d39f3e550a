# SPDX-License-Identifier: Apache-2.0
"""Snapshots of machines: a tree of states to which a machine can return, with its disks and, if it ran, its memory.

    create            taking a snapshot of a machine that is off; `worker.capture` takes one of a machine that runs
    apply, delete     going back, removing
    background_merge  the merges that are due, in a process of its own
    preflight         what is checked before anything is destroyed
    steps             what the verbs have in common
    dependents        what else stands on an image
    recovery          what an interrupted step means, and how it is finished or taken back

The tree itself, its lock and its journal lie in `vmm.store.snapshots`.
The drawing of all files is in docs/snapshots.md.
"""
