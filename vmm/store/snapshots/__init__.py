# SPDX-License-Identifier: Apache-2.0
"""A machine's tree of snapshots as values and files, and what an operation records beforehand."""
