# SPDX-License-Identifier: Apache-2.0
"""A machine's snapshot tree as values and files, and the journal that an operation writes before it acts."""
