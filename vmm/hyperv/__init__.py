# SPDX-License-Identifier: Apache-2.0
"""Machines of Hyper-V, as their files describe them. Knows neither QEMU nor any worker or terminal."""
