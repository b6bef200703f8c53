"""Speed of each size in each precision: latency at batch 1, throughput at batch 8, against torch and DenseNet121.

Reads nothing; weights are random, times do not depend on them. Gives rows for the table and the JSON.
Never compares times of different runs: all ways of one batch and thread count take turns in one process.
Source: issue 3, "Speed". MONAI's DenseNet121 where it is installed.
"""

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from models.bundle import INPUT_NAMES, Arrays
from models.export import to_onnx
from models.latency import cpu_session, medians_s
from models.network import BASE, NANO, SMALL, TINY
from models.restore import new_network
from models.spec import MODALITIES
from models.tasks import INPUTS, TASKS
from models.variants import FORMS, to_int8

SIZES = (NANO, TINY, SMALL, BASE)
DENSENET = "densenet121"
COMPILED = "torch.compile"
LATENCY_BATCH, THROUGHPUT_BATCH = 1, 8
SIDE_PX = INPUTS[0].size
_CALIBRATION_BATCHES = 8
_LABELS = sum(len(task.labels) for task in TASKS)


@dataclass(frozen=True)
class Way:
    """One network as one engine runs it; `prepare(threads, batch)` gives the call that is timed."""

    network: str
    engine: str
    precision: str
    form: str
    prepare: Callable[[int, int], Callable[[], object]]


def rows(
    sizes: Sequence[str] = (NANO, TINY, SMALL),
    *,
    threads: Sequence[int] = (1, 2),
    rounds: int = 21,
    with_compile: bool = True,
) -> list[dict[str, Any]]:
    """One row for each way, thread count and batch; `note` says why a time is missing.

    torch.compile takes half a minute for each network, thread count and batch: `with_compile` leaves it out of a quick run.
    `to_fp32` is how many times as fast as ONNX Runtime's fp32 graph of the same network, `to_densenet121` as DenseNet121's.
    """
    ways = [way for size in sizes for way in _hybrid_ways(size)] + list(_densenet_ways())
    ways = [way for way in ways if with_compile or way.engine != COMPILED]
    found = []
    for count in threads:
        torch.set_num_threads(count)
        for batch in (LATENCY_BATCH, THROUGHPUT_BATCH):
            torch.compiler.reset()  # it keeps eight versions of one forward, and runs the ninth uncompiled
            found += _measured(ways, count, batch, rounds)
    if importlib.util.find_spec("monai") is None:
        found.append({"network": DENSENET, "note": "MONAI is not installed"})
    return found


def _measured(ways: Sequence[Way], threads: int, batch: int, rounds: int) -> list[dict[str, Any]]:
    calls: dict[str, Callable[[], object]] = {}
    notes: dict[str, str] = {}
    for way in ways:
        try:
            call = way.prepare(threads, batch)
            call()
        except RuntimeError as error:  # torch.compile where there is no C++ compiler
            notes[_key(way)] = str(error).splitlines()[0]
        else:
            calls[_key(way)] = call
    seconds = medians_s(calls, rounds)
    return [_row(way, threads, batch, seconds, notes) for way in ways]


def _row(way: Way, threads: int, batch: int, seconds: Mapping[str, float], notes: Mapping[str, str]) -> dict[str, Any]:
    row = {
        "network": way.network,
        "engine": way.engine,
        "precision": way.precision,
        "form": way.form,
        "threads": threads,
        "batch": batch,
        "note": notes.get(_key(way), ""),
    }
    own_s = seconds.get(_key(way))
    if own_s is None:
        return row
    row |= {"latency_ms": round(1e3 * own_s, 3), "images_per_s": round(batch / own_s, 1)}
    for column, network in (("to_fp32", way.network), ("to_densenet121", DENSENET)):
        base_s = seconds.get(f"{network} onnxruntime fp32 ")
        if base_s is not None:
            row[column] = round(base_s / own_s, 3)
    return row


def _key(way: Way) -> str:
    return f"{way.network} {way.engine} {way.precision} {way.form}"


def _hybrid_ways(size: str) -> Iterator[Way]:
    network = new_network(size, TASKS, INPUTS, seed=0).eval()
    graph = to_onnx(network)
    yield Way(size, "onnxruntime", "fp32", "", partial(_by_onnxruntime, graph))
    for form in FORMS:
        calibration = (_images(1, seed) for seed in range(_CALIBRATION_BATCHES))
        yield Way(size, "onnxruntime", "int8", form.name, partial(_by_onnxruntime, to_int8(graph, form, calibration)))
    yield Way(size, "torch eager", "fp32", "", partial(_by_torch, network))
    yield Way(size, COMPILED, "fp32", "", partial(_by_torch, torch.compile(network, dynamic=False)))


def _densenet_ways() -> Iterator[Way]:
    if importlib.util.find_spec("monai") is None:
        return
    nets = importlib.import_module("monai.networks.nets")
    network = nets.DenseNet121(spatial_dims=2, in_channels=1, out_channels=_LABELS).eval()
    yield Way(DENSENET, "onnxruntime", "fp32", "", partial(_by_onnxruntime, _densenet_onnx(network)))
    yield Way(DENSENET, "torch eager", "fp32", "", partial(_by_torch, _OfSlices(network)))
    yield Way(DENSENET, COMPILED, "fp32", "", partial(_by_torch, torch.compile(_OfSlices(network), dynamic=False)))


class _OfSlices(torch.nn.Module):  # type: ignore[misc]  # torch is not followed by mypy
    """A network of single images under the hybrid's signature; one slice is one image."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, slices_BSHW: Any, slice_mask_BS: Any, modality_B: Any) -> Any:
        return self.network(slices_BSHW)


def _densenet_onnx(network: Any) -> bytes:
    images = torch.zeros(2, 1, SIDE_PX, SIDE_PX)
    free = {0: torch.export.Dim("B", min=1, max=1024)}
    program = torch.onnx.export(
        network,
        (images,),
        input_names=[INPUT_NAMES[0]],
        dynamic_shapes=(free,),
        dynamo=True,
        verbose=False,
    )
    written: bytes = program.model_proto.SerializeToString()
    return written


def _by_onnxruntime(graph: bytes, threads: int, batch: int) -> Callable[[], object]:
    session = cpu_session(graph, threads)
    wanted = [value.name for value in session.get_inputs()]
    inputs = {name: array for name, array in _images(batch, 0).items() if name in wanted}
    return partial(session.run, None, inputs)


def _by_torch(network: Any, threads: int, batch: int) -> Callable[[], object]:
    """`threads` is set for the whole process."""
    tensors = [torch.from_numpy(_images(batch, 0)[name]) for name in INPUT_NAMES]

    def call() -> object:
        with torch.inference_mode():
            return network(*tensors)

    return call


def _images(batch: int, seed: int) -> Arrays:
    """One slice each."""
    generator = np.random.default_rng(seed)
    return {
        "slices_BSHW": generator.uniform(-1, 1, (batch, 1, SIDE_PX, SIDE_PX)).astype(np.float32),
        "slice_mask_BS": np.ones((batch, 1), bool),
        "modality_B": generator.integers(0, len(MODALITIES), batch),
    }
