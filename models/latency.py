"""Latency of several ways to compute the same, interleaved: what else the machine does hits all of them alike.

Reads the monotonic clock; runs what it is given.
Never compares figures of different runs.
Source: median over rounds, as everywhere in the benchmarks.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import onnxruntime

WARM_UP_ROUNDS = 2
PAUSE_S = 0.005  # idle threads of the way before (OpenMP's in torch) spin on for a while, on a core the next one needs


def medians_s(ways: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """By name, the median seconds of one call."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(WARM_UP_ROUNDS + rounds):
        for name, way in ways.items():
            time.sleep(PAUSE_S)
            started = time.perf_counter()
            way()
            if turn >= WARM_UP_ROUNDS:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(series) for name, series in seconds.items()}


def cpu_session(graph: bytes, threads: int) -> Any:
    """A session as the box opens it on the CPU."""
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    settings.log_severity_level = 3  # a float16 graph has nodes that the CPU runs by casting; it says so of each
    return onnxruntime.InferenceSession(graph, settings, providers=["CPUExecutionProvider"])
