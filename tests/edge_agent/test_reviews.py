"""Verdicts: what is kept, what is refused."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_agent import reviews
from models import phantoms
from tests.edge_agent.review_support import T0, ReviewBox, make_box

PROBABILITIES = {"normal": 0.1, "nodule": 0.7, "consolidation": 0.2}


@pytest.fixture(scope="module")
def nodule() -> phantoms.Phantom:
    return phantoms.phantom("XR", "nodule", 1)


@pytest.fixture
def box(tmp_path: Path, nodule: phantoms.Phantom) -> Iterator[ReviewBox]:
    """Series 1 with result 1."""
    made = make_box(tmp_path)
    series_no = made.receive(nodule, 7, T0)
    made.read(nodule, series_no, PROBABILITIES, at=T0 + 1)
    yield made
    made.db.close()


def test_accepting_and_correcting_are_both_kept_newest_first(box: ReviewBox) -> None:
    first = reviews.record(box.db, 1, "accepted", "nodule", "ada", T0 + 2, result_no=1)
    second = reviews.record(box.db, 1, "corrected", "normal", "bob", T0 + 3, result_no=1)
    kept = reviews.history(box.db, 1)
    assert [review.review_no for review in kept] == [second, first]
    assert (kept[0].verdict, kept[0].label, kept[0].reviewer, kept[0].reviewed_at, kept[0].version) == (
        "corrected", "normal", "bob", T0 + 3, 1,
    )  # fmt: skip


def test_the_same_verdict_twice_is_one_row(box: ReviewBox) -> None:
    first = reviews.record(box.db, 1, "accepted", "nodule", "ada", T0 + 2, result_no=1)
    assert reviews.record(box.db, 1, "accepted", "nodule", "ada", T0 + 9, result_no=1) == first
    assert len(reviews.history(box.db, 1)) == 1
    reviews.record(box.db, 1, "accepted", "nodule", "bob", T0 + 9, result_no=1)
    assert len(reviews.history(box.db, 1)) == 2


@pytest.mark.parametrize(
    ("verdict", "label", "why"),
    [
        ("corrected", "haemorrhage", "no label of the task"),
        ("corrected", "", "no label of the task"),
        ("accepted", "normal", "corrects it"),
        ("corrected", "nodule", "accept it"),
        ("perhaps", "nodule", "accepted or corrected"),
        ("", "nodule", "accepted or corrected"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(box: ReviewBox, verdict: str, label: str, why: str) -> None:
    with pytest.raises(reviews.ReviewError, match=why):
        reviews.record(box.db, 1, verdict, label, "ada", T0 + 2, result_no=1)
    assert reviews.history(box.db, 1) == ()


def test_no_series_no_verdict(box: ReviewBox) -> None:
    with pytest.raises(reviews.UnknownSeriesError, match="series 99"):
        reviews.record(box.db, 99, "accepted", "nodule", "ada", T0)


def test_a_series_without_a_result_takes_no_verdict(box: ReviewBox, nodule: phantoms.Phantom) -> None:
    series_no = box.receive(nodule, 8, T0)
    with pytest.raises(reviews.UnknownSeriesError, match="no result"):
        reviews.record(box.db, series_no, "accepted", "nodule", "ada", T0)


def test_a_verdict_on_an_outdated_result_is_refused(box: ReviewBox, nodule: phantoms.Phantom) -> None:
    reviews.record(box.db, 1, "accepted", "nodule", "ada", T0 + 2, result_no=1)
    box.db.execute("UPDATE series SET state = 'due'")
    newer = box.read(nodule, 1, PROBABILITIES, at=T0 + 3)
    with pytest.raises(reviews.OutdatedResultError, match="newer result") as refused:
        reviews.record(box.db, 1, "corrected", "normal", "ada", T0 + 4, result_no=1)
    assert refused.value.advice
    reviews.record(box.db, 1, "corrected", "normal", "ada", T0 + 5, result_no=newer)
    assert [review.version for review in reviews.history(box.db, 1)] == [2, 1]
