"""What is to be known of an imported bundle: its warnings, and its model card.

Reads what the importer found; gives text.
Never claims what was not measured here.
Source: none beyond models.importing.
"""

from models.calibration import ALPHA
from models.classifier import Classifier
from models.drift import ENOUGH
from models.import_images import FEWEST_FOR_LOOKS, Calibration, coverage_floor
from models.spec import Manifest

GUESSING = 0.1  # above chance; a network that was trained for its task is farther


def warnings(classifier: Classifier, learned: Calibration) -> tuple[str, ...]:
    """Each is one sentence for the one who imports; they are in the model card too."""
    found = []
    if learned.accuracy is None:
        found.append(
            "NOT CALIBRATED: every label counts as plausible, so a box abstains on every image until its own"
            " reviews have calibrated it; give labelled --images"
        )
    elif learned.conformal_threshold == 0.0:
        found.append(
            f"TOO FEW IMAGES: with {learned.images} labelled images there is no threshold, so a box abstains on"
            f" every image until its own reviews have calibrated it; give {coverage_floor()} or more"
        )
    if learned.balanced_accuracy is not None and learned.balanced_accuracy < 1 / len(classifier.spec.labels) + GUESSING:
        found.append(
            f"LITTLE BETTER THAN GUESSING: balanced accuracy {learned.balanced_accuracy:.3f}; look at input.range, mean,"
            " std and the labels' order"
        )
    if classifier.activation is None:
        found.append(
            "NO EXPLANATION: the heatmap is empty; [explanation] in the spec gives one where the network has it"
        )
    if learned.looks is None:
        found.append(
            "NO STRANGENESS SCORE: images unlike the training's are read like any other;"
            f" [explanation] and {FEWEST_FOR_LOOKS} or more --images give one"
        )
    if learned.reference is None:
        found.append(f"NO DRIFT WATCH: nothing to judge drift against; {2 * ENOUGH} or more --images give it")
    found.append(
        "NOT TRAINABLE: an imported network takes no part in rounds; boxes decline and the hub starts none on it"
    )
    return tuple(found)


def card(classifier: Classifier, learned: Calibration, manifest: Manifest, parity: float, said: tuple[str, ...]) -> str:
    spec, task = classifier.spec, manifest.tasks[0]
    labels = "\n".join(
        f"| {label.name} | {label.code.scheme} {label.code.value} | {label.code.meaning} |" for label in task.labels
    )
    return _CARD.format(
        name=manifest.name,
        version=manifest.version,
        description=spec.description.strip(),
        modality=spec.modality,
        labels=labels,
        size=classifier.size,
        channels=classifier.channels or 1,
        parameters=manifest.parameters,
        opset=manifest.opset,
        parity=f"{parity:.1e}",
        measured=_measured(learned, manifest),
        warnings="\n".join(f"- {warning}." for warning in said),
    )


def _measured(learned: Calibration, manifest: Manifest) -> str:
    if learned.accuracy is None:
        return "Nothing: no labelled images were given."
    task = manifest.tasks[0]
    return (
        f"On {learned.images} labelled images given to the importer: accuracy {learned.accuracy:.3f}, balanced accuracy "
        f"{learned.balanced_accuracy:.3f}.\nCalibration error {learned.calibration_error:.3f} on the half that did not set "
        f"the temperature ({task.temperature:g}). Conformal threshold {task.conformal_threshold:.4g}\n(alpha {ALPHA}), from "
        "that half. If the network was trained on these images, the figures flatter it."
    )


_CARD = """# {name} {version}

Imported into Wardround from elsewhere; **the box's operator answers for its use**. {description}

## What it reads

{modality}, each slice as an image of {size} x {size} pixels with {channels} channel(s); the logits of a series' slices are averaged.
Preprocessing is in manifest.json. {parameters} parameters, opset {opset}; largest difference between this bundle's graph and the
network alone: {parity}.

| label | code | meaning |
|---|---|---|
{labels}

## Measured

{measured}

## Limits

{warnings}
"""
