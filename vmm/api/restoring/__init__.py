# SPDX-License-Identifier: Apache-2.0
"""Machines from nights of a backup repository: chosen, judged, and made."""
