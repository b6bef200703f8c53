"""Inference: a volume becomes findings, one probability per label, with the evidence for them.

Reads a bundle file; ONNX Runtime runs its graph on the first provider that passes the known-answer batch.
Never guesses in silence: where the labels are not separable or the image is strange, it abstains and says why.
Source: split conformal prediction, Angelopoulos & Bates 2021, section 1. Axes: B batch, S slice, K label, h w map.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

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
)
from fleet_link.errors import SiteError
from models.bundle import Arrays, Bundle, check_known_answer, read_bundle
from models.calibration import softmax
from models.errors import VolumeError
from models.preprocess import Prepared, Volume, prepare
from models.spec import MODALITIES, Manifest, TaskSpec

__all__ = ["Findings", "LabelProbability", "NotForUsError", "Reader"]

_RUNTIME_ERRORS: tuple[type[Exception], ...] = (
    RuntimeError,
    ValueError,
    *(
        kind
        for kind in vars(onnxruntime_pybind11_state).values()
        if isinstance(kind, type) and issubclass(kind, Exception)
    ),
)


class Reader:
    """One bundle, ready to read volumes. Owned by one thread."""

    def __init__(self, bundle: Bundle, session: Any, provider: str) -> None:
        self.bundle = bundle
        self.provider = provider
        self._session = session

    @classmethod
    def open(cls, bundle_path: Path, providers: Sequence[str], threads: int, cache_dir: Path) -> "Reader":
        """Open the bundle on the first of `providers` that computes its known answers.

        Raises BundleError for a bad file, SiteError when no provider passes.
        """
        bundle = read_bundle(bundle_path)
        provider, session = first_passing(providers, partial(_open_session, bundle, threads, cache_dir))
        return cls(bundle, session, provider)

    def read(self, volume: Volume) -> Findings:
        """Run the network once.

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
        outputs = _run(self._session, _inputs(prepared, volume.modality))
        findings = judge(manifest, task, prepared, outputs)
        return replace(findings, bundle_digest=self.bundle.digest, provider=self.provider, read_at=time.time())


def judge(manifest: Manifest, task: TaskSpec, prepared: Prepared, outputs: Arrays) -> Findings:
    """Turn the graph's outputs for one series into findings; bundle digest, provider and time are the caller's."""
    logits_K = outputs["logits_BK"][0, task.offset : task.offset + len(task.labels)].astype(np.float64)
    probabilities_K = softmax(logits_K, task.temperature)
    labels = tuple(
        LabelProbability(label.name, label.code, float(p), label.is_finding)
        for label, p in zip(task.labels, probabilities_K, strict=True)
    )
    prediction_set = tuple(label.name for label in labels if label.probability >= task.conformal_threshold)
    ood = float(outputs["ood_B"][0])
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
    except _RUNTIME_ERRORS as error:
        raise ProviderError(
            f"the graph does not run: {error}", advice="see the log; another provider may run it"
        ) from error
    return dict(zip((output.name for output in session.get_outputs()), values, strict=True))


def _open_session(bundle: Bundle, threads: int, cache_dir: Path, provider: str) -> Any:
    """Open and try one provider. Raises ProviderError where it is not there, BundleError where it computes wrongly."""
    if provider not in onnxruntime.get_available_providers():
        raise ProviderError("not in the installed ONNX Runtime", advice="install the `gpu` extra instead of `cpu`")
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")  # idle threads leave the cores to the SCP
    try:
        session = onnxruntime.InferenceSession(
            bundle.onnx, settings, providers=_provider_options(bundle, provider, cache_dir)
        )
    except _RUNTIME_ERRORS as error:
        raise ProviderError(
            f"does not start: {error}", advice="see the log; `edge-agent doctor` checks GPU and driver"
        ) from error
    if session.get_providers()[0] != provider:  # ONNX Runtime falls back by itself where a library is missing
        raise ProviderError("its libraries cannot be loaded", advice="`edge-agent doctor` checks GPU and driver")
    check_known_answer(partial(_run, session), bundle)
    return session


def _provider_options(bundle: Bundle, provider: str, cache_dir: Path) -> list[tuple[str, dict[str, str]]]:
    """Also makes TensorRT's folder and loads the CUDA libraries that came as Python packages."""
    folder = cache_dir
    if provider in (TENSORRT, CUDA):
        onnxruntime.preload_dlls()
    if provider == TENSORRT:
        folder = cache_dir / cache_key(bundle.digest, gpu_identity())
        folder.mkdir(parents=True, exist_ok=True)
    return [(name, options(name, cache_folder=folder, shapes=_shapes(bundle))) for name in chain(provider)]


def _shapes(bundle: Bundle) -> GraphShapes:
    known_B, known_S = bundle.known_inputs["slice_mask_BS"].shape
    sizes = [spec.size for spec in bundle.manifest.inputs]
    return GraphShapes(
        batch=known_B,
        slices=max(known_S, *(spec.max_slices for spec in bundle.manifest.inputs)),
        smallest=min(sizes),
        largest=max(sizes),
    )
