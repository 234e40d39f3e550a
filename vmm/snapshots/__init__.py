# SPDX-License-Identifier: Apache-2.0
"""Snapshots of machines: a tree of states that a machine can return to, with its disks and, if it ran, its memory.

    create            taking a snapshot of a machine that is off; `worker.capture` takes one of a running machine
    apply, delete     returning to a snapshot, removing snapshots
    background_merge  pending merges, in a process of its own
    preflight         checks made before anything is destroyed
    steps             steps that the verbs share
    dependents        other users of an image
    recovery          what an interrupted step means, and how it is completed or undone

The tree itself, its lock and its journal are in `vmm.store.snapshots`.
All files are drawn in docs/snapshots.md.
"""
