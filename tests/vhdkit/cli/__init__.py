# SPDX-License-Identifier: Apache-2.0
"""Tests of the command line, run as a user would run it."""
