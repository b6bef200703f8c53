"""Execution providers of ONNX Runtime: in which order they are tried, with which options, where TensorRT keeps its engines.

Reads nothing; `gpu_identity` asks nvidia-smi once.
Never opens a session itself.
Source: ONNX Runtime documentation, "TensorRT Execution Provider" and "CUDA Execution Provider", provider options.
"""

import hashlib
import logging
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TypeVar

from fleet_link.errors import SiteError
from models.bundle import FP32
from models.errors import BundleError
from models.spec import Variant

log = logging.getLogger(__name__)

TENSORRT = "TensorrtExecutionProvider"
CUDA = "CUDAExecutionProvider"
CPU = "CPUExecutionProvider"

_TENSORRT_WORKSPACE_BYTES = 2 << 30
_NVIDIA_SMI = ("nvidia-smi", "--query-gpu=name,driver_version,compute_cap", "--format=csv,noheader", "--id=0")

Session = TypeVar("Session")


class ProviderError(SiteError):
    """A provider that is not there, does not start or fails while it runs."""


@dataclass(frozen=True)
class GraphShapes:
    """Bounds of the graph's dynamic axes: TensorRT builds one engine for all of them."""

    batch: int
    slices: int
    smallest: int  # side of the square input, px
    largest: int


def runs(providers: Sequence[str], variants: Sequence[Variant]) -> tuple[str, ...]:
    """What to try, in order: on each provider the graph made for it ("CPUExecutionProvider int8"), then fp32 (its name)."""
    return tuple(
        run
        for provider in providers
        for run in (*(f"{provider} {v.precision}" for v in variants if provider in v.providers), provider)
    )


def parted(run: str) -> tuple[str, str]:
    """Provider and precision of a run."""
    provider, _, precision = run.partition(" ")
    return provider, precision or FP32


def first_passing(providers: Sequence[str], attempt: Callable[[str], Session]) -> tuple[str, Session]:
    """The first provider whose `attempt` neither fails nor gives a wrong known answer.

    Raises with every provider's reason if none passes: BundleError when the last, which runs everywhere, computes
    wrongly, else SiteError.
    """
    reasons = []
    bundle_is_bad = False
    for provider in providers:
        try:
            session = attempt(provider)
        except (ProviderError, BundleError) as error:
            log.info("%s is not used: %s", provider, error)
            reasons.append(f"{provider}: {error}")
            bundle_is_bad = isinstance(error, BundleError)
        else:
            log.info("%s passes the known-answer batch", provider)
            return provider, session
    raise (BundleError if bundle_is_bad else SiteError)(
        "no execution provider can run this bundle: " + "; ".join(reasons),
        advice="add CPUExecutionProvider to inference.providers; if it is there, the bundle is not fit for this software",
    )


def chain(provider: str) -> tuple[str, ...]:
    """What one session is given: operators that TensorRT does not take run on the same GPU."""
    return (TENSORRT, CUDA) if provider == TENSORRT else (provider,)


def options(provider: str, *, precision: str = FP32, cache_folder: Path, shapes: GraphShapes) -> dict[str, str]:
    """Provider options as ONNX Runtime takes them."""
    if provider == TENSORRT:
        return {
            "device_id": "0",
            "trt_max_workspace_size": str(_TENSORRT_WORKSPACE_BYTES),
            "trt_fp16_enable": "1" if precision == "fp16" else "0",
            "trt_engine_cache_enable": "1",
            "trt_engine_cache_path": str(cache_folder),
            "trt_timing_cache_enable": "1",
            "trt_timing_cache_path": str(cache_folder),
            "trt_profile_min_shapes": _profile(1, 1, shapes.smallest),
            "trt_profile_opt_shapes": _profile(1, shapes.slices, shapes.largest),
            "trt_profile_max_shapes": _profile(shapes.batch, shapes.slices, shapes.largest),
        }
    if provider == CUDA:
        return {"device_id": "0", "cudnn_conv_algo_search": "HEURISTIC", "use_tf32": "0"}
    return {}


def cache_key(bundle_digest: str, device: str) -> str:
    """Folder name of an engine: it is valid for one bundle on one GPU, driver and runtime."""
    return f"{bundle_digest[:16]}-{hashlib.sha256(device.encode()).hexdigest()[:16]}"


def gpu_identity() -> str:
    """Name, compute capability and driver of GPU 0, with the versions of TensorRT and ONNX Runtime.

    Raises ProviderError where no NVIDIA driver answers.
    """
    try:
        answer = subprocess.run(_NVIDIA_SMI, capture_output=True, text=True, timeout=20.0, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        raise ProviderError("no NVIDIA driver answers", advice="install the driver, or leave it to the CPU") from error
    return "|".join((answer, *(_version(name) for name in ("tensorrt", "onnxruntime-gpu", "onnxruntime"))))


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def _profile(batch: int, slices: int, size: int) -> str:
    return f"slices_BSHW:{batch}x{slices}x{size}x{size},slice_mask_BS:{batch}x{slices},modality_B:{batch}"
