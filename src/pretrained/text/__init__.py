# SPDX-License-Identifier: Apache-2.0
"""Tokenizers and chat templates."""
