"""Labelled studies for a demonstration: made as DICOM, sent by storescu, reviewed over HTTP, read back from the box.

Reads and writes DICOM files in the work folder; talks to the boxes as scanner and as radiologist.
Never shows a box the label of an image: only a review carries it.
"""

import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import httpx
import pydicom

from benchmarks.house import Box, send_dicom
from benchmarks.processes import HouseError, wait_for
from models.phantom_dicom import write_series
from models.phantoms import LABELS, LOOKS, phantom

_RESULTS = """
SELECT s.series_no, s.SeriesInstanceUID, s.state, s.reason, r.result_no, r.findings, r.abstained, r.release_version,
       r.bundle_digest, r.provider, r.last_instance_at, r.read_at,
       (SELECT max(o.delivered_at) FROM outbox o WHERE o.result_no = r.result_no) AS delivered_at,
       (SELECT count(*) FROM outbox o WHERE o.result_no = r.result_no AND o.state = 'delivered') AS delivered
FROM series s LEFT JOIN results r ON r.series_no = s.series_no AND r.version = s.version
"""


@dataclass(frozen=True)
class Study:
    """One series of one phantom patient, as files, and the truth about it."""

    box: str
    modality: str  # XR | CT | MR
    label: str
    seed: int
    files: tuple[Path, ...]
    SeriesInstanceUID: str


@dataclass(frozen=True)
class Order:
    """How many studies of each label a box shall get."""

    box: Box
    look: str
    modalities: Sequence[str]
    per_label: int
    first_seed: int
    copy: int = 1  # another copy shows the same images under other UIDs, as a study of its own


def make(order: Order, folder: Path) -> list[Study]:
    """Write the order's studies as DICOM below `folder`, labels in turn."""
    studies = []
    for number, modality in enumerate(order.modalities):
        for position, label in enumerate(LABELS[modality] * order.per_label):
            seed = order.first_seed + 1000 * number + position  # each study is another patient's
            image = phantom(modality, label, seed, LOOKS[order.look])
            files = write_series(image, folder, patient_seed=seed, study=order.copy)
            uid = pydicom.dcmread(files[0], specific_tags=["SeriesInstanceUID"]).SeriesInstanceUID
            studies.append(Study(order.box.name, modality, label, seed, tuple(files), str(uid)))
    return studies


def make_all(orders: Sequence[Order], folder: Path) -> list[Study]:
    return [study for number, order in enumerate(orders) for study in make(order, folder / str(number))]


def send_all(boxes: Iterable[Box], studies: Sequence[Study]) -> None:
    """One association a series, the boxes side by side."""

    def send(box: Box) -> None:
        for study in studies:
            if study.box == box.name:
                send_dicom(box, study.files)

    boxes = list(boxes)
    with ThreadPoolExecutor(len(boxes)) as pool:
        list(pool.map(send, boxes))


def results(box: Box) -> dict[str, dict[str, Any]]:
    """The newest result row of each series, by SeriesInstanceUID."""
    return {row["SeriesInstanceUID"]: row for row in box.query(_RESULTS)}


def wait_read(boxes: Sequence[Box], studies: Sequence[Study], *, timeout_s: float) -> dict[str, dict[str, Any]]:
    """Results of these studies once each is in the PACS (both objects) or has failed."""

    def settled() -> dict[str, dict[str, Any]] | None:
        rows: dict[str, dict[str, Any]] = {}
        for box in boxes:
            box.daemon.must_run()
            rows |= results(box)
        wanted = {study.SeriesInstanceUID: rows.get(study.SeriesInstanceUID) for study in studies}
        found = {uid: row for uid, row in wanted.items() if row is not None and _settled(row)}
        return found if len(found) == len(wanted) else None

    return wait_for("result for every study", settled, timeout_s=timeout_s, every_s=0.2) or {}


def _settled(row: dict[str, Any]) -> bool:
    return row["state"] in ("failed", "not-for-us") or (row["state"] == "reported" and row["delivered"] == 2)


def predicted(row: dict[str, Any]) -> str:
    """The most likely label of a result row; "" where the series was not read."""
    return str(json.loads(row["findings"])["predicted"]) if row["findings"] else ""


class Reviewer:
    """A radiologist at the box's review page: the same requests that the page's forms make."""

    def __init__(self, box: Box, name: str, password: str) -> None:
        self._http = httpx.Client(base_url=box.review_url, follow_redirects=True, timeout=30.0)
        form = _hidden_fields(self._http.get("/login").text)
        answer = self._http.post("/login", data={**form, "name": name, "password": password})
        if answer.status_code != 200 or answer.url.path == "/login":
            raise HouseError(f"{box.name}: login refused ({answer.status_code})")

    def review(self, series_no: int, label: str, predicted: str) -> str:
        """Accept or correct; gives the verdict. Raises HouseError if the page refuses."""
        verdict = "accepted" if label == predicted else "corrected"
        form = _hidden_fields(self._http.get(f"/series/{series_no}").text)
        answer = self._http.post(f"/series/{series_no}/review", data={**form, "verdict": verdict, "label": label})
        if answer.status_code != 200:
            raise HouseError(f"review of series {series_no} refused ({answer.status_code}): {answer.text[:300]}")
        return verdict

    def close(self) -> None:
        self._http.close()


class _HiddenFields(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.fields: dict[str, str] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "input" and values.get("type") == "hidden" and values.get("name"):
            self.fields[str(values["name"])] = values.get("value") or ""


def _hidden_fields(html: str) -> dict[str, str]:
    parser = _HiddenFields()
    parser.feed(html)
    return parser.fields
