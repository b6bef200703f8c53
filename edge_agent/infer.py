"""Inference: a volume becomes findings, one probability per label, with the evidence for them.

Reads a bundle file; ONNX Runtime runs its graph on the first provider that passes the known-answer batch.
Never guesses in silence: where the labels are not separable or the image is strange, it abstains and says why.
Source: split conformal prediction, Angelopoulos & Bates 2021, section 1. Axes: B batch, S slice, K label, h w map.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state

from edge_agent.decode import NotForUsError
from edge_agent.findings import Findings, LabelProbability
from edge_agent.providers import (
    CUDA,
    TENSORRT,
    GraphShapes,
    ProviderError,
    cache_key,
    chain,
    first_passing,
    gpu_identity,
    options,
    parted,
    runs,
)
from fleet_link.errors import SiteError
from models.adaptive import Calibration, bundled
from models.bundle import FP32, Arrays, Bundle, check_known_answer, read_bundle
from models.calibration import softmax
from models.errors import BundleError, VolumeError
from models.preprocess import Prepared, Volume, prepare
from models.runtime import RUNTIME_ERRORS
from models.spec import MODALITIES, Manifest, TaskSpec

__all__ = ["Findings", "LabelProbability", "NotForUsError", "Reader"]

log = logging.getLogger(__name__)

Precision = Literal["auto", "fp32"]  # auto: the bundle's graph for the provider

_BAD_GRAPH = (
    onnxruntime_pybind11_state.InvalidGraph,
    onnxruntime_pybind11_state.InvalidProtobuf,
    onnxruntime_pybind11_state.NotImplemented,
)


class Reader:
    """One bundle, ready to read volumes, one at a time. A provider that fails while it reads is left for the next."""

    def __init__(self, bundle: Bundle, providers: Sequence[str], attempt: Callable[[str], Any]) -> None:
        """`providers` are runs (`providers.runs`); `attempt` opens and tries one, as `first_passing` wants it."""
        self.bundle = bundle
        self.trouble = ""  # for the operator, where a provider failed while it read and another took over
        self._providers = tuple(providers)
        self._attempt = attempt
        self._one_run = threading.Lock()  # the pipeline reads, and the installer compares a new release with this one
        self.provider, self._session = first_passing(self._providers, attempt)

    @classmethod
    def open(
        cls, bundle_path: Path, providers: Sequence[str], threads: int, cache_dir: Path, precision: Precision = "auto"
    ) -> "Reader":
        """Open the bundle on the first of `providers` that computes its known answers, in int8 or fp16 where it may.

        Raises BundleError for a bad file, graph or known answer, SiteError when no provider runs it for another reason.
        """
        bundle = read_bundle(bundle_path)
        variants = bundle.manifest.variants if precision == "auto" else ()
        return cls(bundle, runs(providers, variants), partial(_open_session, bundle, threads, cache_dir))

    def read(self, volume: Volume, calibrate: Callable[[TaskSpec], Calibration] = bundled) -> Findings:
        """Run the network once; `calibrate` says by what its task is judged.

        Raises NotForUsError for a modality without a task, SiteError for a volume that cannot be read.
        """
        manifest = self.bundle.manifest
        task, spec = manifest.task_for(volume.modality), manifest.input_for(volume.modality)
        if task is None or spec is None:
            raise NotForUsError(f"the bundle reads no {volume.modality}", advice="no action; the series is kept unread")
        try:
            prepared = prepare(volume, spec)
        except VolumeError as error:
            raise SiteError(str(error), advice=error.advice) from error
        provider, outputs = self._compute(_inputs(prepared, volume.modality))
        findings = judge(manifest, task, prepared, outputs, calibrate(task))
        return replace(findings, bundle_digest=self.bundle.digest, provider=provider, read_at=time.time())

    def _compute(self, inputs: Arrays) -> tuple[str, Arrays]:
        """Which provider ran, and what it gave. Raises ProviderError when none does."""
        with self._one_run:
            if self._session is None:  # no provider was left for the series before: it may be over
                self._open_first(self._providers)
                self.trouble = ""
            while True:
                try:
                    return self.provider, self._outputs(inputs)
                except ProviderError as error:
                    failure = str(error)
                self._fall_back(failure)  # out here nothing holds the session any more: its GPU memory is free

    def _outputs(self, inputs: Arrays) -> Arrays:
        outputs = _run(self._session, inputs)
        is_variant = parted(self.provider)[1] != FP32
        if is_variant and not all(np.isfinite(array).all() for array in outputs.values()):
            raise ProviderError(
                "its outputs are not finite", advice="fp32 reads on; report it with the bundle's digest"
            )
        return outputs

    def _fall_back(self, failure: str) -> None:
        failed = self.provider
        self._session = None
        rest = self._providers[self._providers.index(failed) + 1 :]
        if not rest:
            raise ProviderError(failure, advice="see the log; another series may be read")
        self._open_first(rest)
        self.trouble = f"{failed} failed while reading; {self.provider} reads since: restart edge-agent to try it again"
        log.error("%s (%s)", self.trouble, failure)

    def _open_first(self, providers: Sequence[str]) -> None:
        try:
            self.provider, self._session = first_passing(providers, self._attempt)
        except BundleError as error:  # it passed when this Reader was made: the machine is ill, not the bundle
            raise ProviderError(str(error), advice=error.advice) from error


def judge(manifest: Manifest, task: TaskSpec, prepared: Prepared, outputs: Arrays, by: Calibration) -> Findings:
    """Turn the graph's outputs for one series into findings; bundle digest, provider and time are the caller's.

    Raises SiteError where they are no numbers (an overflow in half precision).
    """
    logits_K = outputs["logits_BK"][0, task.offset : task.offset + len(task.labels)].astype(np.float64)
    ood = float(outputs["ood_B"][0])
    if not np.isfinite([*logits_K, ood]).all():
        raise SiteError(
            "the network's outputs for it are not finite", advice="see which provider computed it: `edge-agent doctor`"
        )
    probabilities_K = softmax(logits_K, by.temperature)
    labels = tuple(
        LabelProbability(label.name, label.code, float(p), label.is_finding)
        for label, p in zip(task.labels, probabilities_K, strict=True)
    )
    prediction_set = tuple(label.name for label in labels if label.probability >= by.threshold)
    reason = abstain_reason(prediction_set, ood, manifest.ood_threshold)
    shown = max(range(len(labels)), key=lambda k: (labels[k].is_finding, labels[k].probability))
    return Findings(
        task=task.name,
        modality=task.modality,
        labels=labels,
        predicted=max(labels, key=lambda label: label.probability).name,
        prediction_set=prediction_set,
        abstained=bool(reason),
        abstain_reason=reason,
        ood=ood,
        map_label=labels[shown].name,
        bundle_digest="",
        bundle_name=manifest.name,
        bundle_version=manifest.version,
        provider="",
        read_at=0.0,
        map_SHW=_evidence(outputs["map_BSKhw"][0], task, shown, prepared) * np.float32(labels[shown].probability),
        slice_weights_S=outputs["slice_weights_BS"][0].astype(np.float32),
        source_index_S=prepared.source_index_S,
        calibration=by,
    )


def abstain_reason(prediction_set: Sequence[str], ood: float, ood_threshold: float) -> str:
    """Empty where exactly one label is plausible and the image is like those of the training."""
    if ood > ood_threshold:
        return f"the image is unlike the training images (distance {ood:.1f}, limit {ood_threshold:.1f})"
    if len(prediction_set) > 1:
        return f"more than one label is plausible: {', '.join(prediction_set)}"
    return "" if prediction_set else "no label is plausible enough"


def _evidence(map_SKhw: NDArray[Any], task: TaskSpec, shown: int, prepared: Prepared) -> NDArray[np.float32]:
    """What speaks for one label rather than the task's others, 0..1, over each source slice.

    A softmax does not change when all logits rise together, so only the difference to the other labels is evidence.
    """
    task_SKhw = map_SKhw[:, task.offset : task.offset + len(task.labels)].astype(np.float32)
    others_Shw = np.delete(task_SKhw, shown, axis=1).mean(axis=1)
    positive_Shw = np.maximum(task_SKhw[:, shown] - others_Shw, 0.0)
    positive_Shw /= max(float(positive_Shw.max()), 1e-6)
    box = prepared.letterbox
    inside = replace(box, source_YX=(box.height, box.width))  # the image's own area, not its padding
    return np.stack([inside.map_to_source(map_hw) for map_hw in positive_Shw])


def _inputs(prepared: Prepared, modality: str) -> Arrays:
    slices_BSHW = prepared.slices_SHW[np.newaxis].astype(np.float32)
    return {
        "slices_BSHW": slices_BSHW,
        "slice_mask_BS": np.ones(slices_BSHW.shape[:2], np.bool_),
        "modality_B": np.array([MODALITIES.index(modality)], np.int64),
    }


def _run(session: Any, inputs: Arrays) -> Arrays:
    try:
        values = session.run(None, inputs)
    except RUNTIME_ERRORS as error:
        raise ProviderError(
            f"the graph does not run: {error}", advice="see the log; another provider may run it"
        ) from error
    return dict(zip((output.name for output in session.get_outputs()), values, strict=True))


def _open_session(bundle: Bundle, threads: int, cache_dir: Path, run: str) -> Any:
    """Open and try one run. Raises ProviderError where it is not there, BundleError where it computes wrongly."""
    provider, precision = parted(run)
    if provider not in onnxruntime.get_available_providers():
        raise ProviderError("not in the installed ONNX Runtime", advice="install the `gpu` extra instead of `cpu`")
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")  # idle threads leave the cores to the SCP
    try:
        session = onnxruntime.InferenceSession(
            bundle.graph(precision), settings, providers=_provider_options(bundle, run, cache_dir)
        )
    except _BAD_GRAPH as error:
        raise BundleError(
            f"its graph is not taken: {error}", advice="the bundle is damaged or made for another version"
        ) from error
    except RUNTIME_ERRORS as error:
        raise ProviderError(
            f"does not start: {error}", advice="see the log; `edge-agent doctor` checks GPU and driver"
        ) from error
    if session.get_providers()[0] != provider:  # ONNX Runtime falls back by itself where a library is missing
        raise ProviderError("its libraries cannot be loaded", advice="`edge-agent doctor` checks GPU and driver")
    session.disable_fallback()  # ONNX Runtime would go on with the CPU in silence, and the result would name the GPU
    check_known_answer(partial(_run, session), bundle, precision)
    return session


def _provider_options(bundle: Bundle, run: str, cache_dir: Path) -> list[tuple[str, dict[str, str]]]:
    """Also makes TensorRT's folder and loads the CUDA libraries that came as Python packages."""
    provider, precision = parted(run)
    folder = cache_dir
    if provider in (TENSORRT, CUDA):
        onnxruntime.preload_dlls()
    if provider == TENSORRT:
        folder = cache_dir / cache_key(bundle.digest, gpu_identity())
        folder.mkdir(parents=True, exist_ok=True)
    shapes = _shapes(bundle)
    return [(name, options(name, precision=precision, cache_folder=folder, shapes=shapes)) for name in chain(provider)]


def _shapes(bundle: Bundle) -> GraphShapes:
    known_B, known_S = bundle.known_inputs["slice_mask_BS"].shape
    sizes = [spec.size for spec in bundle.manifest.inputs]
    return GraphShapes(
        batch=known_B,
        slices=max(known_S, *(spec.max_slices for spec in bundle.manifest.inputs)),
        smallest=min(sizes),
        largest=max(sizes),
    )
