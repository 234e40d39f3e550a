# SPDX-License-Identifier: Apache-2.0
"""Our images in other programs, and their images in ours."""
