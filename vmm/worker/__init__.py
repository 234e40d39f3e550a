# SPDX-License-Identifier: Apache-2.0
"""The worker of a running machine: everything that happens inside that process."""
