# SPDX-License-Identifier: Apache-2.0
"""Chains of images: finding the parents, one flat map of which layer owns what, and operations on whole chains.

Chains are listed leaf first everywhere: index 0 is the leaf, the last is the base.
"""
