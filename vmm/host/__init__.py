# SPDX-License-Identifier: Apache-2.0
"""What this host is and has: its devices, what is missing on it, what starts when it boots."""
