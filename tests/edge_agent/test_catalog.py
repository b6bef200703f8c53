"""The catalog's state table: when a series is due, what re-opens it, what kill -9 leaves and how it is mended."""

import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from edge_agent import catalog, instances
from edge_agent.catalog import TRANSITIONS, Event, Outcome, State
from edge_agent.database import connect
from edge_agent.instances import Header, Kept
from tests.edge_agent.dicom_support import ct_slice, write

QUIET_S = 10.0


@pytest.fixture
def db(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    connection = connect(tmp_path)
    yield connection
    connection.close()


def header(series: str = "1.2.3.4", *, expected: int | None = None, study: str = "1.2.3") -> Header:
    return Header("1.2.840.10008.5.1.4.1.1.2", generate_uid(), study, series, "CT", ExplicitVRLittleEndian, expected)


def kept(name: str = "") -> Kept:
    sha256 = name or generate_uid()
    return Kept(f"instances/00/{sha256}.dcm", 100, sha256)


def add(db: sqlite3.Connection, head: Header, *, now: float, file: Kept | None = None) -> catalog.Admission:
    return catalog.add_instance(db, head, file or kept(), calling_ae="CT1", now=now)


def due(db: sqlite3.Connection, now: float) -> catalog.SeriesRow | None:
    return catalog.next_due(db, now, quiet_time_s=QUIET_S)


def state(db: sqlite3.Connection, series_no: int = 1) -> State:
    return catalog.series(db, series_no).state


def test_a_series_of_unknown_size_is_due_after_the_quiet_time(db: sqlite3.Connection) -> None:
    add(db, header(), now=100.0)
    add(db, header(), now=105.0)
    assert due(db, 114.9) is None
    row = due(db, 115.0)
    assert row is not None
    assert (row.series_no, row.state, row.instance_count, row.version) == (1, State.DUE, 2, 0)


def test_the_expected_count_makes_it_due_when_its_association_ends_and_not_before(db: sqlite3.Connection) -> None:
    add(db, header(expected=2), now=100.0)
    catalog.association_ended(db, {catalog.SeriesNo(1): 100.0})
    assert due(db, 100.1) is None
    add(db, header(expected=2), now=100.2)
    assert due(db, 100.3) is None
    catalog.association_ended(db, {catalog.SeriesNo(1): 100.2})
    assert due(db, 100.3) is not None


def test_an_association_that_ends_does_not_close_what_another_still_feeds(db: sqlite3.Connection) -> None:
    add(db, header(expected=1), now=100.0)
    add(db, header(expected=1), now=101.0)  # brought by the other association
    catalog.association_ended(db, {catalog.SeriesNo(1): 100.0})
    assert due(db, 101.0) is None


def test_the_end_of_an_association_alone_says_nothing_about_an_unknown_size(db: sqlite3.Connection) -> None:
    add(db, header(), now=100.0)
    catalog.association_ended(db, {catalog.SeriesNo(1): 100.0})
    assert due(db, 105.0) is None


def test_a_clock_that_was_set_back_holds_nothing_up(db: sqlite3.Connection) -> None:
    add(db, header(), now=1e9)
    assert due(db, 1e6) is not None


def test_the_series_that_waits_longest_comes_first_and_stays_until_marked(db: sqlite3.Connection) -> None:
    add(db, header("1.1"), now=100.0)
    add(db, header("1.2"), now=99.0)
    assert [due(db, 200.0), due(db, 200.0)] == [catalog.series(db, 2)] * 2
    catalog.mark_failed(db, 2, "no pixels")
    row = due(db, 200.0)
    assert row is not None
    assert row.series_no == 1


def test_from_due_to_reported(db: sqlite3.Connection) -> None:
    add(db, header(), now=0.0)
    row = due(db, 100.0)
    assert row is not None
    assert catalog.mark_read(db, row) == 1
    assert catalog.mark_read(db, row) == 1  # twice is once
    assert state(db) is State.READ
    catalog.mark_reported(db, 1)
    assert state(db) is State.REPORTED
    assert due(db, 1000.0) is None


def test_marks_join_the_transaction_of_their_caller(db: sqlite3.Connection) -> None:
    add(db, header(), now=0.0)
    row = due(db, 100.0)
    assert row is not None
    db.execute("BEGIN IMMEDIATE")
    catalog.mark_read(db, row)
    db.execute("ROLLBACK")
    assert (state(db), catalog.series(db, 1).version) == (State.DUE, 0)


@pytest.mark.parametrize("became", [State.DUE, State.READ, State.REPORTED, State.FAILED, State.NOT_FOR_US])
def test_a_late_instance_reopens_whatever_became_of_the_series(db: sqlite3.Connection, became: State) -> None:
    add(db, header(), now=0.0)
    db.execute("UPDATE series SET state = ?, version = 1, reason = 'old', association_ended = 1", (became,))
    add(db, header(), now=50.0)
    row = catalog.series(db, 1)
    assert (row.state, row.version, row.instance_count, row.reason) == (State.RECEIVING, 1, 2, "")
    assert due(db, 55.0) is None
    again = due(db, 60.0)
    assert again is not None
    assert catalog.mark_read(db, again) == 2


def test_an_instance_that_comes_while_the_series_is_read_is_not_forgotten(db: sqlite3.Connection) -> None:
    add(db, header(), now=0.0)
    row = due(db, 100.0)
    assert row is not None
    add(db, header(), now=101.0)
    assert catalog.mark_read(db, row) == 1
    catalog.mark_reported(db, 1)
    assert state(db) is State.RECEIVING
    second = due(db, 111.0)
    assert second is not None
    assert (second.version, second.instance_count) == (1, 2)


def test_the_same_bytes_again_change_nothing(db: sqlite3.Connection) -> None:
    head, file = header(), kept("aa")
    add(db, head, file=file, now=0.0)
    db.execute("UPDATE series SET state = 'reported'")
    assert add(db, head, file=file, now=50.0).outcome is Outcome.AGAIN
    assert (state(db), catalog.series(db, 1).instance_count) == (State.REPORTED, 1)


def test_the_same_uid_with_other_content_is_set_aside_and_the_first_stays(db: sqlite3.Connection) -> None:
    head = header()
    add(db, head, file=kept("aa"), now=0.0)
    for _ in range(2):
        add(db, head, file=kept("bb"), now=1.0)
    (row,) = catalog.quarantined(db)
    assert row.reason == "SOPInstanceUID came before with other content"
    assert (row.path, row.calling_ae) == ("instances/00/bb.dcm", "CT1")
    assert db.execute("SELECT sha256 FROM instances").fetchone()["sha256"] == "aa"


def test_other_content_replaces_a_copy_that_could_not_be_decoded(db: sqlite3.Connection) -> None:
    head, bad, good = header(), kept("aa"), kept("bb")
    add(db, head, file=bad, now=0.0)
    due(db, 100.0)
    catalog.mark_failed(db, 1, "cut short", [bad.path])
    assert add(db, head, file=good, now=101.0) == catalog.Admission(Outcome.CATALOGED, catalog.SeriesNo(1))
    row = catalog.series(db, 1)
    assert (row.state, row.reason, row.instance_count, row.last_instance_at) == (State.RECEIVING, "", 1, 101.0)
    assert [dict(r)["path"] for r in db.execute("SELECT path FROM instances")] == [good.path]
    (old,) = catalog.quarantined(db)
    assert (old.path, old.reason) == (bad.path, "could not be decoded; another copy took its place")
    assert add(db, head, file=bad, now=102.0).outcome is Outcome.AGAIN  # the bad one once more changes nothing
    assert [dict(r)["path"] for r in db.execute("SELECT path FROM instances")] == [good.path]


def test_beside_an_unreadable_instance_the_readable_ones_are_not_replaced(db: sqlite3.Connection) -> None:
    sound, damaged = header(), header()
    add(db, sound, file=kept("aa"), now=0.0)
    add(db, damaged, file=kept("bb"), now=0.0)
    due(db, 100.0)
    catalog.mark_failed(db, 1, "cut short", [kept("bb").path])
    assert add(db, sound, file=kept("cc"), now=101.0).outcome is Outcome.QUARANTINED
    assert state(db) is State.FAILED


def test_an_unreadable_instance_is_not_replaced_from_another_series(db: sqlite3.Connection) -> None:
    head = header()
    add(db, head, file=kept("aa"), now=0.0)
    due(db, 100.0)
    catalog.mark_failed(db, 1, "cut short", [kept("aa").path])
    elsewhere = replace(head, SeriesInstanceUID="1.2.3.5")
    assert add(db, elsewhere, file=kept("bb"), now=101.0).outcome is Outcome.QUARANTINED


def test_once_read_a_copy_is_no_longer_unreadable(db: sqlite3.Connection) -> None:
    head, file = header(), kept("aa")
    add(db, head, file=file, now=0.0)
    due(db, 100.0)
    catalog.mark_failed(db, 1, "the decoder is missing", [file.path])
    add(db, head, file=file, now=101.0)  # sent again, after a software update
    row = due(db, 200.0)
    assert row is not None
    catalog.mark_read(db, row)
    assert add(db, head, file=kept("bb"), now=201.0).outcome is Outcome.QUARANTINED


def _two_copies(db: sqlite3.Connection, tmp_path: Path) -> tuple[Kept, Kept]:
    """The same UID twice, the second set aside because nobody has tried to read the first."""
    ds = ct_slice("1.1")
    first = instances.keep(tmp_path, (write(ds, tmp_path / "a").read_bytes(),), min_free_bytes=0)
    ds.ImageComments = "corrected"
    second = instances.keep(tmp_path, (write(ds, tmp_path / "b").read_bytes(),), min_free_bytes=0)
    for copy in (first, second):
        add(db, instances.read_file_header(tmp_path / copy.path), file=copy, now=0.0)
    assert [row.path for row in catalog.quarantined(db)] == [second.path]
    due(db, 100.0)
    catalog.mark_failed(db, 1, "cut short", [first.path])
    return first, second


def test_a_copy_that_came_before_the_first_was_read_takes_its_place(db: sqlite3.Connection, tmp_path: Path) -> None:
    first, second = _two_copies(db, tmp_path)
    catalog.offer_rivals(db, tmp_path, now=101.0)
    assert state(db) is State.RECEIVING
    assert instances.open(db, tmp_path, 1) == (tmp_path / second.path,)
    assert [row.path for row in catalog.quarantined(db)] == [first.path]


def test_two_unreadable_copies_do_not_change_places_for_ever(db: sqlite3.Connection, tmp_path: Path) -> None:
    _, second = _two_copies(db, tmp_path)
    catalog.offer_rivals(db, tmp_path, now=101.0)
    due(db, 200.0)
    catalog.mark_failed(db, 1, "cut short", [second.path])
    catalog.offer_rivals(db, tmp_path, now=201.0)
    assert state(db) is State.FAILED


def test_killed_between_the_failure_and_the_rival(db: sqlite3.Connection, tmp_path: Path) -> None:
    _, second = _two_copies(db, tmp_path)
    catalog.repair(db, tmp_path, now=101.0)
    assert state(db) is State.RECEIVING
    assert instances.open(db, tmp_path, 1) == (tmp_path / second.path,)


def test_a_series_does_not_change_its_study(db: sqlite3.Connection) -> None:
    add(db, header(study="1.2.3"), now=0.0)
    assert add(db, header(study="9.9.9"), now=1.0).outcome is Outcome.QUARANTINED
    assert catalog.quarantined(db)[0].reason == "its series belongs to another study"
    assert catalog.series(db, 1).instance_count == 1


def test_every_state_can_be_left_and_reached() -> None:
    assert {state for state, _ in TRANSITIONS} == set(State)
    assert set(TRANSITIONS.values()) == set(State)
    assert {event for _, event in TRANSITIONS} == set(Event)


def test_an_event_that_does_not_fit_changes_nothing(db: sqlite3.Connection) -> None:
    add(db, header(), now=0.0)
    catalog.mark_reported(db, 1)
    catalog.mark_failed(db, 1, "late")
    assert (state(db), catalog.series(db, 1).reason) == (State.RECEIVING, "")


def test_logs_show_our_number_and_no_uid(db: sqlite3.Connection, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    head = header("1.2.840.99")
    add(db, head, file=kept("aa"), now=0.0)
    add(db, head, file=kept("bb"), now=0.0)
    due(db, 100.0)
    catalog.mark_not_for_us(db, 1, "no task reads it")
    assert [record.getMessage() for record in caplog.records] == [
        "series 1: new, receiving",
        "quarantine 1: SOPInstanceUID came before with other content",
        "series 1: receiving -> due",
        "series 1: due -> not-for-us (no task reads it)",
    ]


def test_repair_after_kill_9(db: sqlite3.Connection, tmp_path: Path) -> None:
    """At each hand-over: half a file; a whole file without a row; rows of an association that never ended."""
    known = write(ct_slice("1.1", count=1), tmp_path / "known.dcm").read_bytes()
    first = instances.keep(tmp_path, (known,), min_free_bytes=0)
    head = instances.read_file_header(tmp_path / first.path)
    add(db, head, file=first, now=0.0)
    half = (tmp_path / first.path).with_name("half.tmp")
    half.write_bytes(known[:100])
    orphan = write(ct_slice("1.2", count=1), tmp_path / "orphan.dcm").read_bytes()
    instances.keep(tmp_path, (orphan,), min_free_bytes=0)
    instances.keep(tmp_path, (b"\0" * 500,), min_free_bytes=0)

    for _ in range(2):  # a repair that is cut short is run again
        catalog.repair(db, tmp_path, now=5.0)
    assert not half.exists()
    assert [row["SeriesInstanceUID"] for row in db.execute("SELECT * FROM series ORDER BY series_no")] == ["1.1", "1.2"]
    assert len(catalog.quarantined(db)) == 1
    reads = []
    while row := due(db, 5.0):
        reads.append(row.series_no)
        catalog.mark_read(db, row)
    assert reads == [1, 2]  # at once: no association is open any more
    assert instances.open(db, tmp_path, 1) == (tmp_path / first.path,)


def test_an_orphan_that_conflicts_is_set_aside(db: sqlite3.Connection, tmp_path: Path) -> None:
    ds = ct_slice("1.1")
    first = instances.keep(tmp_path, (write(ds, tmp_path / "a").read_bytes(),), min_free_bytes=0)
    add(db, instances.read_file_header(tmp_path / first.path), file=first, now=0.0)
    ds.PatientName = "OTHER^NAME"
    instances.keep(tmp_path, (write(ds, tmp_path / "b").read_bytes(),), min_free_bytes=0)
    catalog.repair(db, tmp_path, now=1.0)
    assert len(catalog.quarantined(db)) == 1


def test_expected_count_keeps_the_largest_that_was_said(db: sqlite3.Connection) -> None:
    for expected in (None, 5, 3, None):
        add(db, replace(header(), expected_count=expected), now=0.0)
    assert catalog.series(db, 1).expected_count == 5
