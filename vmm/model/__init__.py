# SPDX-License-Identifier: Apache-2.0
"""What a machine is and what is reported about it, as values and files; no processes."""
