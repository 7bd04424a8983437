# SPDX-License-Identifier: Apache-2.0
"""Public test rigs: numpy references, tiny checkpoints and the battery every architecture passes."""
