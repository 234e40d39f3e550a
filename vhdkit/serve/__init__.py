# SPDX-License-Identifier: Apache-2.0
"""Disks for others: the NBD server and what belongs to it."""
