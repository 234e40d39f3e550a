# SPDX-License-Identifier: Apache-2.0
"""Paths of a chain: where parents and children are found, opened and locked."""
