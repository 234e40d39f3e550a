# SPDX-License-Identifier: Apache-2.0
"""Records beside an image that say a change is unfinished, and which of them are believed."""
