# SPDX-License-Identifier: Apache-2.0
"""The NBD server: its wire format, handshake, exports, connections and jobs."""
