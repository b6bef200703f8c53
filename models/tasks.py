"""The shipped bundle's tasks: labels, codes and how each modality becomes network input.

Reads and writes nothing.
Never holds calibration: `pretraining` measures it and puts it into the bundle.
Source: SNOMED CT codes as used in DICOM (PS3.16 chapter 8, scheme SCT).
"""

from models.spec import Code, InputSpec, Label, TaskSpec


def _label(name: str, code: str, meaning: str) -> Label:
    return Label(name, Code(code, "SCT", meaning), is_finding=name != "normal")


_NORMAL = _label("normal", "17621005", "Normal")
_NODULE = _label("nodule", "427359005", "Solitary nodule of lung")

TASKS = (
    TaskSpec("chest-xray", "XR", 0, (_NORMAL, _NODULE, _label("consolidation", "95436008", "Lung consolidation"))),
    TaskSpec("chest-ct", "CT", 3, (_NORMAL, _NODULE, _label("emphysema", "87433001", "Pulmonary emphysema"))),
    TaskSpec(
        "brain-mr",
        "MR",
        6,
        (
            _NORMAL,
            _label("neoplasm", "126952004", "Neoplasm of brain"),
            _label("haemorrhage", "1386000", "Intracranial hemorrhage"),
        ),
    ),
)

INPUTS = (
    InputSpec("XR", size=96, max_slices=4, normalisation="percentile"),
    InputSpec("CT", size=96, max_slices=12, normalisation="window", window_center=-500.0, window_width=1500.0),
    InputSpec("MR", size=96, max_slices=12, normalisation="percentile"),
)
