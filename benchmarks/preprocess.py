"""From a DICOM file to the network's tensor, beside what pydicom and numpy alone take for the same tensor.

Makes a CT slice of 512² and a radiograph of 3000², each in several transfer syntaxes; reads them by turns in one thread.
Never compares across runs, and not at all where the two tensors differ.
"""

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from math import ceil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import (
    DigitalXRayImageStorageForPresentation,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)
from rich.table import Table

from benchmarks.processes import HouseError
from edge_agent.decode import hush_pydicom, to_volume
from models.phantom_dicom import SeriesOptions, image
from models.phantoms import phantom
from models.preprocess import prepare
from models.spec import InputSpec
from models.tasks import INPUTS

TOLERANCE = 1e-4  # of values from -1 to 1: sums of float32 in another order
SYNTAXES = (None, RLELossless, JPEGLosslessSV1, JPEGLSLossless, JPEG2000Lossless)  # None: as written, not compressed
Tensor = NDArray[np.float32]


@dataclass(frozen=True)
class Case:
    name: str
    path: Path
    spec: InputSpec


def measure(*, quick: bool) -> dict[str, Any]:
    """Median and 95th percentile over the repetitions; within each, every file both ways, by turns first."""
    hush_pydicom()
    repetitions = 5 if quick else 21
    folder, threads = Path(tempfile.mkdtemp(prefix="wardround-bench-")), cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        cases = [case for draw in (ct_slice, radiograph) for case in _encodings(draw, folder)]
        differences = [difference(case) for case in cases]
        times_ms: dict[str, list[tuple[float, float, float]]] = {case.name: [] for case in cases}
        for repetition in range(repetitions):
            for case in cases:
                times_ms[case.name].append(_times_ms(case, ours_first=repetition % 2 == 0))
        return {
            "repetitions": repetitions,
            "cores": os.cpu_count(),
            "load_average": os.getloadavg()[0],
            "images": [
                {"image": case.name, "bytes": case.path.stat().st_size, "largest_difference": apart}
                | _summary(np.array(times_ms[case.name]))
                for case, apart in zip(cases, differences, strict=True)
            ],
        }
    finally:
        cv2.setNumThreads(threads)
        shutil.rmtree(folder, ignore_errors=True)


def table(result: dict[str, Any]) -> Table:
    shown = Table(
        title=f"File to tensor, one thread, {result['repetitions']} repetitions by turns, ms "
        f"({result['cores']} cores, load {result['load_average']:.1f})"
    )
    for column in (
        "image",
        "ours, median",
        "p95",
        "of it decoding",
        "pydicom + numpy, median",
        "p95",
        "ours is × as fast",
    ):
        shown.add_column(column, justify="left" if column == "image" else "right")
    for row in result["images"]:
        shown.add_row(
            row["image"],
            *(f"{row[key]:.1f}" for key in ("ours_ms", "ours_p95_ms")),
            f"{row['decode_share']:.0%}",
            *(f"{row[key]:.1f}" for key in ("plain_ms", "plain_p95_ms")),
            f"{row['plain_ms'] / row['ours_ms']:.2f}",
        )
    return shown


def ours(path: Path, spec: InputSpec) -> Tensor:
    return prepare(to_volume([path]).volume, spec).slices_SHW


def plainly(path: Path, spec: InputSpec) -> Tensor:
    """The same with pydicom and numpy alone, written to be fast: float32, in place, rows averaged before columns."""
    ds = dcmread(path)
    image_YX = ds.pixel_array.astype(np.float32)
    if ds.PhotometricInterpretation == "MONOCHROME1":
        np.subtract(np.float32((1 << ds.BitsStored) - 1), image_YX, out=image_YX)
    slope, intercept = float(ds.get("RescaleSlope", 1)), float(ds.get("RescaleIntercept", 0))
    if (slope, intercept) != (1.0, 0.0):
        image_YX *= np.float32(slope)
        image_YX += np.float32(intercept)
    row_mm, column_mm = (float(mm) for mm in ds.get("PixelSpacing") or ds.ImagerPixelSpacing)
    size_mm = ds.Rows * row_mm, ds.Columns * column_mm
    height, width = (round(mm * spec.size / max(size_mm)) for mm in size_mm)
    inside_HW = area_means(area_means(image_YX, height).T, width).T
    low, high = spec.window_center - spec.window_width / 2, spec.window_center + spec.window_width / 2
    if spec.normalisation == "percentile":
        low, high = np.percentile(inside_HW, (0.5, 99.5))
    tensor_SHW = np.full((1, spec.size, spec.size), -1.0, np.float32)
    top, left = (spec.size - height) // 2, (spec.size - width) // 2
    tensor_SHW[0, top : top + height, left : left + width] = np.clip(
        (inside_HW - low) * (2.0 / (high - low)) - 1.0, -1.0, 1.0
    )
    return tensor_SHW


def area_means(image_YX: Tensor, height: int) -> Tensor:
    """Means over `height` equal bands of rows; a row that two bands share counts by its parts."""
    means_HX = np.empty((height, image_YX.shape[1]), np.float32)
    for row, (begin, end) in enumerate(pairwise(np.linspace(0, len(image_YX), height + 1))):
        first, last = int(begin), min(ceil(end), len(image_YX))
        too_much = image_YX[first] * np.float32(begin - first) + image_YX[last - 1] * np.float32(last - end)
        means_HX[row] = (image_YX[first:last].sum(axis=0) - too_much) / np.float32(end - begin)
    return means_HX


def difference(case: Case) -> float:
    """Largest difference of the two tensors. Raises HouseError above TOLERANCE."""
    apart = float(np.abs(ours(case.path, case.spec) - plainly(case.path, case.spec)).max())
    if not apart <= TOLERANCE:
        raise HouseError(f"{case.name}: the two tensors differ by {apart:.2g}: there is nothing to compare")
    return apart


def ct_slice() -> tuple[str, Dataset]:
    """512², 16 bits signed, Hounsfield units through the rescale intercept."""
    ds = image(phantom("CT", "normal", 1, size=512), 3, SeriesOptions(patient_seed=1))
    stored_YX = np.frombuffer(ds.PixelData, "<u2").astype("<i2") - np.int16(24)
    ds.PixelRepresentation, ds.BitsStored, ds.HighBit = 1, 16, 15
    ds.RescaleIntercept = "-1000"
    ds.PixelData = stored_YX.tobytes()
    return "CT 512²", ds


def radiograph() -> tuple[str, Dataset]:
    """3000², 14 of 16 bits, MONOCHROME1 with a VOI window, as a detector sends it."""
    ds = image(phantom("XR", "normal", 1, size=3000), 0, SeriesOptions(patient_seed=1))
    stored_YX = np.frombuffer(ds.PixelData, "<u2") * np.uint16(4)
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = DigitalXRayImageStorageForPresentation
    ds.Modality, ds.PhotometricInterpretation = "DX", "MONOCHROME1"
    ds.BitsStored, ds.HighBit = 14, 13
    ds.WindowCenter, ds.WindowWidth = "8192", "16384"
    ds.PixelData = (np.uint16((1 << 14) - 1) - stored_YX).tobytes()
    return "DX 3000²", ds


def _encodings(draw: Callable[[], tuple[str, Dataset]], folder: Path) -> list[Case]:
    name, ds = draw()
    spec = next(spec for spec in INPUTS if spec.modality == ("CT" if ds.Modality == "CT" else "XR"))
    native = folder / f"{ds.Modality}.dcm"
    ds.save_as(native, enforce_file_format=True)
    cases = []
    for syntax in SYNTAXES:
        path = native if syntax is None else folder / f"{ds.Modality}-{syntax.keyword}.dcm"
        if syntax == JPEGLosslessSV1:
            subprocess.run(["dcmcjpeg", "+e1", native, path], check=True, capture_output=True)
        elif syntax is not None:
            encoded = dcmread(native)
            encoded.compress(
                syntax, encoding_plugin="gdcm" if syntax == RLELossless else "", generate_instance_uid=False
            )
            encoded.save_as(path)
        cases.append(Case(f"{name}, {syntax.keyword if syntax else 'not compressed'}", path, spec))
    return cases


def _times_ms(case: Case, *, ours_first: bool) -> tuple[float, float, float]:
    """Of our decoding, our preparing, and the other way as a whole."""
    other_ms = 0.0 if ours_first else _plain_ms(case)
    begin = time.perf_counter()
    volume = to_volume([case.path]).volume
    decoded = time.perf_counter()
    prepare(volume, case.spec)
    end = time.perf_counter()
    return (decoded - begin) * 1e3, (end - decoded) * 1e3, other_ms or _plain_ms(case)


def _plain_ms(case: Case) -> float:
    begin = time.perf_counter()
    plainly(case.path, case.spec)
    return (time.perf_counter() - begin) * 1e3


def _summary(times_ms_R3: NDArray[np.float64]) -> dict[str, float]:
    decode_ms, prepare_ms, plain_ms = times_ms_R3.T
    ours_ms = decode_ms + prepare_ms
    return {
        "ours_ms": float(np.median(ours_ms)),
        "ours_p95_ms": float(np.percentile(ours_ms, 95)),
        "decode_ms": float(np.median(decode_ms)),
        "prepare_ms": float(np.median(prepare_ms)),
        "decode_share": float(np.median(decode_ms / ours_ms)),
        "plain_ms": float(np.median(plain_ms)),
        "plain_p95_ms": float(np.percentile(plain_ms, 95)),
    }
