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
IMPORTED = "imported"  # the network of a bundle that `python -m models import` made: a graph alone


Meaning = Annotated[str, Meta(min_length=1, max_length=64, pattern=r"\S")]  # DICOM's LO: no report can hold more


class Code(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    value: str
    scheme: str
    meaning: Meaning


class Label(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    code: Code
    is_finding: bool  # False for "normal"


class Reference(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What held-back cases of a task look like: equally spaced quantiles, lowest first; see models.drift."""

    cases: Annotated[int, Meta(ge=1)]
    confidence_Q: Annotated[tuple[float, ...], Meta(min_length=1, max_length=1000)]  # log odds of the most likely label
    ood_Q: Annotated[tuple[float, ...], Meta(min_length=1, max_length=1000)]


class TaskSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One softmax over `labels`; its logits are columns [offset, offset + len(labels)) of the graph's output."""

    name: str
    modality: Literal["XR", "CT", "MR"]
    offset: int
    labels: tuple[Label, ...]
    temperature: Annotated[float, Meta(gt=0.0)] = 1.0
    conformal_threshold: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.0  # label k is in the set where p_k >= this
    reference: Reference | None = None  # None: drift is not watched


class InputSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a volume of this modality becomes slices_S1HW; see models.preprocess."""

    modality: Literal["XR", "CT", "MR"]
    size: Annotated[int, Meta(ge=16, le=1024)]
    max_slices: Annotated[int, Meta(ge=1, le=256)]
    normalisation: Literal["window", "percentile"]
    window_center: float = 0.0  # modality units (HU in CT); used by "window"
    window_width: float = 1.0


class Variant(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The graph in another precision: where it runs in place of model.onnx, and what was measured when it was made."""

    precision: Literal["int8", "fp16"]
    form: str  # what was quantised and how, in words
    made_from: str  # SHA-256 of the model.onnx it says the same as
    providers: Annotated[
        tuple[Literal["CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"], ...],
        Meta(min_length=1),
    ]
    tolerance: Annotated[
        float, Meta(gt=0.0, le=0.5)
    ]  # of the known-answer batch, relative to each output's largest value
    measured_on: str  # which examples, which processor
    examples: Annotated[int, Meta(ge=1)]
    correct_before: Annotated[int, Meta(ge=0)]  # by model.onnx
    correct_after: Annotated[int, Meta(ge=0)]
    speed_by_threads: dict[int, float]  # latency of model.onnx over its own, on the CPU; none for a GPU's variant

    @property
    def member(self) -> str:
        return f"model_{self.precision}.onnx"


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    format: Literal[1]
    name: str
    version: str
    network: str  # names the sizes in models.network; or IMPORTED
    inputs: tuple[InputSpec, ...]
    tasks: tuple[TaskSpec, ...]
    ood_threshold: float
    parameters: int
    opset: int
    members: dict[str, str]  # member name -> sha256 hex, every member but manifest.json
    variants: tuple[Variant, ...] = ()

    @property
    def is_trainable(self) -> bool:
        """False for an imported graph: there are no weights that a round could move."""
        return self.network != IMPORTED

    def variant_for(self, precision: str) -> Variant | None:
        return next((variant for variant in self.variants if variant.precision == precision), None)

    def task_for(self, modality: str) -> TaskSpec | None:
        return next((task for task in self.tasks if task.modality == modality), None)

    def input_for(self, modality: str) -> InputSpec | None:
        return next((spec for spec in self.inputs if spec.modality == modality), None)
