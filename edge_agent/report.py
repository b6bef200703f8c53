"""Reporting: findings become the two objects that the PACS gets, a structured report and a secondary capture.

Reads findings, the decoded series and its images' headers; writes two DICOM files.
Never sends anything and never reads pixel data again.
Source: IHE Radiology, AI Results profile; PS3.3 A.35.3 and A.8.1.
"""

from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version as installed_version
from io import BytesIO
from pathlib import Path
from typing import Literal

from pydicom.dataset import Dataset

from edge_agent.decode import Decoded
from edge_agent.findings import Findings
from edge_agent.report_capture import secondary_capture
from edge_agent.report_header import Header, read_header
from edge_agent.report_sr import Identity, derived_uid, structured_report
from fleet_link.files import write_durably

SERIES_NUMBER_BASE = 90000  # above what scanners use, so that results sort last in a viewer

Kind = Literal["SR", "SC"]


@dataclass(frozen=True)
class ReportFile:
    kind: Kind
    SOPInstanceUID: str
    path: Path


def write(
    findings: Findings, decoded: Decoded, folder: Path, *, series_no: int, version: int, institution: str = ""
) -> tuple[ReportFile, ...]:
    """Write both objects, each whole or not at all. The same arguments give the same bytes; a step that runs twice, the same UIDs.

    Raises SiteError when the images' headers do not allow a report or the disk refuses.
    """
    header = read_header(decoded.source)
    identities = {
        kind: _identity(findings, header, kind, series_no=series_no, version=version, institution=institution)
        for kind in ("SR", "SC")
    }
    reports: dict[Kind, Dataset] = {
        "SR": structured_report(findings, header, decoded.source, identities["SR"]),
        "SC": secondary_capture(findings, decoded.volume, header, decoded.source, identities["SC"]),
    }
    files = []
    for kind, ds in reports.items():
        path = folder / f"{series_no}-{version}-{kind}.dcm"
        write_durably(path, _encoded(ds))
        files.append(ReportFile(kind, str(ds.SOPInstanceUID), path))
    return tuple(files)


def _identity(
    findings: Findings, header: Header, kind: str, *, series_no: int, version: int, institution: str
) -> Identity:
    """Numbers and UIDs follow from series, version, kind and bundle; the time is that of the reading."""
    base = (header.SeriesInstanceUID, version, findings.bundle_digest, kind)
    return Identity(
        SeriesInstanceUID=derived_uid("series", *base),
        SOPInstanceUID=derived_uid("instance", *base),
        device_uid=derived_uid("device", findings.bundle_digest),
        series_number=SERIES_NUMBER_BASE + 2 * series_no + (kind == "SC"),
        instance_number=max(version, 1),
        software_version=installed_version("wardround"),
        institution=institution,
        made_at=datetime.fromtimestamp(findings.read_at),
    )


def _encoded(ds: Dataset) -> bytes:
    content = BytesIO()
    ds.save_as(content, enforce_file_format=True)
    return content.getvalue()
