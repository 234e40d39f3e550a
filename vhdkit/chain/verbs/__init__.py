# SPDX-License-Identifier: Apache-2.0
"""Operations on whole chains, one module for each, and the steps they are made of."""
