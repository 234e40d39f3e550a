# SPDX-License-Identifier: Apache-2.0
"""What this host is and has: its devices, what it lacks, and what starts with it."""
