"""The secondary capture: the key image with its heatmap and a legend, for viewers that show nothing else.

Reads findings, the volume and the source images' header; gives a data set.
Never writes a patient's name or number into the pixels.
Source: PS3.3 A.8.1 Secondary Capture Image; C.8.6 (SC modules), C.7.6.1 (General Image).
"""

from collections.abc import Sequence

import cv2
import numpy as np
from highdicom.sc import SCImage
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from edge_agent import report_codes
from edge_agent.decode import SourceImage
from edge_agent.findings import Findings
from edge_agent.report_header import UTF8, Header
from edge_agent.report_sr import DISCLAIMER, MANUFACTURER, Identity, impression_text, percent
from models.preprocess import Volume

RGB = NDArray[np.uint8]
SHORTEST_PX, LONGEST_PX = 512, 1024  # of the image's long side: legible legend, small object
OPACITY = 0.55  # of the heat where the evidence is 1
FAINTEST = 0.08  # evidence below this leaves the image as it is
_FONT, _LINE_PX, _MARGIN_PX = cv2.FONT_HERSHEY_SIMPLEX, 24, 10
_FONT_SCALE = 0.55
_WHITE, _AMBER, _GREY = (255, 255, 255), (255, 190, 60), (170, 170, 170)
_PERCENTILES = (0.5, 99.5)


def secondary_capture(
    findings: Findings, volume: Volume, header: Header, sources: Sequence[SourceImage], identity: Identity
) -> Dataset:
    """RGB, one frame."""
    key = int(findings.source_index_S[findings.key_index_S])
    study = header.patient_study
    sc = SCImage(
        pixel_array=draw(findings, volume),
        photometric_interpretation="RGB",
        bits_allocated=8,
        coordinate_system="PATIENT",
        patient_orientation=("L", "F"),  # highdicom wants one; emptied below, since a legend has none
        study_instance_uid=study.StudyInstanceUID,
        series_instance_uid=identity.SeriesInstanceUID,
        series_number=identity.series_number,
        sop_instance_uid=identity.SOPInstanceUID,
        instance_number=identity.instance_number,
        manufacturer=MANUFACTURER,
        manufacturer_model_name=findings.bundle_name,
        software_versions=identity.software_version,
        series_description="AI heatmap",
        institution_name=identity.institution or None,
        content_date=identity.made_at.date(),
        content_time=identity.made_at.time(),
        content_qualification="RESEARCH",
    )
    sc.update(study)
    sc.update(header.image)
    sc.SpecificCharacterSet = UTF8
    sc.PatientOrientation = ""
    sc.ConversionType = "WSD"
    sc.BurnedInAnnotation = "NO"  # nothing in it names patient or date
    sc.InstanceCreationDate = sc.DateOfSecondaryCapture = sc.ContentDate
    sc.InstanceCreationTime = sc.TimeOfSecondaryCapture = sc.ContentTime
    sc.DerivationDescription = f"{DISCLAIMER}: evidence for {findings.map_label} over slice {key + 1}"[:1024]
    sc.SourceImageSequence = [_source(sources[key], header)]
    return sc


def draw(findings: Findings, volume: Volume) -> RGB:
    """The key slice in grey, the evidence as heat over it, a legend below: rows x columns x RGB."""
    key = int(findings.source_index_S[findings.key_index_S])
    grey_YX = _grey(volume.voxels_ZYX[key], volume.window)
    height, width = _size(grey_YX.shape, volume.spacing_mm[1:])
    grey_YX = cv2.resize(grey_YX, (width, height), interpolation=cv2.INTER_AREA)
    heat_YX = cv2.resize(findings.map_SHW[findings.key_index_S], (width, height), interpolation=cv2.INTER_LINEAR)
    return np.vstack([_blend(grey_YX, heat_YX), _legend(findings, volume.voxels_ZYX.shape[0], key, width)])


def _grey(image_YX: NDArray[np.float32], window: tuple[float, float] | None) -> NDArray[np.uint8]:
    """By the image's own window, else by its values. Source: PS3.3 C.11.2.1.2."""
    if window is not None:
        low, high = window[0] - window[1] / 2, window[0] + window[1] / 2
    else:
        low, high = (float(value) for value in np.percentile(image_YX[::4, ::4], _PERCENTILES))
    scale = 255.0 / max(high - low, 1e-6)
    return np.asarray(np.clip((image_YX - low) * scale, 0.0, 255.0).astype(np.uint8))


def _size(shape: tuple[int, ...], spacing_mm: tuple[float, ...]) -> tuple[int, int]:
    """Height and width in px, of the body's true proportions."""
    height_mm, width_mm = shape[0] * spacing_mm[0], shape[1] * spacing_mm[1]
    longest = min(max(*shape, SHORTEST_PX), LONGEST_PX)
    scale = longest / max(height_mm, width_mm)
    return max(_LINE_PX, round(height_mm * scale)), max(SHORTEST_PX // 2, round(width_mm * scale))


def _blend(grey_YX: NDArray[np.uint8], heat_YX: NDArray[np.float32]) -> RGB:
    alpha_YX1 = np.where(heat_YX < FAINTEST, 0.0, heat_YX * OPACITY).astype(np.float32)[:, :, np.newaxis]
    grey_YXC = cv2.cvtColor(grey_YX, cv2.COLOR_GRAY2RGB)
    colour_YXC = _colours(heat_YX)
    return np.asarray((grey_YXC * (1.0 - alpha_YX1) + colour_YXC * alpha_YX1).astype(np.uint8))


def _colours(heat_YX: NDArray[np.float32]) -> RGB:
    table_YXC = cv2.applyColorMap(np.clip(heat_YX * 255.0, 0.0, 255.0).astype(np.uint8), cv2.COLORMAP_TURBO)
    return np.asarray(cv2.cvtColor(table_YXC, cv2.COLOR_BGR2RGB), np.uint8)


def _legend(findings: Findings, slices: int, key: int, width: int) -> RGB:
    """White on black: what it is, what it found, what the colours mean."""
    probabilities = "   ".join(f"{label.name} {percent(label.probability)}" for label in findings.labels)
    where = f"slice {key + 1} of {slices}, " if slices > 1 else ""
    lines = [
        *((line, _AMBER) for line in _wrapped(DISCLAIMER.upper(), width)),
        *((line, _WHITE) for line in _wrapped(impression_text(findings), width)),
        *((line, _GREY) for line in _wrapped(probabilities, width)),
        *((line, _GREY) for line in _wrapped(f"{where}{findings.bundle_name} {findings.bundle_version}", width)),
        *((line, _GREY) for line in _wrapped(f"Colour: evidence for {findings.map_label}, low to high", width)),
    ]
    strip_YXC = np.zeros(((len(lines) + 1) * _LINE_PX + _MARGIN_PX, width, 3), np.uint8)
    for row, (line, colour) in enumerate(lines, start=1):
        cv2.putText(strip_YXC, line, (_MARGIN_PX, row * _LINE_PX), _FONT, _FONT_SCALE, colour, 1, cv2.LINE_AA)
    bar_X = np.linspace(0.0, 1.0, width - 2 * _MARGIN_PX, dtype=np.float32)
    bar_YX = np.tile(bar_X, (_LINE_PX // 2, 1))
    top = len(lines) * _LINE_PX + _MARGIN_PX
    strip_YXC[top : top + _LINE_PX // 2, _MARGIN_PX : width - _MARGIN_PX] = _colours(bar_YX)
    return strip_YXC


def _wrapped(text: str, width: int) -> list[str]:
    """Lines that fit; the font has ASCII only."""
    lines: list[str] = []
    line = ""
    for word in text.encode("ascii", "replace").decode().split():
        longer = f"{line} {word}".strip()
        if line and cv2.getTextSize(longer, _FONT, _FONT_SCALE, 1)[0][0] > width - 2 * _MARGIN_PX:
            lines.append(line)
            longer = word
        line = longer
    return [*lines, line]


def _source(source: SourceImage, header: Header) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID = header.SOPClassUID[source.SOPInstanceUID]
    item.ReferencedSOPInstanceUID = source.SOPInstanceUID
    if source.frame_number is not None:
        item.ReferencedFrameNumber = source.frame_number
    item.SpatialLocationsPreserved = "NO"
    item.PurposeOfReferenceCodeSequence = [report_codes.SOURCE_FOR_PROCESSING]
    return item
