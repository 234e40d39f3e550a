# SPDX-License-Identifier: Apache-2.0
"""What callers hold: machines, their snapshots, guests, exports and backups, whether they run or not."""
