# SPDX-License-Identifier: Apache-2.0
"""Facts about this host and what runs on it: its devices, its missing features, and what starts at boot."""
