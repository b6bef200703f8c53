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
from edge_agent.report_header import Header
from edge_agent.report_sr import DISCLAIMER, MANUFACTURER, Identity, impression_text, percent, settle
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
    sc = SCImage(
        pixel_array=draw(findings, volume),
        photometric_interpretation="RGB",
        bits_allocated=8,
        coordinate_system="PATIENT",
        patient_orientation=("L", "F"),  # highdicom wants one; emptied below, since a legend has none
        study_instance_uid=header.patient_study.StudyInstanceUID,
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
    settle(sc, header, identity)
    sc.update(header.image)
    sc.PatientOrientation = ""
    sc.ConversionType = "WSD"
    sc.BurnedInAnnotation = "NO"  # nothing in it names patient or date
    sc.DateOfSecondaryCapture, sc.TimeOfSecondaryCapture = sc.ContentDate, sc.ContentTime
    sc.DerivationDescription = f"{DISCLAIMER}: evidence for {findings.map_label} over slice {key + 1}"[:1024]
    sc.SourceImageSequence = [_source(sources[key], header)]
    return sc


def draw(findings: Findings, volume: Volume) -> RGB:
    """The key slice in grey, the evidence as heat over it, a legend below: rows x columns x RGB."""
    key = int(findings.source_index_S[findings.key_index_S])
    image_YX = volume.voxels_ZYX[key]
    height, width = _size(image_YX.shape, volume.spacing_mm[1:])
    shrinks = width < image_YX.shape[1]
    image_YX = cv2.resize(image_YX, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    grey_YX = _grey(image_YX, volume.window)
    heat_YX = cv2.resize(findings.map_SHW[findings.key_index_S], (width, height), interpolation=cv2.INTER_LINEAR)
    return np.vstack([_blend(grey_YX, heat_YX), _legend(findings, volume.voxels_ZYX.shape[0], key, width)])


def _grey(image_YX: NDArray[np.float32], window: tuple[float, float] | None) -> NDArray[np.uint8]:
    """By the image's own window, else by its values. Source: PS3.3 C.11.2.1.2."""
    if window is not None:
        low, high = window[0] - window[1] / 2, window[0] + window[1] / 2
    else:
        low, high = (float(value) for value in np.percentile(image_YX, _PERCENTILES))
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
    """White on black: what it is, what it found, what the colours mean. The text grows with the image."""
    zoom = max(1.0, width / SHORTEST_PX)
    line_px, margin_px = round(_LINE_PX * zoom), round(_MARGIN_PX * zoom)
    probabilities = "   ".join(f"{label.name} {percent(label.probability)}" for label in findings.labels)
    where = f"slice {key + 1} of {slices}, " if slices > 1 else ""
    paragraphs = (
        (DISCLAIMER.upper(), _AMBER),
        (impression_text(findings), _WHITE),
        (probabilities, _GREY),
        (f"{where}{findings.bundle_name} {findings.bundle_version}", _GREY),
        (f"Colour: evidence for {findings.map_label}, low to high", _GREY),
    )
    lines = [(line, colour) for text, colour in paragraphs for line in _wrapped(text, width - 2 * margin_px, zoom)]
    strip_YXC = np.zeros(((len(lines) + 1) * line_px + margin_px, width, 3), np.uint8)
    for row, (line, colour) in enumerate(lines, start=1):
        place = (margin_px, row * line_px)
        cv2.putText(strip_YXC, line, place, _FONT, _FONT_SCALE * zoom, colour, round(zoom), cv2.LINE_AA)
    bar_X = np.linspace(0.0, 1.0, width - 2 * margin_px, dtype=np.float32)
    top = len(lines) * line_px + margin_px
    strip_YXC[top : top + line_px // 2, margin_px : width - margin_px] = _colours(np.tile(bar_X, (line_px // 2, 1)))
    return strip_YXC


def _wrapped(text: str, room_px: int, zoom: float) -> list[str]:
    """Lines that fit; the font has ASCII only."""
    lines: list[str] = []
    line = ""
    for word in text.encode("ascii", "replace").decode().split():
        longer = f"{line} {word}".strip()
        if line and cv2.getTextSize(longer, _FONT, _FONT_SCALE * zoom, round(zoom))[0][0] > room_px:
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
