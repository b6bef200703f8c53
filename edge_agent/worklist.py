"""What the review page lists: series with their newest result, verdict and delivery.

Reads the catalog's tables and, for names on the screen, the header of one image per series, or of its report.
Never decodes pixels and never writes.
Source: patient and study attributes PS3.3 C.7.1.1, C.7.2.1, C.7.3.1.
"""

import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from pydicom import dcmread
from pydicom.charset import convert_encodings, decode_bytes
from pydicom.dataset import Dataset

from edge_agent import reviews
from edge_agent.decode import MAX_INFLATED
from edge_agent.encoded import inflates_beyond
from edge_agent.instances import PYDICOM_ERRORS
from edge_agent.recent import Recent
from edge_agent.reviews import Review, Stated

PAGE_ROWS = 50
SHOWN: Mapping[str, str] = MappingProxyType(
    {
        "all": "1",
        "unread": "r.result_no IS NOT NULL AND v.review_no IS NULL",
        "reviewed": "v.review_no IS NOT NULL",
        "abstained": "r.abstained = 1",
        "no-result": "r.result_no IS NULL",
    }
)
_FROM = """
  FROM series s
  LEFT JOIN results r ON r.result_no =
    (SELECT result_no FROM results WHERE series_no = s.series_no ORDER BY version DESC LIMIT 1)
  LEFT JOIN reviews v ON v.review_no =
    (SELECT review_no FROM reviews WHERE series_no = s.series_no AND result_no = r.result_no
      ORDER BY review_no DESC LIMIT 1)
  LEFT JOIN removals x ON x.series_no = s.series_no
"""
_COLUMNS = """
  SELECT s.series_no, s.Modality, s.state, s.reason, s.instance_count, s.last_instance_at,
    r.result_no, r.version, r.findings, r.maps_path, r.release_version, r.read_at,
    r.last_instance_at AS read_to,
    v.review_no, v.verdict, v.label, v.reviewer, v.reviewed_at,
    x.removed_at, CASE WHEN x.series_no IS NULL
      THEN (SELECT path FROM instances i WHERE i.series_no = s.series_no ORDER BY SOPInstanceUID LIMIT 1)
      ELSE (SELECT path FROM outbox o WHERE o.result_no = r.result_no AND o.kind = 'SR') END AS path
"""
_KEYWORDS = (
    "PatientName", "PatientID", "PatientBirthDate", "PatientSex",
    "StudyDate", "StudyDescription", "SeriesDescription", "AccessionNumber",
)  # fmt: skip
_PN_DELIMITERS = {0x5E, 0x3D}  # ^ and =


@dataclass(frozen=True)
class Patient:
    """As in the image; empty where the image does not say."""

    PatientName: str = ""
    PatientID: str = ""
    PatientBirthDate: str = ""
    PatientSex: str = ""
    StudyDate: str = ""
    StudyDescription: str = ""
    SeriesDescription: str = ""
    AccessionNumber: str = ""


@dataclass(frozen=True)
class Delivery:
    """Of the newest result to the PACS: none (nothing queued), pending, delivered, refused."""

    state: str = "none"
    delivered: int = 0
    total: int = 0
    attempts: int = 0
    last_error: str = ""


@dataclass(frozen=True)
class Result:
    result_no: int
    version: int
    release_version: int
    read_at: float
    last_instance_at: float  # of the images that were read
    maps_path: str
    findings: Stated


@dataclass(frozen=True)
class Entry:
    series_no: int
    Modality: str
    state: str
    reason: str
    instance_count: int
    last_instance_at: float
    images_removed_at: float | None  # None while the images are here
    patient: Patient
    result: Result | None  # the newest
    review: Review | None  # the newest verdict on that result
    delivery: Delivery

    @property
    def is_current(self) -> bool:
        """The result read every image that is here; else its slices may lie elsewhere in the series by now."""
        return self.result is not None and self.result.last_instance_at >= self.last_instance_at


class Headers:
    """Patient and study attributes of images, read once per file."""

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir
        self._known: Recent[str, Patient] = Recent(4096)

    def patient(self, path: str | None) -> Patient:
        """Empty fields where there is no readable header now: the series stays in the list, and is looked at again."""
        if not path:
            return Patient()
        try:
            return self._known.get(path, lambda: _read_patient(self._data_dir / path))
        except PYDICOM_ERRORS:
            return Patient()


def entries(db: sqlite3.Connection, headers: Headers, *, show: str, page: int) -> tuple[Entry, ...]:
    """One page of the worklist, newest first. `show` is a key of SHOWN, `page` counts from 1."""
    newest_first = "ORDER BY s.last_instance_at DESC, s.series_no DESC"
    selected = f"SELECT s.series_no {_FROM} WHERE {SHOWN[show]} {newest_first} LIMIT ? OFFSET ?"  # sorts numbers only
    rows = db.execute(
        f"{_COLUMNS}{_FROM} WHERE s.series_no IN ({selected}) {newest_first}", (PAGE_ROWS, (page - 1) * PAGE_ROWS)
    ).fetchall()
    return tuple(_entry(db, row, headers) for row in rows)


def find(db: sqlite3.Connection, headers: Headers, series_no: int) -> Entry:
    """Raises UnknownSeriesError."""
    row = db.execute(f"{_COLUMNS}{_FROM} WHERE s.series_no = ?", (series_no,)).fetchone()
    if row is None:
        raise reviews.UnknownSeriesError(
            f"there is no series {series_no} on this box", advice="go back to the worklist"
        )
    return _entry(db, row, headers)


def counts(db: sqlite3.Connection) -> dict[str, int]:
    """How many series each key of SHOWN lists."""
    sums = ", ".join(f"COUNT(CASE WHEN {condition} THEN 1 END)" for condition in SHOWN.values())
    return dict(zip(SHOWN, db.execute(f"SELECT {sums} {_FROM}").fetchone(), strict=True))


def _entry(db: sqlite3.Connection, row: sqlite3.Row, headers: Headers) -> Entry:
    result = review = None
    if row["result_no"] is not None:
        result = Result(
            row["result_no"], row["version"], row["release_version"], row["read_at"], row["read_to"], row["maps_path"],
            reviews.stated(row["findings"]),
        )  # fmt: skip
        if row["review_no"] is not None:
            review = Review(
                row["review_no"], row["result_no"], row["version"], row["verdict"], row["label"], row["reviewer"],
                row["reviewed_at"],
            )  # fmt: skip
    return Entry(
        series_no=row["series_no"],
        Modality=row["Modality"],
        state=row["state"],
        reason=row["reason"],
        instance_count=row["instance_count"],
        last_instance_at=row["last_instance_at"],
        images_removed_at=row["removed_at"],
        patient=headers.patient(row["path"]),
        result=result,
        review=review,
        delivery=_delivery(db, row["result_no"]) if result else Delivery(),
    )


def _delivery(db: sqlite3.Connection, result_no: int) -> Delivery:
    items = db.execute("SELECT state, attempts, last_error FROM outbox WHERE result_no = ?", (result_no,)).fetchall()
    states = [item["state"] for item in items]
    state = next((state for state in ("refused", "pending", "delivered") if state in states), "none")
    return Delivery(
        state=state,
        delivered=states.count("delivered"),
        total=len(items),
        attempts=max((item["attempts"] for item in items), default=0),
        last_error=next((item["last_error"] for item in items if item["state"] == state), ""),
    )


def _read_patient(path: Path) -> Patient:
    """Raises one of PYDICOM_ERRORS. Empty for a deflated file that pydicom, which inflates it whole, could not hold."""
    if inflates_beyond(path, MAX_INFLATED):
        return Patient()
    ds = dcmread(path, stop_before_pixels=True, specific_tags=["SpecificCharacterSet", *_KEYWORDS])
    character_sets = ds.get("SpecificCharacterSet") or ""
    encodings = convert_encodings([character_sets] if isinstance(character_sets, str) else list(character_sets))
    values = {keyword: decode_bytes(_raw(ds, keyword), encodings, _PN_DELIMITERS).strip(" \0") for keyword in _KEYWORDS}
    return Patient(**values | {"PatientName": _spoken(values["PatientName"])})


def _raw(ds: Dataset, keyword: str) -> bytes:
    """The element's own bytes: pydicom's conversion would judge the value and print it in a warning."""
    value = ds.get_item(keyword).value if keyword in ds else b""
    return value if isinstance(value, bytes) else str(value or "").encode()


def _spoken(name: str) -> str:
    """The alphabetic (else first filled) group of a PN, as `Family, Given Middle`. Source: PS3.5 section 6.2.1."""
    group = next((group for group in name.split("=") if group.strip("^ ")), "")
    family, *others = group.split("^")
    given = " ".join(part for part in others[:2] if part)
    return ", ".join(part for part in (family, given) if part)
