"""Fixtures of the models tests: the shipped bundle, opened once, and a session that runs its graph."""

from collections.abc import Callable

import numpy as np
import onnxruntime
import pytest

from models.bundle import OUTPUT_NAMES, SHIPPED, Arrays, Bundle, read_bundle

SessionRun = Callable[[Arrays], Arrays]


@pytest.fixture(scope="session")
def shipped() -> Bundle:
    return read_bundle(SHIPPED)


def session_of(onnx: bytes) -> SessionRun:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
    return lambda inputs: dict(zip(OUTPUT_NAMES, session.run(list(OUTPUT_NAMES), inputs), strict=True))


@pytest.fixture(scope="session")
def run_shipped(shipped: Bundle) -> SessionRun:
    return session_of(shipped.onnx)


def one_series(slices_SHW: np.ndarray, modality: int) -> Arrays:
    return {
        "slices_BSHW": slices_SHW[None],
        "slice_mask_BS": np.ones((1, len(slices_SHW)), bool),
        "modality_B": np.array([modality]),
    }


@pytest.fixture(scope="session")
def one_thread() -> None:
    """Two threads that wait for each other by spinning take thirty times as long where something else uses a core."""
    torch = pytest.importorskip("torch", reason="training and export need the extra `train`")
    torch.set_num_threads(1)
