"""What the importer must be told about a network from elsewhere: its input, output, labels and their codes.

Reads a TOML file (models/import-example.toml explains every key); gives a frozen ImportSpec.
Never guesses a label's code, the range of the input or what the scores are: it refuses with SpecError.
Source: SNOMED CT and RadLex designators are those of DICOM PS3.16 chapter 8.
"""

import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from models.errors import SpecError
from models.spec import InputSpec, Label, TaskSpec

EXAMPLE = Path(__file__).parent / "import-example.toml"
MAX_SPEC_BYTES = 1 << 20
_CODE_FORMS = {"SCT": re.compile(r"[0-9]{6,18}"), "RADLEX": re.compile(r"RID[0-9]+")}
_SEE_EXAMPLE = "compare it with `python -m models import --example`"

Text = Annotated[str, Meta(min_length=1, max_length=200, pattern=r"\S")]


class ImageInput(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a slice of [-1, 1] becomes the network's image: mapped to `range`, then (x - mean) / std of each channel."""

    max_slices: Annotated[int, Meta(ge=1, le=256)]
    normalisation: Literal["window", "percentile"]
    range: tuple[float, float]
    size: Annotated[int, Meta(ge=16, le=1024)] | None = None  # None: the graph's own
    window_center: float = 0.0
    window_width: float = 1.0
    mean: Annotated[tuple[float, ...], Meta(min_length=1, max_length=3)] = (0.0,)
    std: Annotated[tuple[float, ...], Meta(min_length=1, max_length=3)] = (1.0,)


class ScoreOutput(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    kind: Literal["logits", "probabilities"]
    tensor: str = ""  # empty: the graph's only output


class Explanation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    features: Text  # the last feature map, N×D×h×w
    weights: Text  # the classifier's initializer, K×D or D×K


class ImportSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: Text
    version: Text
    task: Text
    modality: Literal["XR", "CT", "MR"]
    description: Annotated[str, Meta(min_length=1, max_length=100_000, pattern=r"\S")]
    input: ImageInput
    output: ScoreOutput
    labels: Annotated[tuple[Label, ...], Meta(min_length=2, max_length=1000)]
    explanation: Explanation | None = None

    def task_spec(self) -> TaskSpec:
        """Not calibrated: every label is plausible, so the box abstains."""
        return TaskSpec(self.task, self.modality, 0, self.labels)

    def input_spec(self, size: int) -> InputSpec:
        given = self.input
        return InputSpec(
            self.modality, size, given.max_slices, given.normalisation, given.window_center, given.window_width
        )


def read_spec(path: Path, defaults: Mapping[str, Any], label_order: Sequence[str] = ()) -> ImportSpec:
    """`defaults` fill what the file leaves out; `label_order`, where there is one, is the order of the scores.

    Raises SpecError naming the key.
    """
    try:
        spec = msgspec.convert(_filled(_parsed(path), defaults), ImportSpec, strict=True)
    except msgspec.ValidationError as error:
        raise SpecError(f"{path.name}: {error}", advice=_advice_for(str(error))) from error
    _check_numbers(spec.input)
    for label in spec.labels:
        _check_code(label)
    if len({label.name for label in spec.labels}) != len(spec.labels):
        raise SpecError(f"{path.name}: two labels have the same name", advice="give each label its own")
    return _ordered(spec, label_order)


def _parsed(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_SPEC_BYTES:
            raise SpecError(f"{path.name} is larger than {MAX_SPEC_BYTES} bytes", advice=_SEE_EXAMPLE)
        return tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise SpecError(f"{path.name} cannot be read: {error.strerror}", advice="check --spec") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SpecError(f"{path.name} is not TOML: {error}", advice=_SEE_EXAMPLE) from error


def _filled(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """What is given stands; tables are filled key by key."""
    filled = {**defaults, **given}
    for key, default in defaults.items():
        if isinstance(default, Mapping) and isinstance(given.get(key), Mapping):
            filled[key] = _filled(given[key], default)
    return filled


def _advice_for(complaint: str) -> str:
    if "labels[" in complaint and "code" in complaint:
        return "every label needs a SNOMED CT or RadLex code: look it up in the SNOMED CT browser or at radlex.org"
    return _SEE_EXAMPLE


def _check_numbers(given: ImageInput) -> None:
    numbers = (*given.range, *given.mean, *given.std, given.window_center, given.window_width)
    if not all(math.isfinite(number) for number in numbers):
        raise SpecError("input: a number is not finite", advice=_SEE_EXAMPLE)
    if given.range[0] >= given.range[1]:
        raise SpecError(f"input.range goes from low to high, it is {list(given.range)}", advice=_SEE_EXAMPLE)
    if min(given.std) <= 0 or given.window_width <= 0:
        raise SpecError("input.std and input.window_width are above 0", advice=_SEE_EXAMPLE)
    if len(given.mean) != len(given.std):
        raise SpecError("input.mean and input.std have one number for each channel", advice=_SEE_EXAMPLE)


def _check_code(label: Label) -> None:
    form = _CODE_FORMS.get(label.code.scheme)
    if form is None or not form.fullmatch(label.code.value) or not label.code.meaning.strip():
        raise SpecError(
            f"label {label.name}: {label.code.scheme} {label.code.value or '(nothing)'} is no code",
            advice='scheme "SCT" with a SNOMED CT number, or "RADLEX" with RID and a number, and a meaning',
        )


def _ordered(spec: ImportSpec, label_order: Sequence[str]) -> ImportSpec:
    """A wrong order of labels is the one mistake that nothing later can find."""
    if not label_order:
        return spec
    by_name = {label.name.casefold(): label for label in spec.labels}
    wanted = [name.casefold() for name in label_order]
    if sorted(wanted) != sorted(by_name):
        raise SpecError(
            f"the spec's labels are not those of the bundle's metadata: {', '.join(label_order)}",
            advice="name the labels as network_data_format.outputs.*.channel_def does",
        )
    return msgspec.structs.replace(spec, labels=tuple(by_name[name] for name in wanted))
