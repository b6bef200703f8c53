"""Findings: what the network says of one series, and how that is kept between two steps.

Reads and writes a results row's JSON and the npz beside it.
Never holds patient data or pixels of the image.
Source: ARCHITECTURE.md, "A study becomes a diagnosis".
"""

import io
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from fleet_link.files import write_durably
from models.adaptive import Calibration
from models.spec import Code

_ARRAYS = ("map_SHW", "slice_weights_S", "source_index_S")


@dataclass(frozen=True)
class LabelProbability:
    name: str
    code: Code
    probability: float
    is_finding: bool  # False for "normal"


@dataclass(frozen=True)
class Findings:
    task: str
    modality: str  # XR | CT | MR
    labels: tuple[LabelProbability, ...]
    predicted: str  # the most likely label, also where the reader abstains
    prediction_set: tuple[str, ...]  # every label that is plausible at the conformal level
    abstained: bool
    abstain_reason: str  # one sentence, empty unless abstained
    ood: float  # distance to the training images; larger is stranger
    map_label: str  # whose evidence map_SHW shows: the most likely label that is a finding
    bundle_digest: str
    bundle_name: str
    bundle_version: str
    provider: str
    read_at: float
    map_SHW: NDArray[np.float32]  # 0..1; each slice covers exactly its source image, in lower resolution
    slice_weights_S: NDArray[np.float32]  # how much each slice counted; sums to 1
    source_index_S: NDArray[np.int64]  # index of each slice in the volume
    calibration: Calibration | None = None  # what gave the probabilities and the set; None: the bundle's

    @property
    def probability(self) -> float:
        return self.probability_of(self.predicted)

    def probability_of(self, name: str) -> float:
        return next(label.probability for label in self.labels if label.name == name)

    @property
    def key_index_S(self) -> int:
        """The slice with the most evidence, as an index into map_SHW; where there is none, the one that counted most."""
        evidence_S = self.map_SHW.sum((1, 2))
        return int(np.argmax(evidence_S if evidence_S.any() else self.slice_weights_S))


def to_json(findings: Findings) -> str:
    """Every field but the arrays."""
    kept = {f.name: getattr(findings, f.name) for f in fields(Findings) if f.name not in _ARRAYS}
    return msgspec.json.encode(kept).decode()


def write_maps(findings: Findings, path: Path) -> None:
    """The arrays, as npz; whole or not at all, and durable."""
    content = io.BytesIO()
    np.savez(
        content,
        map_SHW=findings.map_SHW.astype(np.float16),
        slice_weights_S=findings.slice_weights_S,
        source_index_S=findings.source_index_S,
    )
    write_durably(path, content.getvalue())


def restore(text: str, maps_path: Path) -> Findings:
    """The findings that `to_json` and `write_maps` kept."""
    kept: dict[str, Any] = msgspec.json.decode(text)
    with np.load(maps_path) as arrays:
        kept["map_SHW"] = arrays["map_SHW"].astype(np.float32)
        kept["slice_weights_S"] = arrays["slice_weights_S"]
        kept["source_index_S"] = arrays["source_index_S"]
    kept["labels"] = msgspec.convert(kept["labels"], tuple[LabelProbability, ...])
    kept["calibration"] = msgspec.convert(kept.get("calibration"), Calibration | None)
    kept["prediction_set"] = tuple(kept["prediction_set"])
    return Findings(**kept)
