"""The structured report: what the network found, how sure it is, or that it abstains and why.

Reads findings and the source images' header; gives a data set.
Never states a diagnosis: the report is preliminary and unverified, and says that it is an AI's.
Source: PS3.16 TID 1500 Measurement Report (rows 6 to 8 and 12 to 14), TID 1501, TID 4019; PS3.3 A.35.3 Comprehensive SR.
"""

import uuid
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from datetime import datetime

from highdicom.sr import (
    AlgorithmIdentification,
    CodeContentItem,
    CodedConcept,
    ComprehensiveSR,
    ContainerContentItem,
    ContentSequence,
    DeviceObserverIdentifyingAttributes,
    Measurement,
    MeasurementReport,
    MeasurementsAndQualitativeEvaluations,
    ObservationContext,
    ObserverContext,
    RelationshipTypeValues,
    SourceImageForMeasurementGroup,
    TextContentItem,
    TrackingIdentifier,
)
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes

from edge_agent import report_codes
from edge_agent.decode import SourceImage
from edge_agent.findings import Findings, LabelProbability
from edge_agent.report_header import UTF8, Header

MANUFACTURER = "Wardround"
DISCLAIMER = "AI result, not for primary diagnosis"
_NAMESPACE = uuid.UUID("6c1f7a52-3d0e-4b5e-9c55-0d2f4f6a8b11")


@dataclass(frozen=True)
class Identity:
    """Who made this object and under which numbers."""

    SeriesInstanceUID: str
    SOPInstanceUID: str
    device_uid: str
    series_number: int
    instance_number: int
    software_version: str
    institution: str
    made_at: datetime


def structured_report(
    findings: Findings, header: Header, sources: Sequence[SourceImage], identity: Identity
) -> Dataset:
    """One measurement group per label, then impression and comment as qualitative evaluations.

    highdicom copies and searches the whole tree it is given (25 of 32 ms): it gets the root alone, the rest follows.
    """
    content = _content(findings, header, sources, identity)[0]
    root = ContainerContentItem(name=report_codes.TITLE, template_id="1500")
    root.ContentSequence = ContentSequence()
    sr = ComprehensiveSR(
        evidence=_evidence(header),
        content=root,
        series_instance_uid=identity.SeriesInstanceUID,
        series_number=identity.series_number,
        sop_instance_uid=identity.SOPInstanceUID,
        instance_number=identity.instance_number,
        manufacturer=MANUFACTURER,
        manufacturer_model_name=findings.bundle_name,
        software_versions=identity.software_version,
        series_description="AI findings",
        institution_name=identity.institution or None,
        specific_character_set=UTF8,
        content_date=identity.made_at.date(),
        content_time=identity.made_at.time(),
        content_qualification="RESEARCH",
        is_complete=True,
    )
    sr.ContentSequence = content.ContentSequence
    settle(sr, header, identity)
    return sr


def settle(ds: Dataset, header: Header, identity: Identity) -> None:
    """Patient and study as in the images; every time that of the reading, where highdicom puts that of writing."""
    ds.update(header.patient_study)
    ds.InstanceCreationDate, ds.InstanceCreationTime = ds.ContentDate, ds.ContentTime
    for item in ds.ContributingEquipmentSequence:
        item.ContributionDateTime = identity.made_at


def derived_uid(*parts: object) -> str:
    """The same parts give the same UID, so that a step that runs twice makes the same object. Source: PS3.5 B.2."""
    return f"2.25.{uuid.uuid5(_NAMESPACE, '|'.join(str(part) for part in parts)).int}"


def impression_text(findings: Findings) -> str:
    """What a reader needs in one sentence; also the first line of the capture's legend."""
    if findings.abstained:
        return f"ABSTAINED: {findings.abstain_reason}"
    return f"{findings.predicted} {percent(findings.probability)}"


def percent(probability: float) -> str:
    """Whole percent, never 0 % or 100 %: a network is not certain."""
    if probability < 0.01:
        return "<1%"
    return ">99%" if probability > 0.99 else f"{probability:.0%}"


def _content(
    findings: Findings, header: Header, sources: Sequence[SourceImage], identity: Identity
) -> MeasurementReport:
    algorithm = AlgorithmIdentification(
        name=findings.bundle_name,
        version=findings.bundle_version,
        parameters=[
            f"task: {findings.task}",
            f"bundle sha256: {findings.bundle_digest}",
            f"execution provider: {findings.provider}",
        ],
    )
    images = _images(findings, header, sources)
    report = MeasurementReport(
        title=report_codes.TITLE,
        observation_context=_observer(findings, identity),
        procedure_reported=report_codes.PROCEDURE[findings.modality],
        imaging_measurements=[
            _group(label, identity, algorithm, images if label.name == findings.map_label else images[:1])
            for label in findings.labels
        ],
    )
    report[0].ContentSequence.append(_evaluations(findings))
    return report


def _observer(findings: Findings, identity: Identity) -> ObservationContext:
    device = DeviceObserverIdentifyingAttributes(
        uid=identity.device_uid,
        name=f"{findings.bundle_name} {findings.bundle_version}",
        manufacturer_name=MANUFACTURER,
        model_name=findings.bundle_name,
        serial_number=findings.bundle_digest[:16],
    )
    return ObservationContext(
        observer_device_context=ObserverContext(observer_type=codes.DCM.Device, observer_identifying_attributes=device)
    )


def _group(
    label: LabelProbability,
    identity: Identity,
    algorithm: AlgorithmIdentification,
    images: list[SourceImageForMeasurementGroup],
) -> MeasurementsAndQualitativeEvaluations:
    return MeasurementsAndQualitativeEvaluations(
        tracking_identifier=TrackingIdentifier(uid=_tracking_uid(identity, label), identifier=label.name),
        finding_type=report_codes.concept(label.code),
        algorithm_id=algorithm,
        measurements=[
            Measurement(
                name=report_codes.CERTAINTY, value=round(label.probability * 100.0, 2), unit=report_codes.PERCENT
            )
        ],
        source_images=images,
    )


def _evaluations(findings: Findings) -> ContainerContentItem:
    """TID 1500 row 12; highdicom's MeasurementReport ends at row 6."""
    value = report_codes.INDETERMINATE if findings.abstained else _predicted(findings)
    item = ContainerContentItem(
        name=report_codes.QUALITATIVE_EVALUATIONS, relationship_type=RelationshipTypeValues.CONTAINS
    )
    item.ContentSequence = ContentSequence(
        [
            CodeContentItem(
                name=report_codes.IMPRESSION, value=value, relationship_type=RelationshipTypeValues.CONTAINS
            ),
            TextContentItem(
                name=report_codes.COMMENT, value=_comment(findings), relationship_type=RelationshipTypeValues.CONTAINS
            ),
        ]
    )
    return item


def _predicted(findings: Findings) -> CodedConcept:
    return next(report_codes.concept(label.code) for label in findings.labels if label.name == findings.predicted)


def _comment(findings: Findings) -> str:
    plausible = ", ".join(findings.prediction_set) or "none"
    return (
        f"{DISCLAIMER}. {impression_text(findings)}. Most likely: {findings.predicted} ({percent(findings.probability)}). "
        f"Plausible labels: {plausible}. Distance to the training images: {findings.ood:.2f}."
    )


def _images(findings: Findings, header: Header, sources: Sequence[SourceImage]) -> list[SourceImageForMeasurementGroup]:
    """The slices that were read, the key image first, then as much as they counted."""
    order_S = sorted(range(len(findings.source_index_S)), key=lambda s: -findings.slice_weights_S[s])
    order_S.insert(0, order_S.pop(order_S.index(findings.key_index_S)))
    read = [sources[int(findings.source_index_S[s])] for s in order_S]
    return [
        SourceImageForMeasurementGroup(
            header.SOPClassUID[source.SOPInstanceUID],
            source.SOPInstanceUID,
            [source.frame_number] if source.frame_number is not None else None,
        )
        for source in read
    ]


def _evidence(header: Header) -> list[Dataset]:
    """One data set per source instance; highdicom takes patient and study from the first."""
    evidence: list[Dataset] = []
    for SOPInstanceUID, SOPClassUID in header.SOPClassUID.items():
        ds = Dataset() if evidence else deepcopy(header.patient_study)  # `update` would share its elements
        if not evidence:
            ds.PatientName = ""  # highdicom would quote it in a warning; `structured_report` puts it in afterwards
        ds.StudyInstanceUID = header.patient_study.StudyInstanceUID
        ds.SeriesInstanceUID = header.SeriesInstanceUID
        ds.SOPClassUID, ds.SOPInstanceUID = SOPClassUID, SOPInstanceUID
        evidence.append(ds)
    return evidence


def _tracking_uid(identity: Identity, label: LabelProbability) -> str:
    return derived_uid(identity.SOPInstanceUID, label.name)
