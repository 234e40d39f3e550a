# SPDX-License-Identifier: Apache-2.0
"""The processes of a running machine: which process starts which, and how the worker is reached."""
