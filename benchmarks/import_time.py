# SPDX-License-Identifier: Apache-2.0
"""Importing is free: seconds to the package, to its first config and to its first model class."""

from measure import OURS, PEER, Comparison, Target, compare

_PROGRAM = """
import json, sys, time
start = time.perf_counter()
import {package}
package = time.perf_counter() - start
from {package} import AutoConfig
auto = time.perf_counter() - start
import torch
with_torch = time.perf_counter()
from {package} import T5ForConditionalGeneration
first_class = time.perf_counter() - with_torch
print(json.dumps(dict(import_s=package, auto_config_s=auto, first_class_after_torch_s=first_class)))
"""


def run() -> list[Comparison]:
    """Compare with transformers."""
    targets = [
        Target("the package under 0.06 s", "import_s", most=0.06),
        Target("a first model class at most 0.15 s on top of torch", "first_class_after_torch_s", most=0.15),
    ]
    sides = {OURS: _PROGRAM.format(package="pretrained"), PEER: _PROGRAM.format(package="transformers")}
    return [compare("Import", sides, targets)]
