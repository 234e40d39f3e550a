# SPDX-License-Identifier: Apache-2.0
"""The files of machines: definitions, images, saved states, trees of snapshots, and who may change them."""
