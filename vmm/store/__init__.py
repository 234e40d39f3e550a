# SPDX-License-Identifier: Apache-2.0
"""The files of machines: definitions, images, saved states, snapshot trees, and the locks for changing them."""
