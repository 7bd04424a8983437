# SPDX-License-Identifier: Apache-2.0
"""Writes src/pretrained/__init__.pyi, the static twin of the package's lazy table of names.

Run it after a change to that table or to the registry: ``python tools/write_stub.py``.
"""

from __future__ import annotations

from pathlib import Path

import pretrained

HEAD = """# SPDX-License-Identifier: Apache-2.0
# Written by tools/write_stub.py from the lazy table in __init__.py; not to be edited.

__version__: str

"""


def stub() -> str:
    """Return the stub's text: one import for each module, each name re-exported."""
    names = sorted(pretrained._modules().items(), key=lambda item: item[::-1])
    lines = [f"from {module} import {name} as {name}" for name, module in names]
    return HEAD + "\n".join(lines) + "\n"


if __name__ == "__main__":
    Path(pretrained.__file__).with_suffix(".pyi").write_text(stub(), encoding="utf-8")
