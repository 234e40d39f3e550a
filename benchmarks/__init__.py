# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: each compares with named peers, side by side in one run, and prints a table and JSON."""
