# SPDX-License-Identifier: Apache-2.0
"""The oracle of the parity tests: transformers' model of the same name, with our weights."""

import transformers


def transformers_twin(model, attn_implementation="eager"):
    """Return transformers' model of the same class name with the weights and config of `model`."""
    cls = getattr(transformers, type(model).__name__)
    config = cls.config_class.from_dict(model.config.to_diff_dict())
    config._attn_implementation = attn_implementation
    twin = cls(config).eval()
    missing, unexpected = twin.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected, unexpected
    assert not missing, missing
    return twin.to(model.dtype)
