# SPDX-License-Identifier: Apache-2.0
"""Conversions: casts, plans, and what is compared after writing."""

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pretrained.core.checkpoint import Checkpoint, TensorInfo
from pretrained.core.convert import (
    ConvertedTensor,
    Reading,
    cast,
    check_target,
    plan_conversion,
    same_bytes,
    verify,
    work_folder,
    work_path,
)
from pretrained.core.dtypes import DTYPES
from pretrained.core.plan import LoadPolicy
from pretrained.core.safetensors_file import read_safetensors_header
from pretrained.errors import ArgumentError, CheckpointError, FileError, WeightsError

FLOATS = ["float64", "float32", "float16", "bfloat16"]


@pytest.mark.parametrize("source", [*FLOATS, "float8_e4m3fn"])
@pytest.mark.parametrize("target", FLOATS)
def test_casts_round_as_torch_does(source, target):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(4099, generator=generator, dtype=torch.float64) * 2
    values[:4] = torch.tensor([0.0, -0.0, float("inf"), -float("inf")])
    tensor = values.to(getattr(torch, source))
    raw = tensor.view(torch.uint8).numpy().view(DTYPES[source].numpy)
    found = cast(raw.reshape(4099), target, key="w")
    expected = tensor.to(getattr(torch, target)).view(torch.uint8).numpy()
    np.testing.assert_array_equal(found.view(np.uint8), expected)


def test_the_same_dtype_is_no_copy():
    array = np.ones(4, ml_dtypes.bfloat16)
    assert cast(array, "bfloat16", key="w") is array


@pytest.mark.parametrize(
    ("value", "source", "target"),
    [(70000.0, "float32", "float16"), (3.4e38, "float32", "bfloat16"), (1e39, "float64", "float32")],
)
def test_values_that_would_become_infinite(value, source, target):
    array = np.array([1.0, np.inf, value, -1.0], source)
    with pytest.raises(WeightsError, match=r"Values of 'w' are too large for .*found [0-9.e+]+\. Convert to"):
        cast(array, target, key="w")
    array[2] = np.nan
    assert np.isinf(cast(array, target, key="w")[1]) and np.isnan(cast(array, target, key="w")[2])


def test_strided_arrays():
    array = np.arange(12.0, dtype=np.float32).reshape(3, 4).T
    found = cast(array, "float16", key="w")
    np.testing.assert_array_equal(found, array.astype(np.float16))


def checkpoint(folder, content, name="x.safetensors"):
    save_file(content, folder / name)
    return read_safetensors_header(folder / name)


def test_a_plan_says_what_is_left_out(tmp_path):
    info = TensorInfo("a", "float32", (2,), tmp_path / "x", 0, 8)
    found = Checkpoint({"a": info, "b": info, "c": info, "n": info}, (tmp_path / "x",), "pytorch")
    plan = plan_conversion(found, LoadPolicy(dtype="float16"), dropped={"n": "no need"}, ties={"b": "a"})
    assert [step.key for step in plan.steps] == ["a", "c"]
    assert plan.aliases == {"b": "a"} and plan.dropped == {"n": "no need"}
    assert plan.sizes == {"a": 4, "c": 4}


def test_nothing_to_convert(tmp_path):
    with pytest.raises(WeightsError, match="The checkpoint holds no tensors"):
        plan_conversion(Checkpoint({}, (tmp_path / "x",), "safetensors"), LoadPolicy())


def test_equal_bytes_are_found(tmp_path):
    content = {"a": torch.ones(3), "b": torch.ones(3), "c": torch.zeros(3), "d": torch.ones(3, 1)}
    found = checkpoint(tmp_path, content)
    tensors = found.tensors
    assert same_bytes(tensors["a"], tensors["a"], found) and same_bytes(tensors["a"], tensors["b"], found)
    assert not same_bytes(tensors["a"], tensors["c"], found)
    assert not same_bytes(tensors["a"], tensors["d"], found)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"b": torch.ones(2)}, "its keys differ: b"),
        ({"a": torch.ones(3, dtype=torch.float16)}, "'a' is float16"),
        ({"a": torch.ones(1, 3)}, r"'a' is float32 \(1, 3\)"),
        ({"a": torch.tensor([1.0, 1.0, 2.0])}, "the bytes of 'a' differ"),
    ],
)
def test_what_was_read_back_must_be_what_was_meant(tmp_path, change, said):
    content = {"a": torch.ones(3)}
    old = checkpoint(tmp_path, content)
    reading = Reading(old)
    steps = plan_conversion(old, LoadPolicy(dtype=None)).steps
    tensors = {step.key: ConvertedTensor(step, reading) for step in steps}
    verify(old, tensors)
    new = checkpoint(tmp_path, content | change, "new.safetensors")
    with pytest.raises(CheckpointError, match=f"What was written is not what was meant: {said}"):
        verify(new, tensors)


def test_a_work_folder_goes_unless_something_in_it_is_finished(tmp_path):
    target = tmp_path / "deep" / "dst"
    with work_folder(target) as work:
        assert work == work_path(target) and work.is_dir()
    assert not work.exists()
    for error, stays in ((ArgumentError("x"), False), (FileError("x"), True)):
        with pytest.raises(type(error)), work_folder(target) as work:
            (work / "parts").mkdir()
            (work / "parts" / "model.safetensors").write_bytes(b"1")
            raise error
        assert work.exists() == stays


def test_a_link_in_the_place_of_the_work_folder(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    work_path(tmp_path / "dst").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileError, match="The folder to work in is a link"), work_folder(tmp_path / "dst"):
        pass


def test_the_folder_of_the_file_that_is_converted(tmp_path):
    file = tmp_path / "x.safetensors"
    file.write_bytes(b"1")
    with pytest.raises(ArgumentError, match="not converted in place"):
        check_target(tmp_path, file, force=True)
