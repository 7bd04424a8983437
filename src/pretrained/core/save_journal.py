# SPDX-License-Identifier: Apache-2.0
"""Makes config.json change together with the weights that it describes.

One rename switches from the old weights to the new ones, but no rename switches two files. So before the
weights change, the new texts lie complete under temporary names, and a small journal says so: these texts
belong to weights files with these identities. From then on a reader asks which weights are there. If they are
the journal's, the texts are read from their temporary names until they have their own; if not, the journal
says nothing yet. A save that was killed thus leaves a folder that loads as the old model or the new one, and
the next save tidies up.

An identity is a file's inode number, size and time of change, which renames and links keep. In a copy of
such a folder the journal says nothing, and so it does to other libraries.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from pretrained.core.atomic_files import new_file, replace_text, sync_folder, temporary_name

JOURNAL: Final = ".pretrained-save.json"
"""Name of the journal, which lies in the folder for a moment."""

_TEXT_NAME: Final = re.compile(r"[A-Za-z0-9_]+\.json")
_TEMPORARY: Final = re.compile(r"\.tmp-[0-9a-f]{8}-[A-Za-z0-9_]+\.json")
_MAX_BYTES: Final = 1_000_000


class TextChange:
    """New texts that take effect together with new weights.

    Args:
        folder: The folder.
        texts: Content by file name; what the folder holds already, to the letter, needs no journal.
    """

    def __init__(self, folder: Path, texts: Mapping[str, str]) -> None:
        self._folder = folder
        self._same = {name: text for name, text in texts.items() if _holds(folder / name, text)}
        self._texts = {name: text for name, text in texts.items() if name not in self._same}
        token = secrets.token_hex(4)
        self._temporary = {name: temporary_name(name, token) for name in self._texts}

    def prepare(self) -> None:
        """Write and flush the texts under temporary names; readers see nothing of it."""
        for name, text in self._texts.items():
            with new_file(self._folder / self._temporary[name]) as opened:
                opened.write(text.encode("utf-8"))

    def announce(self, weights: Iterable[Path], single: str, index: str) -> None:
        """Write the journal.

        Args:
            weights: The new weights, under whatever names.
            single: Name of the one file that readers look for first.
            index: Name of the index that they look for next.
        """
        if not self._texts:
            return
        identities = [_identity(file) for file in weights]
        content = {"weights": identities, "single": single, "index": index, "texts": self._temporary}
        replace_text(self._folder / JOURNAL, json.dumps(content))

    def finish(self) -> None:
        """Give the texts their names, and remove the journal."""
        for name, text in self._same.items():
            # Written too, for whoever asks by their times which files a save has written.
            replace_text(self._folder / name, text)
        if not self._texts:
            return
        for name, temporary in self._temporary.items():
            os.replace(self._folder / temporary, self._folder / name)
        sync_folder(self._folder)
        (self._folder / JOURNAL).unlink()

    def undo(self) -> None:
        """Remove what was prepared; the weights have not changed."""
        # The journal first: nothing may name a text that is gone.
        for name in (JOURNAL, *self._temporary.values()) if self._texts else ():
            with suppress(OSError):
                (self._folder / name).unlink(missing_ok=True)


def text_file(folder: Path, name: str) -> Path:
    """Return where a text file lies that belongs to the weights of a folder.

    Args:
        folder: A local folder.
        name: Such as ``"config.json"``.

    Returns:
        The file of that name; after a save that was killed, perhaps another.
    """
    if _TEXT_NAME.fullmatch(name) and os.path.exists(folder / JOURNAL):
        journal = _read(folder)
        temporary = journal.get("texts", {}).get(name)
        if temporary is not None and _is_newer(folder / temporary, folder / name):
            return folder / temporary if _in_effect(folder, journal) else folder / name
    return folder / name


def tidy(folder: Path, names: Iterable[str]) -> None:
    """Finish or undo what a killed save left of its texts. Call it while no other save is writing.

    Args:
        folder: A local folder.
        names: Names of text files whose temporary copies are removed.
    """
    if (folder / JOURNAL).exists():
        journal = _read(folder)
        if _in_effect(folder, journal):
            for name, temporary in journal["texts"].items():
                if _is_newer(folder / temporary, folder / name):
                    os.replace(folder / temporary, folder / name)
            sync_folder(folder)
        (folder / JOURNAL).unlink()
    left = re.compile(rf"\.tmp-[0-9a-f]{{8}}-({'|'.join(map(re.escape, [*names, JOURNAL]))})")
    for name in os.listdir(folder):
        if left.fullmatch(name):
            (folder / name).unlink(missing_ok=True)


def _holds(file: Path, text: str) -> bool:
    try:
        return file.read_bytes() == text.encode("utf-8") and not file.is_symlink()
    except OSError:
        return False


def _is_newer(temporary: Path, file: Path) -> bool:
    """Tell whether a text still waits for its name: it is there, and nobody has written that file since."""
    try:
        written = os.stat(temporary).st_mtime_ns
    except OSError:
        return False
    try:
        return os.stat(file).st_mtime_ns <= written
    except OSError:
        return True


def _identity(file: Path) -> list[int]:
    stat = os.stat(file)
    return [stat.st_ino, stat.st_size, stat.st_mtime_ns]


def _in_effect(folder: Path, journal: Mapping[str, Any]) -> bool:
    """Tell whether the weights that a reader finds are the journal's."""
    if not journal:
        return False
    file = folder / journal["single"]
    try:
        if not file.exists():
            weight_map = json.loads((folder / journal["index"]).read_bytes())["weight_map"]
            file = folder / Path(next(iter(weight_map.values()))).name
        return _identity(file) in journal["weights"]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, StopIteration):
        return False


def _read(folder: Path) -> dict[str, Any]:
    """Return a journal that names only files of its own folder; an empty one for any other."""
    try:
        with open(folder / JOURNAL, "rb") as opened:
            content = json.loads(opened.read(_MAX_BYTES))
        texts = content["texts"]
        plain = all(_TEXT_NAME.fullmatch(name) for name in texts) and all(
            _TEMPORARY.fullmatch(temporary) and not (folder / temporary).is_symlink()
            for temporary in texts.values()
        )
        names = [content["single"], content["index"]]
        plain = plain and all(Path(name).name == name for name in names) and bool(content["weights"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {}
    return content if plain else {}
