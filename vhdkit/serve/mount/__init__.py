# SPDX-License-Identifier: Apache-2.0
"""Mounting disks: a FUSE tree, and the file systems and loop devices on top of it."""
