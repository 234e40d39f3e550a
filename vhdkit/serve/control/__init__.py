# SPDX-License-Identifier: Apache-2.0
"""The control socket of a server: its protocol, its methods and its client."""
