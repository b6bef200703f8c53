"""The map in the same pass, judged: on lesions whose place is known, and by what happens when its pixels go or come.

Reads the shipped bundle and phantoms; trains one network on a real set; compares with Grad-CAM on the same weights.
Never scores a map by how it looks.
Source: pointing game (Zhang 2018); deletion and insertion (Petsiuk 2018); Grad-CAM (Selvaraju 2017).
Axes: N images, H W pixels, h w places, D features, T steps.
"""

import time
from dataclasses import replace
from functools import partial

import cv2
import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.network import accuracy, images
from benchmarks.network.results import Results, Row
from models import calibration, pretraining
from models.archive_training import PLAN
from models.bundle import OUTPUT_NAMES, SHIPPED, read_bundle
from models.examples import Example
from models.fitting import train
from models.network import Hybrid
from models.phantoms import BASE
from models.restore import network_of
from models.spec import MODALITIES

STEPS = 16  # of deletion and insertion: shares of the pixels
PHANTOMS_PER_LABEL = 40
REPEATS = 60


def rows(results: Results, budget_s: float, cases: int) -> list[Row]:
    threads = torch.get_num_threads()
    phantoms = {"what": "pointing game, phantoms", "bundle": read_bundle(SHIPPED).digest[:12]}
    found = [results.row("explanation", phantoms, _pointing)]
    for name in images.SETS:
        settings = {
            "what": "deletion, insertion",
            "set": name,
            "budget_s": budget_s,
            "cases": cases,
            "threads": threads,
        }
        found.append(results.row("explanation", settings, partial(_faithfulness, name, budget_s, cases)))
    cost = {"what": "cost of the map", "bundle": phantoms["bundle"], "threads": 1}
    return [*found, results.row("explanation", cost, _cost)]


def _pointing() -> Row:
    network = network_of(read_bundle(SHIPPED))
    examples = pretraining.every_task(PHANTOMS_PER_LABEL, pretraining.TEST_SEED, BASE)
    return {"cases": len(examples), "on_lesion": pretraining.pointing_accuracy(network, examples)}


def _faithfulness(name: str, budget_s: float, cases: int) -> Row:
    collection = images.collection(name, accuracy.SIZES_PX[name])
    network = accuracy.new("hybrid", collection, 0)
    train(network, collection.training, replace(PLAN, budget_s=budget_s), lambda epoch, loss: None)
    some = collection.validation[:: max(1, len(collection.validation) // cases)]
    row: Row = {"judged": len(some)}
    for method, map_of in (("ours", _own_map), ("grad_cam", grad_cam), ("random", _random_map)):
        scored = [_deletion_insertion(network, example, map_of(network, example)) for example in some]
        row[f"{method}_deletion"], row[f"{method}_insertion"] = (float(value) for value in np.mean(scored, 0))
    return row


def _deletion_insertion(network: Hybrid, example: Example, map_HW: NDArray[np.float32]) -> tuple[float, float]:
    """Mean probability of the label first decided for, while the most important pixels go, and while they come."""
    image_HW = example.slices_SHW[0].astype(np.float32)
    blurred_HW = cv2.GaussianBlur(image_HW, (0, 0), image_HW.shape[0] / 10)
    order_P = np.argsort(-map_HW, axis=None, kind="stable")
    shown_TP = np.zeros((STEPS + 1, order_P.size), bool)
    for t in range(STEPS + 1):
        shown_TP[t, order_P[: order_P.size * t // STEPS]] = True
    shown_THW = shown_TP.reshape(-1, *image_HW.shape)
    deleted_THW = np.where(shown_THW, blurred_HW, image_HW)
    inserted_THW = np.where(shown_THW, image_HW, blurred_HW)
    probability_TK = _probabilities(network, example, np.concatenate([deleted_THW, inserted_THW]))
    decided = int(probability_TK[0].argmax())
    return float(probability_TK[: STEPS + 1, decided].mean()), float(probability_TK[STEPS + 1 :, decided].mean())


def _own_map(network: Hybrid, example: Example) -> NDArray[np.float32]:
    """What speaks for the decided label rather than for the others, as the box shows it."""
    with torch.no_grad():
        logits_BK, map_BSKhw, _weights, _ood = network(*_inputs(example))
    task = slice(example.task.offset, example.task.offset + len(example.task.labels))
    decided = int(logits_BK[0, task].argmax())
    map_Khw = map_BSKhw[0, 0, task].numpy()
    return _at_pixels(map_Khw[decided] - np.delete(map_Khw, decided, 0).mean(0), example)


def grad_cam(network: Hybrid, example: Example) -> NDArray[np.float32]:
    """On the last feature map, the one that our map is made of."""
    kept: list[Tensor] = []

    def keep(_module: object, _inputs: object, output: Tensor) -> None:
        output.retain_grad()
        kept.append(output)

    handle = network.join.register_forward_hook(keep)
    try:
        slices_BSHW, slice_mask_BS, modality_B = _inputs(example)
        seen = network.attended(slices_BSHW, slice_mask_BS, modality_B)
        task = slice(example.task.offset, example.task.offset + len(example.task.labels))
        logits_K = network.head(seen.pooled_BD)[0, task]
        logits_K[int(logits_K.argmax())].backward()
    finally:
        handle.remove()
    features_hwD, gradient_hwD = kept[0][0], kept[0].grad[0]
    map_hw = torch.relu((features_hwD * gradient_hwD.mean((0, 1))).sum(2)).detach().numpy()
    network.zero_grad()
    return _at_pixels(map_hw, example)


def _random_map(network: Hybrid, example: Example) -> NDArray[np.float32]:
    side = example.slices_SHW.shape[-1] // 8
    return _at_pixels(np.random.default_rng(0).random((side, side), np.float32), example)


def _at_pixels(map_hw: NDArray[np.float32], example: Example) -> NDArray[np.float32]:
    height, width = example.slices_SHW.shape[1:]
    return np.asarray(cv2.resize(map_hw.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR))


def _probabilities(network: Hybrid, example: Example, images_THW: NDArray[np.float32]) -> NDArray[np.float64]:
    with torch.no_grad():
        seen = network.attended(
            torch.from_numpy(images_THW[:, None].astype(np.float32)),
            torch.ones(len(images_THW), 1, dtype=torch.bool),
            _inputs(example)[2].expand(len(images_THW)),
        )
        logits_TK = network.head(seen.pooled_BD).numpy()
    task = slice(example.task.offset, example.task.offset + len(example.task.labels))
    return calibration.softmax(logits_TK[:, task])


def _inputs(example: Example) -> tuple[Tensor, Tensor, Tensor]:
    slices_BSHW = torch.from_numpy(example.slices_SHW.astype(np.float32))[None]
    modality = MODALITIES.index(example.task.modality)
    return slices_BSHW, torch.ones(slices_BSHW.shape[:2], dtype=torch.bool), torch.tensor([modality])


def _cost() -> Row:
    """The forward pass with the map beside the one without, in turns."""
    bundle = read_bundle(SHIPPED)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(bundle.onnx, settings, providers=["CPUExecutionProvider"])
    without = [name for name in OUTPUT_NAMES if name != "map_BSKhw"]
    bare = onnxruntime.InferenceSession(_pruned(bundle.onnx, without), settings, providers=["CPUExecutionProvider"])
    spent: dict[str, list[float]] = {"with": [], "without": []}
    for _ in range(REPEATS):
        for name, opened, wanted in (("with", session, None), ("without", bare, None)):
            started = time.perf_counter()
            opened.run(wanted, bundle.known_inputs)
            spent[name].append(time.perf_counter() - started)
    with_s, without_s = (float(np.median(spent[name])) for name in ("with", "without"))
    return {"with_ms": with_s * 1000, "without_ms": without_s * 1000, "share": (with_s - without_s) / with_s}


def _pruned(onnx_bytes: bytes, outputs: list[str]) -> bytes:
    """The graph without the outputs that are not wanted; ONNX Runtime leaves out what they alone needed."""
    import onnx

    graph = onnx.load_from_string(onnx_bytes)
    kept = [output for output in graph.graph.output if output.name in outputs]
    del graph.graph.output[:]
    graph.graph.output.extend(kept)
    return bytes(graph.SerializeToString())
