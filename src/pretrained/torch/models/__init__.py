# SPDX-License-Identifier: Apache-2.0
"""One readable file for each architecture."""
