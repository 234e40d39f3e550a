# SPDX-License-Identifier: Apache-2.0
"""Image formats: each signs the `image.Layer` contract. Which one a file is: `formats.probe`."""
