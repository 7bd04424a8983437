# SPDX-License-Identifier: Apache-2.0
"""The oracle of the parity tests: transformers' model of the same name, with our weights."""

import torch
import transformers


def transformers_twin(model, attn_implementation="eager"):
    """Return transformers' model of the same class name with the weights and config of `model`."""
    cls = getattr(transformers, type(model).__name__)
    config = cls.config_class.from_dict(model.config.to_diff_dict())
    config._attn_implementation = attn_implementation
    twin = cls(config).eval()
    for name in set(getattr(twin, "_tied_weights_keys", None) or ()) - set(model.ties()):
        # Transformers ties the heads of some families whatever the config says.
        path, _, leaf = name.rpartition(".")
        module = twin.get_submodule(path)
        setattr(module, leaf, torch.nn.Parameter(getattr(module, leaf).detach().clone()))
    missing, unexpected = twin.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected, unexpected
    assert not missing, missing
    return twin.to(model.dtype)
