# SPDX-License-Identifier: Apache-2.0
"""Decoding steps written out for speed: one new token of each row, without a model's general forward."""
