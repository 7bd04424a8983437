# SPDX-License-Identifier: Apache-2.0
"""What loads do about quantization: a file for each way that a quantized model comes up."""
