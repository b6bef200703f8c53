"""Weights read and moved a tensor at a time: the same as all at once, and nothing that does not fit."""

import json
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from models import delta, weights_file
from models.bundle import SHIPPED, WEIGHTS, read_bundle
from models.errors import BundleError, DeltaError


def with_weights(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "other.bundle"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(WEIGHTS, content)
    return path


def test_the_shapes_are_those_of_the_bundle() -> None:
    assert weights_file.shapes(SHIPPED) == {name: value.shape for name, value in read_bundle(SHIPPED).weights.items()}


def test_moved_weights_are_the_sum_to_the_last_bit(tmp_path: Path) -> None:
    weights, generator = read_bundle(SHIPPED).weights, np.random.default_rng(0)
    names = delta.trainable_names(weights, "heads")
    change = {name: generator.standard_normal(weights[name].shape).astype(np.float32) for name in names}
    weights_file.write_moved(SHIPPED, change, tmp_path / "moved")
    moved, expected = safetensors_numpy.load_file(tmp_path / "moved"), delta.apply(weights, change)
    assert moved.keys() == expected.keys()
    assert all(np.array_equal(moved[name], value) for name, value in expected.items())
    assert any(not np.array_equal(moved[name], weights[name]) for name in names)


@pytest.mark.parametrize("shape", [(3,), ()])
def test_a_change_of_another_tensor_or_shape_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    name = "head.evil" if shape else next(iter(weights_file.shapes(SHIPPED)))
    with pytest.raises(DeltaError, match="is not a tensor of these weights"):
        weights_file.write_moved(SHIPPED, {name: np.zeros(shape, np.float32)}, tmp_path / "moved")


@pytest.mark.parametrize(
    ("header", "body", "reason"),
    [
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, bytes(12), "not where its shape says"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, bytes(4), "not where its shape says"),
        ({"a": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}, bytes(4), "cannot be read"),
        ({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, bytes(8), "cannot be read"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, bytes(7), "cut short"),
        (["a"], b"", "cannot be read"),
    ],
)
def test_a_header_that_cannot_be_is_refused(tmp_path: Path, header: object, body: bytes, reason: str) -> None:
    text = json.dumps(header).encode()
    path = with_weights(tmp_path, struct.pack("<Q", len(text)) + text + body)
    with pytest.raises(BundleError, match=reason):
        weights_file.write_moved(path, {}, tmp_path / "moved")


@pytest.mark.parametrize("content", [b"", bytes(7), struct.pack("<Q", 1 << 60), struct.pack("<Q", 100) + b"{}"])
def test_a_header_that_is_not_there_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(BundleError):
        weights_file.shapes(with_weights(tmp_path, content))


def test_a_file_that_is_no_bundle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "none").write_bytes(b"PK")
    with pytest.raises(BundleError, match="cannot be read"):
        weights_file.shapes(tmp_path / "none")
    with pytest.raises(BundleError, match="cannot be read"):
        weights_file.shapes(tmp_path / "missing")
