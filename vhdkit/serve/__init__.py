# SPDX-License-Identifier: Apache-2.0
"""Serving disks to others: the NBD server, nbdkit's plugin and the FUSE mount."""
