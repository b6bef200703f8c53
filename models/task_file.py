"""What the laboratory must be told of image archives before it trains on them: tasks, labels and codes, licences.

Reads a TOML file (models/bundles/chest-small.toml is one); gives a frozen TaskFile.
Never guesses a label's code, what grey stands for, or whether weights may be passed on: it refuses with ModelError.
Source: SNOMED CT (SCT) as in DICOM PS3.16 chapter 8.
"""

import math
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from models.errors import ModelError
from models.spec import Code, InputSpec, Label, Meaning, TaskSpec

GREY_LEVELS = 255  # of an 8-bit image, above 0
_SEE_EXAMPLE = "compare it with models/bundles/chest-small.toml"

Text = Annotated[str, Meta(min_length=1, max_length=200, pattern=r"\S")]
Prose = Annotated[str, Meta(min_length=1, max_length=10_000, pattern=r"\S")]


class Grey(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the archive's grey becomes network input; with "window", grey g stands for black + g / 255 * (white - black)."""

    normalisation: Literal["window", "percentile"]
    max_slices: Annotated[int, Meta(ge=1, le=256)]  # of a series on a box; an archive's images are single slices
    black: float | None = None  # modality units (HU in CT), for "window" alone
    white: float | None = None


class ArchiveLabel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    label: Text
    sct: Annotated[str, Meta(pattern=r"\A[0-9]{6,18}\Z")]
    meaning: Meaning
    is_finding: bool


class ArchiveTask(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: Text
    modality: Literal["XR", "CT", "MR"]
    archive: Annotated[str, Meta(pattern=r"^[^/\\]+\.npz$")]  # a file in the data folder
    attribution: Prose
    licence: Prose
    limits: Prose
    input: Grey
    classes: Annotated[dict[str, ArchiveLabel], Meta(min_length=2)]  # by the archive's class name, in the logits' order

    def task_spec(self, offset: int) -> TaskSpec:
        labels = (
            Label(each.label, Code(each.sct, "SCT", each.meaning), each.is_finding) for each in self.classes.values()
        )
        return TaskSpec(self.name, self.modality, offset, tuple(labels))

    def input_spec(self, size: int) -> InputSpec:
        black, white = self.units
        window = ((black + white) / 2, white - black) if self.input.normalisation == "window" else (0.0, 1.0)
        return InputSpec(self.modality, size, self.input.max_slices, self.input.normalisation, *window)

    @property
    def units(self) -> tuple[float, float]:
        """What grey 0 and grey 255 stand for, in modality units."""
        if self.input.black is None or self.input.white is None:
            return 0.0, float(GREY_LEVELS)
        return self.input.black, self.input.white


class TaskFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: Text
    version: Text
    tasks: Annotated[tuple[ArchiveTask, ...], Meta(min_length=1)]

    def task_specs(self) -> tuple[TaskSpec, ...]:
        made: list[TaskSpec] = []
        for task in self.tasks:
            made.append(task.task_spec(sum(len(before.labels) for before in made)))
        return tuple(made)

    def input_specs(self, size: int) -> tuple[InputSpec, ...]:
        return tuple(task.input_spec(size) for task in self.tasks)


def read_task_file(path: Path) -> TaskFile:
    """Raises ModelError naming the key."""
    try:
        found = msgspec.toml.decode(path.read_bytes(), type=TaskFile, strict=True)
    except OSError as error:
        raise ModelError(f"{path.name} cannot be read: {error.strerror}", advice="check --tasks") from error
    except msgspec.ValidationError as error:
        raise ModelError(f"{path.name}: {error}", advice=_advice_for(str(error))) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path.name} is not TOML: {error}", advice=_SEE_EXAMPLE) from error
    _check_distinct(found)
    for task in found.tasks:
        _check_grey(task)
    return found


def _advice_for(complaint: str) -> str:
    if (
        "`licence`" in complaint
        or "`attribution`" in complaint
        or ".licence" in complaint
        or ".attribution" in complaint
    ):
        return "name the licence and whom to thank: weights are passed on with both in their model card, or not at all"
    if "sct" in complaint:
        return "every label needs a SNOMED CT code, in quotes: look it up in the SNOMED CT browser"
    return _SEE_EXAMPLE


def _check_distinct(found: TaskFile) -> None:
    for kind, values in (("name", [t.name for t in found.tasks]), ("modality", [t.modality for t in found.tasks])):
        if len(set(values)) != len(values):
            raise ModelError(f"two tasks have the same {kind}", advice="a bundle has one task for each modality")
    for task in found.tasks:
        if len({each.label for each in task.classes.values()}) != len(task.classes):
            raise ModelError(f"task {task.name}: two classes have the same label", advice="give each class its own")


def _check_grey(task: ArchiveTask) -> None:
    ends, is_window = (task.input.black, task.input.white), task.input.normalisation == "window"
    if not is_window and ends != (None, None):
        raise ModelError(
            f'task {task.name}: black and white are for normalisation "window"',
            advice="leave them out: percentiles of the image itself are used",
        )
    black, white = (math.nan if end is None else end for end in ends)
    if is_window and not (math.isfinite(black) and math.isfinite(white) and black < white):
        raise ModelError(
            f"task {task.name}: a window needs black below white",
            advice="say what grey 0 (black) and grey 255 (white) stand for, in HU for CT",
        )
