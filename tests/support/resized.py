# SPDX-License-Identifier: Apache-2.0
"""The rows of the battery's table that resizing is tested with."""

from support.cases import CASES

# Each class once, and those whose ties differ from the default.
SEEN: dict[str, object] = {}
for row in CASES:
    name = row.model_class.__name__
    SEEN.setdefault(name if "tied" not in str(row) else str(row), row)
ROWS = list(SEEN.values())
HEADS = [row for row in ROWS if row.build().get_output_embeddings() is not None]
