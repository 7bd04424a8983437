# SPDX-License-Identifier: Apache-2.0
"""Findings about a machine, and how they read."""

from dataclasses import replace
from pathlib import Path

import pytest

from pretrained.core.doctor import Environment, Finding, check_environment, check_listing, of_error
from pretrained.errors import ConfigError

FINE = Environment(
    python="3.12.1",
    versions={"torch": "2.9.0+cu128", "numpy": "2.1.0", "tokenizers": "0.22.0", "jinja2": "3.1.6"},
    least={"torch": "2.6", "numpy": "1.26", "tokenizers": "0.21", "jinja2": "3.1.6"},
    needed=frozenset({"numpy"}),
    accelerators=("NVIDIA H200",),
    disk_free=10**11,
)


def changed(**versions):
    return replace(FINE, versions={**FINE.versions, **versions})


def test_nothing_to_say():
    assert check_environment(FINE) == []


@pytest.mark.parametrize(
    ("machine", "said"),
    [
        (changed(numpy=None), "fault: numpy is not installed. pip install 'numpy>=1.26'"),
        (changed(numpy="1.9.9"), "fault: numpy 1.9.9 is older than 1.26. pip install -U 'numpy>=1.26'"),
        (changed(torch="2.5.1"), "fault: torch 2.5.1 is older than 2.6. pip install -U 'torch>=2.6'"),
        (
            changed(torch=None),
            "notice: PyTorch is not installed. pip install 'pretrained[torch]', to load models",
        ),
        (
            changed(torch="2.9.0+cpu"),
            "notice: PyTorch 2.9.0+cpu is a build without accelerators, and this machine",
        ),
        (changed(jinja2=None), "notice: jinja2 is not installed: chat templates cannot be used."),
        (changed(tokenizers=None), "notice: tokenizers is not installed: tokenizers cannot be loaded."),
        (replace(FINE, disk_free=5000), "notice: The disk of the download cache has 5.0 kB free"),
        (
            replace(FINE, partial={"a.incomplete": 1000, "b.incomplete": 2000}),
            "notice: Downloads that were not finished: 2, of 3.0 kB (a.incomplete). The next download",
        ),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_what_a_machine_lacks(machine, said):
    (finding,) = check_environment(machine)
    assert str(finding).startswith(said)


@pytest.mark.parametrize("version", ["1.26", "1.26.0rc1", "1.26.4+local", "2", "10.0.0"])
def test_versions_are_compared_as_numbers(version):
    assert check_environment(changed(numpy=version)) == []


def test_an_error_becomes_a_finding():
    error = ConfigError("A thing is wrong", where="x", expected=1, found=2, mend="Do this.")
    assert of_error(error) == Finding("fault", "A thing is wrong: expected 1, found 2", "x", "Do this.")
    assert str(of_error(ConfigError("Why?"), "notice")) == "notice: Why?"


def test_a_listing_without_anything_odd():
    names = ("config.json", "model.safetensors", "tokenizer.json", "README.md", ".gitattributes")
    assert check_listing(Path(), dict.fromkeys(names, 10)) == []


def test_variants_have_indexes_of_their_own(tmp_path):
    (tmp_path / "model.safetensors.index.fp16.json").write_text(
        '{"weight_map": {"a": "model.fp16-1.safetensors"}}'
    )
    sizes = {"model.safetensors.index.fp16.json": 10, "model.fp16.safetensors": 10, "model.safetensors": 10}
    (finding,) = check_listing(tmp_path, sizes)
    assert (
        finding.what == "model.fp16.safetensors is loaded, and model.safetensors.index.fp16.json passed over"
    )
