# SPDX-License-Identifier: Apache-2.0
"""Fuzz targets: one file each, which opens with the invariant it checks."""
