"""The addable delta codec of masked rounds beside the two codecs of open rounds: time, bytes, error of the mean.

Draws deltas whose tensors differ in scale as a network's do; encodes one of eight boxes', decodes the sum of all eight.
Never compares across runs. The error is of the mean of eight, over the norm of the true one, at the coordinates sent.
"""

import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from models import addable, delta
from models.addable import Layout
from models.drawn import Drawn
from models.drawn_delta import DrawnCodec

BOXES = 8
CLIP_NORM = 1.0
SIZES = (1_000_000, 5_000_000)
BITS = (4, 8, 12, 16)
SHARES = (1.0, 1 / 16)
DRAWN_BITS = (2, 3, 4, 8)
COMMON = 0.7  # part of each delta that all boxes have in common: boxes learn alike, not the same
Arrays = dict[str, NDArray[np.float32]]
Shapes = dict[str, tuple[int, ...]]


def measure(*, quick: bool) -> dict[str, Any]:
    """Median over the repetitions of one box's encoding and of decoding: the sum, or in an open round one box of the eight."""
    repetitions = 3 if quick else 11
    rows = []
    for size in SIZES:
        shapes = network(size)
        deltas = [box(shapes, index) for index in range(BOXES)]
        rows.append(
            {"size": size, "codec": "int8 of open rounds (decode: one box)"} | _int8(shapes, deltas, repetitions)
        )
        for bits in DRAWN_BITS:
            codec = DrawnCodec(Drawn(shapes, b"benchmark", SHARES[-1]), bits, CLIP_NORM * BOXES)
            name = f"drawn, {bits} bits, share 1/{round(1 / SHARES[-1])} (decode: one box)"
            rows.append({"size": size, "codec": name} | _drawn(codec, deltas, repetitions))
        for share in SHARES:
            for bits in BITS:
                word_bits = 16 if bits <= addable.value_bits_for(16, BOXES) else 32
                layout = Layout(shapes, b"benchmark", CLIP_NORM, BOXES, word_bits, bits, share)
                name = f"addable, {bits} bits in {word_bits}, share 1/{round(1 / share)}"
                rows.append({"size": size, "codec": name} | _addable(layout, deltas, repetitions))
    return {
        "repetitions": repetitions,
        "boxes": BOXES,
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "rows": rows,
    }


def table(result: dict[str, Any]) -> Table:
    shown = Table(
        title=f"Delta codecs, one box's update and the mean of {result['boxes']}, {result['repetitions']} repetitions "
        f"({result['cores']} cores, load {result['load_average']:.1f})"
    )
    for column in ("parameters", "codec", "encode, ms", "with memory, ms", "decode, ms", "KiB a box", "error", "bound"):
        shown.add_column(column, justify="left" if column == "codec" else "right")
    for row in result["rows"]:
        shown.add_row(
            f"{row['size'] / 1e6:.0f} M",
            row["codec"],
            f"{row['encode_ms']:.0f}",
            "" if row["encode_memory_ms"] is None else f"{row['encode_memory_ms']:.0f}",
            f"{row['decode_ms']:.0f}",
            f"{row['bytes'] / 1024:.0f}",
            f"{row['relative_error']:.2e}",
            "" if row["relative_bound"] is None else f"{row['relative_bound']:.2e}",
        )
    return shown


def network(size: int) -> Shapes:
    """Tensors of `size` parameters in all: widening layers with biases and norms, then a head."""
    shapes: Shapes = {"head.weight": (14, 512), "head.bias": (14,)}
    left = size - 14 * 513
    layer = 0
    while left > 0:
        width = 64 << min(layer // 4, 3)
        rows = min(width * 9, max(1, (left - 2 * width) // width))
        if left < 3 * width:
            shapes[f"stage.{layer}.bias"] = (left,)
            break
        shapes |= {f"stage.{layer}.weight": (rows, width), f"stage.{layer}.norm.bias": (width,)}
        left -= (rows + 1) * width
        layer += 1
    return shapes


def box(shapes: Shapes, index: int) -> Arrays:
    """One box's delta at the clip norm; a tensor's scale falls with the root of its rows and varies a hundredfold."""
    drawn: Arrays = {}
    shared, own = np.random.default_rng(0), np.random.default_rng(index + 1)
    for name, shape in shapes.items():
        scale = 10.0 ** shared.uniform(-1, 1) / np.sqrt(shape[0])
        alike = shared.standard_t(5, shape)
        drawn[name] = (scale * (COMMON * alike + (1 - COMMON) * own.standard_t(5, shape))).astype(np.float32)
    factor = np.float32(CLIP_NORM / delta.norm(drawn))
    return {name: value * factor for name, value in drawn.items()}


def _addable(layout: Layout, deltas: list[Arrays], repetitions: int) -> dict[str, Any]:
    generator = np.random.default_rng(0)
    memory = np.zeros(layout.size, np.float32)
    total = np.zeros(layout.word_count, layout.word_type)
    for one in deltas:
        total += addable.encode(one, layout, 1.0, generator)[0]
    sent = addable.decode_sum(total, layout)
    return {
        "encode_ms": _median_ms(lambda: addable.encode(deltas[0], layout, 1.0, generator), repetitions),
        "encode_memory_ms": _median_ms(lambda: addable.encode(deltas[0], layout, 1.0, generator, memory), repetitions),
        "decode_ms": _median_ms(lambda: addable.decode_sum(total, layout), repetitions),
        "bytes": total.nbytes,
        "relative_error": _relative_error(sent, deltas),
        "relative_bound": addable.error_bound(layout, BOXES) / delta.norm(_mean(deltas)) if layout.share == 1 else None,
    }


def _int8(shapes: Shapes, deltas: list[Arrays], repetitions: int) -> dict[str, Any]:
    payloads = [delta.encode(one, index) for index, one in enumerate(deltas)]
    return {
        "encode_ms": _median_ms(lambda: delta.encode(deltas[0], 0), repetitions),
        "encode_memory_ms": None,
        "decode_ms": _median_ms(lambda: delta.decode(payloads[0], shapes), repetitions),
        "bytes": len(payloads[0]),
        "relative_error": _relative_error(_mean([delta.decode(payload, shapes) for payload in payloads]), deltas),
        "relative_bound": None,
    }


def _drawn(codec: DrawnCodec, deltas: list[Arrays], repetitions: int) -> dict[str, Any]:
    """Of the drawn coordinates of the same deltas."""
    masks = codec.drawn.masks()
    cut = [{name: np.where(masks[name], value, np.float32(0)) for name, value in one.items()} for one in deltas]
    payloads = [codec.encode(one, index) for index, one in enumerate(cut)]
    mean = _mean([codec.decode(payload) for payload in payloads])
    return {
        "encode_ms": _median_ms(lambda: codec.encode(cut[0], 0), repetitions),
        "encode_memory_ms": None,
        "decode_ms": _median_ms(lambda: codec.decode(payloads[0]), repetitions),
        "bytes": len(payloads[0]),
        "relative_error": delta.norm({name: mean[name] - value for name, value in _mean(cut).items()})
        / delta.norm(_mean(cut)),
        "relative_bound": None,
    }


def _mean(deltas: list[Arrays]) -> Arrays:
    return {name: np.mean([one[name] for one in deltas], axis=0) for name in deltas[0]}


def _relative_error(decoded: Arrays, deltas: list[Arrays]) -> float:
    """Over the coordinates that were sent: those that did not come are exactly zero."""
    wanted = {name: np.where(decoded[name] != 0, value, 0) for name, value in _mean(deltas).items()}
    return delta.norm({name: decoded[name] - wanted[name] for name in wanted}) / delta.norm(wanted)


def _median_ms(call: Callable[[], object], repetitions: int) -> float:
    times_ms = []
    for _ in range(repetitions):
        begin = time.perf_counter()
        call()
        times_ms.append((time.perf_counter() - begin) * 1e3)
    return float(np.median(times_ms))
