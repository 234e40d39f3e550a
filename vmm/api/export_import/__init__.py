# SPDX-License-Identifier: Apache-2.0
"""Machines as folders: written for another host, examined and taken in."""
