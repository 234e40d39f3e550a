# SPDX-License-Identifier: Apache-2.0
"""Records of unfinished changes beside an image, and which of them are valid."""
