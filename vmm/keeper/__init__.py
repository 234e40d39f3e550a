# SPDX-License-Identifier: Apache-2.0
"""What the supervisor was called in vmm 0.1.0."""
