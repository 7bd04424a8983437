# SPDX-License-Identifier: Apache-2.0
"""Framework-free facts of each architecture: its config, its skeleton, its key rules."""
