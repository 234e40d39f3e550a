# SPDX-License-Identifier: Apache-2.0
"""QEMU and KVM: command lines, processes, the monitor, drives, the guest's channels. Knows nothing about switches."""
