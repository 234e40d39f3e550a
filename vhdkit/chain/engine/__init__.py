# SPDX-License-Identifier: Apache-2.0
"""The open chain: which layer owns a sector, and which file a request goes to."""
