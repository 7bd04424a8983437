# SPDX-License-Identifier: Apache-2.0
"""A process that is killed at some moment, without the process."""

import os
import shutil


class Killed(BaseException):
    """Ends the program; nothing that comes after it has an effect."""


def dying(monkeypatch, after):
    """Let all that changes the disk fail, from some call on, as if the process were gone; count the calls."""
    calls = []

    def wrap(module, name):
        original = getattr(module, name)

        def act(*words, **options):
            calls.append(name)
            if len(calls) > after:
                raise Killed
            return original(*words, **options)

        monkeypatch.setattr(module, name, act)

    for name in ("replace", "rename", "fsync", "unlink", "rmdir", "mkdir", "link"):
        wrap(os, name)
    wrap(shutil, "rmtree")
    return calls
