# SPDX-License-Identifier: Apache-2.0
"""Backups that are chains of ordinary images in a folder: the repository, its nights, and what is done with them."""
