"""ONNX Runtime: its exceptions, which share no base class, and a session for checks.

Reads a graph's bytes; writes nothing.
Never serves the box: edge_agent.infer opens its own sessions, by provider.
Source: onnxruntime.capi.onnxruntime_pybind11_state.
"""

from typing import Any

import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state

RUNTIME_ERRORS: tuple[type[Exception], ...] = (
    RuntimeError,
    ValueError,
    *(
        kind
        for kind in vars(onnxruntime_pybind11_state).values()
        if isinstance(kind, type) and issubclass(kind, Exception)
    ),
)

_ERRORS_ONLY = 3


def checking_session(graph: bytes) -> Any:
    """One CPU thread, no warnings on stderr. Raises RUNTIME_ERRORS."""
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    settings.log_severity_level = _ERRORS_ONLY
    return onnxruntime.InferenceSession(graph, settings, providers=["CPUExecutionProvider"])
