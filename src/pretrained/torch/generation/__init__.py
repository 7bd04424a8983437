# SPDX-License-Identifier: Apache-2.0
"""Generation with PyTorch models: `mixin` is the door, the other modules are the rooms behind it."""
