"""What a bundle's manifest says: labels and their codes, preprocessing, calibration, known facts.

Reads and writes JSON through msgspec, strictly.
Never holds weights or site-side state.
Source: ARCHITECTURE.md, "The network"; codes are SNOMED CT (SCT) as in DICOM PS3.16 chapter 8.
"""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

MODALITIES = ("XR", "CT", "MR")  # index in this tuple is the network's modality embedding row
DICOM_MODALITY = {"CR": "XR", "DX": "XR", "DR": "XR", "RG": "XR", "CT": "CT", "MR": "MR"}


class Code(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    value: str
    scheme: str
    meaning: str


class Label(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    code: Code
    is_finding: bool  # False for "normal"


class TaskSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One softmax over `labels`; its logits are columns [offset, offset + len(labels)) of the graph's output."""

    name: str
    modality: Literal["XR", "CT", "MR"]
    offset: int
    labels: tuple[Label, ...]
    temperature: Annotated[float, Meta(gt=0.0)] = 1.0
    conformal_threshold: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.0  # label k is in the set where p_k >= this


class InputSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a volume of this modality becomes slices_S1HW; see models.preprocess."""

    modality: Literal["XR", "CT", "MR"]
    size: Annotated[int, Meta(ge=16, le=1024)]
    max_slices: Annotated[int, Meta(ge=1, le=256)]
    normalisation: Literal["window", "percentile"]
    window_center: float = 0.0  # modality units (HU in CT); used by "window"
    window_width: float = 1.0


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format: Literal[1]
    name: str
    version: str
    network: str  # names the sizes in models.network
    inputs: tuple[InputSpec, ...]
    tasks: tuple[TaskSpec, ...]
    ood_threshold: float
    parameters: int
    opset: int
    members: dict[str, str]  # member name -> sha256 hex, every member but manifest.json

    def task_for(self, modality: str) -> TaskSpec | None:
        return next((task for task in self.tasks if task.modality == modality), None)

    def input_for(self, modality: str) -> InputSpec | None:
        return next((spec for spec in self.inputs if spec.modality == modality), None)
