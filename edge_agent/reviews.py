"""Verdicts of radiologists: each is kept, each belongs to one version of a result.

Reads results and series; writes the reviews table.
Never changes or removes a verdict; a verdict on a result that is no longer the newest is refused.
Source: ARCHITECTURE.md, "A correction becomes knowledge".
"""

import logging
import sqlite3
from dataclasses import dataclass

import msgspec

from edge_agent.catalog import images_removed_at
from edge_agent.database import transaction
from edge_agent.findings import LabelProbability
from fleet_link.errors import SiteError
from models.adaptive import Calibration

log = logging.getLogger(__name__)

ACCEPTED = "accepted"
CORRECTED = "corrected"


class ReviewError(SiteError):
    """A verdict that does not fit the result."""


class UnknownSeriesError(ReviewError):
    """No such series, or nothing in it to review."""


class OutdatedResultError(ReviewError):
    """A newer result of the series exists than the one the reviewer saw."""


class Stated(msgspec.Struct, frozen=True):
    """What a result says, without its arrays: results.findings as edge_agent.findings.to_json wrote it."""

    task: str
    modality: str
    labels: tuple[LabelProbability, ...]
    predicted: str
    prediction_set: tuple[str, ...]
    abstained: bool
    abstain_reason: str
    ood: float
    map_label: str
    bundle_digest: str
    bundle_name: str
    bundle_version: str
    provider: str
    calibration: Calibration | None = None  # None: the bundle's

    @property
    def probability(self) -> float:
        return next(label.probability for label in self.labels if label.name == self.predicted)

    @property
    def label_names(self) -> tuple[str, ...]:
        return tuple(label.name for label in self.labels)


@dataclass(frozen=True)
class Review:
    review_no: int
    result_no: int
    version: int  # of the result that was reviewed
    verdict: str
    label: str
    reviewer: str
    reviewed_at: float


def stated(findings: str) -> Stated:
    return msgspec.json.decode(findings, type=Stated)


def record(
    db: sqlite3.Connection,
    series_no: int,
    verdict: str,
    label: str,
    reviewer: str,
    now: float,
    *,
    result_no: int | None = None,
) -> int:
    """Keep a verdict on the newest result of a series; gives its review_no. Learning picks it up from the table.

    `result_no` is the result the reviewer saw; None takes the newest. The same verdict said twice in a row is one row.
    Raises UnknownSeriesError, OutdatedResultError, ReviewError (verdict or label does not fit the result's task).
    """
    with transaction(db):
        newest = _newest_result(db, series_no)
        if result_no is not None and result_no != newest["result_no"]:
            raise OutdatedResultError(
                f"series {series_no} has a newer result (version {newest['version']}) than the one you reviewed",
                advice="look at the new result and give your verdict on it",
            )
        if images_removed_at(db, series_no) is not None:
            raise ReviewError(
                f"the images of series {series_no} were removed from this box, so nobody can judge them here",
                advice="look at them in the PACS; sent again, the box reads them again",
            )
        _check(stated(newest["findings"]), verdict, label)
        last = next(iter(history(db, series_no)), None)
        if last and (last.result_no, last.verdict, last.label, last.reviewer) == (
            newest["result_no"], verdict, label, reviewer,
        ):  # fmt: skip
            return last.review_no
        row = db.execute(
            "INSERT INTO reviews(result_no, series_no, verdict, label, reviewer, reviewed_at) VALUES (?, ?, ?, ?, ?, ?)",
            (newest["result_no"], series_no, verdict, label, reviewer, now),
        )
    log.info("series %d: result version %d %s", series_no, newest["version"], verdict)
    return int(row.lastrowid or 0)


def history(db: sqlite3.Connection, series_no: int) -> tuple[Review, ...]:
    """Every verdict on the series, newest first."""
    rows = db.execute(
        "SELECT v.review_no, v.result_no, r.version, v.verdict, v.label, v.reviewer, v.reviewed_at"
        " FROM reviews v JOIN results r USING (result_no) WHERE v.series_no = ? ORDER BY v.review_no DESC",
        (series_no,),
    )
    return tuple(Review(*row) for row in rows)


def _newest_result(db: sqlite3.Connection, series_no: int) -> sqlite3.Row:
    found: sqlite3.Row | None = db.execute(
        "SELECT result_no, version, findings FROM results WHERE series_no = ? ORDER BY version DESC LIMIT 1",
        (series_no,),
    ).fetchone()
    if found is None:
        raise UnknownSeriesError(
            f"series {series_no} has no result to review", advice="the worklist shows every series and its state"
        )
    return found


def _check(result: Stated, verdict: str, label: str) -> None:
    if verdict not in (ACCEPTED, CORRECTED):
        raise ReviewError(f"a verdict is {ACCEPTED} or {CORRECTED}, not {verdict!r}")
    if label not in result.label_names:
        raise ReviewError(
            f"{label!r} is no label of the task {result.task}", advice=f"choose one of {', '.join(result.label_names)}"
        )
    if verdict == ACCEPTED and label != result.predicted:
        raise ReviewError(
            f"the result says {result.predicted}: a verdict of {label} corrects it, it does not accept it"
        )
    if verdict == CORRECTED and label == result.predicted:
        raise ReviewError(f"the result says {result.predicted} already: accept it, or choose another label")
