"""Delivery: results reach a real PACS, wait while it is away, and are kept where it refuses them."""

import shutil
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from pydicom.uid import ComprehensiveSRStorage, ExplicitVRLittleEndian, SecondaryCaptureImageStorage
from pynetdicom import AE, evt
from pynetdicom.dimse import DIMSEServiceProvider

from benchmarks.orthanc import Orthanc, binary
from edge_agent import config, database, delivery, pacs, report
from edge_agent.config import Config
from edge_agent.delivery import Delivery, wait_s
from edge_agent.pacs import IDLE_S, Answer, Outcome, PacsAwayError, judge
from edge_agent.report import ReportFile
from tests.edge_agent.report_support import findings, open_reader, series

NOW = 1_700_000_000.0

needs_orthanc = pytest.mark.skipif(binary() is None, reason="orthanc is not installed")


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[ReportFile, ...]:
    """One structured report and one capture."""
    folder = tmp_path_factory.mktemp("written")
    decoded = series("XR", "nodule", folder)[1]
    return report.write(findings(open_reader(folder), decoded), decoded, folder, series_no=3, version=1)


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    (tmp_path / "reports").mkdir()
    return tmp_path


@pytest.fixture
def db(data_dir: Path) -> Iterator[sqlite3.Connection]:
    opened = database.connect(data_dir)
    opened.execute(
        "INSERT INTO series (series_no, StudyInstanceUID, SeriesInstanceUID, Modality, state, first_instance_at,"
        " last_instance_at) VALUES (3, '1.2', '1.2.3', 'CR', 'read', 0, 0)"
    )
    opened.execute("INSERT INTO results VALUES (5, 3, 1, 'd', 0, 'CPU', '{}', '', 0, 0, 0)")
    yield opened
    opened.close()


def configured(data_dir: Path, port: int, ae_title: str = "ORTHANC") -> Config:
    where = {"enabled": True, "host": "127.0.0.1", "port": port, "ae_title": ae_title, "calling_ae_title": "WARDROUND"}
    return config.parse({"pacs": where, "box": {"data_dir": "."}}, folder=data_dir)


def fill(db: sqlite3.Connection, data_dir: Path, written: tuple[ReportFile, ...]) -> None:
    files = [ReportFile(f.kind, f.SOPInstanceUID, Path(shutil.copy(f.path, data_dir / "reports"))) for f in written]
    delivery.enqueue(db, 5, files, data_dir, NOW)


def rows(db: sqlite3.Connection) -> list[sqlite3.Row]:
    return db.execute("SELECT * FROM outbox ORDER BY item_no").fetchall()


def states(db: sqlite3.Connection) -> list[str]:
    return [row["state"] for row in rows(db)]


def empty(sender: Delivery, db: sqlite3.Connection) -> None:
    while sender.step(db):
        pass


def closed_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextmanager
def scp(answer: Callable[[evt.Event], int], *classes: str, reject: bool = False) -> Iterator[int]:
    """A PACS that answers each C-STORE as told; gives its port."""
    ae = AE("PACS")
    for uid in classes or (ComprehensiveSRStorage, SecondaryCaptureImageStorage):
        ae.add_supported_context(uid, ExplicitVRLittleEndian)
    ae.require_called_aet = reject
    server = ae.start_server(("127.0.0.1", 0), block=False, evt_handlers=[(evt.EVT_C_STORE, answer)])
    try:
        yield int(server.socket.getsockname()[1])
    finally:
        server.shutdown()


# --- the outbox


def test_the_same_result_enters_the_outbox_once(
    db: sqlite3.Connection, data_dir: Path, written: tuple[ReportFile, ...]
) -> None:
    fill(db, data_dir, written)
    delivery.mark_delivered(db, 1, NOW)
    fill(db, data_dir, written)
    assert [(row["kind"], row["state"]) for row in rows(db)] == [("SR", "delivered"), ("SC", "pending")]
    assert [row["path"] for row in rows(db)] == ["reports/3-1-SR.dcm", "reports/3-1-SC.dcm"]


@pytest.mark.parametrize(
    ("status", "outcome"),
    [
        (0x0000, Outcome.DELIVERED),
        (0xB000, Outcome.DELIVERED),  # coercion of data elements
        (0xB007, Outcome.DELIVERED),
        (0x0111, Outcome.DELIVERED),  # duplicate: it has it already
        (0xA700, Outcome.LATER),  # out of resources
        (0xA7FF, Outcome.LATER),
        (0x0110, Outcome.LATER),  # processing failure
        (0xA900, Outcome.REFUSED),  # does not match SOP class
        (0xC000, Outcome.REFUSED),  # cannot understand
        (0x0122, Outcome.REFUSED),  # SOP class not supported
        (0x0124, Outcome.REFUSED),  # not authorised
    ],
)
def test_what_a_status_means_for_the_object(status: int, outcome: Outcome) -> None:
    answer = judge(status)
    assert answer.outcome is outcome
    assert (answer.text == "") == (status == 0)
    assert status == 0 or f"0x{status:04X}" in answer.text


def test_waits_double_up_to_a_minute_and_differ_between_boxes() -> None:
    assert [wait_s(n, 0.0) for n in range(8)] == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0]
    assert wait_s(3, 1.0) == 4.0
    assert wait_s(10_000, 0.0) == 60.0


# --- a PACS that refuses


def test_an_object_refused_for_good_is_kept_with_its_reason_and_not_tried_again(
    db: sqlite3.Connection, data_dir: Path, written: tuple[ReportFile, ...], caplog: pytest.LogCaptureFixture
) -> None:
    calls = []

    def answer(event: evt.Event) -> int:
        calls.append(event.request.AffectedSOPClassUID)
        return 0xA900 if event.request.AffectedSOPClassUID == ComprehensiveSRStorage else 0x0000

    fill(db, data_dir, written)
    with scp(answer) as port:
        clock = Clock()
        sender = Delivery(configured(data_dir, port), clock)
        empty(sender, db)
        clock.now += 1e6
        empty(sender, db)
        sender._sender.close()
    assert calls == [ComprehensiveSRStorage, SecondaryCaptureImageStorage]
    assert states(db) == ["refused", "delivered"]
    assert "0xA900" in rows(db)[0]["last_error"]
    assert "series 3: the PACS refused the SR" in caplog.text
    assert (data_dir / rows(db)[0]["path"]).exists()


def test_refused_objects_are_tried_again_on_request(
    db: sqlite3.Connection, data_dir: Path, written: tuple[ReportFile, ...]
) -> None:
    fill(db, data_dir, written)
    delivery.mark_refused(db, 1, "0xC000")
    assert delivery.retry_refused(db, NOW) == 1
    assert states(db) == ["pending", "pending"]
    with scp(lambda event: 0x0000) as port:
        sender = Delivery(configured(data_dir, port), Clock())
        empty(sender, db)
        sender._sender.close()
    assert [(row["state"], row["last_error"]) for row in rows(db)] == [("delivered", "")] * 2


def test_a_full_pacs_is_asked_again_later(
    db: sqlite3.Connection, data_dir: Path, written: tuple[ReportFile, ...]
) -> None:
    statuses = [0xA700, 0x0000, 0x0000]
    fill(db, data_dir, written)
    with scp(lambda event: statuses.pop(0)) as port:
        clock = Clock()
        sender = Delivery(configured(data_dir, port), clock)
        empty(sender, db)
        assert states(db) == ["pending", "delivered"]
        assert "0xA700" in rows(db)[0]["last_error"]
        assert NOW < rows(db)[0]["next_try_at"] <= NOW + 1.0
        clock.now += 1.0
        empty(sender, db)
        sender._sender.close()
    assert states(db) == ["delivered", "delivered"]
    assert rows(db)[0]["attempts"] == 2


def test_a_warning_counts_as_delivered_and_is_kept(
    db: sqlite3.Connection, data_dir: Path, written: tuple[ReportFile, ...]
) -> None:
    fill(db, data_dir, written)
    with scp(lambda event: 0xB000) as port:
        sender = Delivery(configured(data_dir, port), Clock())
        empty(sender, db)
        sender._sender.close()
    assert states(db) == ["delivered", "delivered"]
    assert "0xB000" in rows(db)[0]["last_error"]


def test_a_pacs_that_takes_no_reports_still_gets_the_capture(
    db: sqlite3.Connection, data_dir: Path, written: tuple[ReportFile, ...]
) -> None:
    fill(db, data_dir, written)
    with scp(lambda event: 0x0000, SecondaryCaptureImageStorage) as port:
        sender = Delivery(configured(data_dir, port), Clock())
        empty(sender, db)
        sender._sender.close()
    assert states(db) == ["refused", "delivered"]
    assert "does not take Comprehensive SR Storage" in rows(db)[0]["last_error"]


def test_a_rejected_association_waits_and_says_why(
    db: sqlite3.Connection, data_dir: Path, written: tuple[ReportFile, ...]
) -> None:
    fill(db, data_dir, written)
    with scp(lambda event: 0x0000, reject=True) as port:
        sender = Delivery(configured(data_dir, port, ae_title="WRONG"), Clock())
        empty(sender, db)
    assert states(db) == ["pending", "pending"]
    assert all("Called AE title not recognised" in row["last_error"] for row in rows(db))


@pytest.mark.parametrize("spoil", [Path.unlink, lambda path: path.write_bytes(b"not DICOM")])
def test_a_report_file_that_is_gone_or_damaged_does_not_block_the_others(
    db: sqlite3.Connection, data_dir: Path, written: tuple[ReportFile, ...], spoil: Callable[[Path], object]
) -> None:
    fill(db, data_dir, written)
    spoil(data_dir / "reports" / "3-1-SR.dcm")
    with scp(lambda event: 0x0000) as port:
        sender = Delivery(configured(data_dir, port), Clock())
        empty(sender, db)
        sender._sender.close()
    assert states(db) == ["refused", "delivered"]
    assert rows(db)[0]["last_error"].startswith("the report file is")


# --- a PACS that is away


def test_a_pacs_that_is_away_is_not_asked_for_each_object(
    db: sqlite3.Connection, data_dir: Path, written: tuple[ReportFile, ...], caplog: pytest.LogCaptureFixture
) -> None:
    fill(db, data_dir, written)
    clock = Clock()
    sender = Delivery(configured(data_dir, closed_port()), clock)
    for _ in range(5):
        empty(sender, db)
    assert states(db) == ["pending", "pending"]
    assert [row["attempts"] for row in rows(db)] == [1, 0]
    assert all("there is none at that address" in row["last_error"] for row in rows(db))
    clock.now += 60.0
    empty(sender, db)
    assert rows(db)[0]["attempts"] == 2
    assert caplog.text.count("results wait") == 1


def test_one_association_serves_many_objects_and_is_released_when_idle(
    db: sqlite3.Connection, data_dir: Path, written: tuple[ReportFile, ...]
) -> None:
    associations = set()

    def answer(event: evt.Event) -> int:
        associations.add(id(event.assoc))
        return 0x0000

    fill(db, data_dir, written)
    with scp(answer) as port:
        clock = Clock()
        sender = Delivery(configured(data_dir, port), clock)
        empty(sender, db)
        assert len(associations) == 1
        sender._sender.release_idle(clock())
        assert sender._sender._is_open
        clock.now += IDLE_S + 1.0
        sender._sender.release_idle(clock())
        assert not sender._sender._is_open


def test_an_association_that_the_pacs_dropped_is_opened_again_at_once(
    db: sqlite3.Connection, data_dir: Path, written: tuple[ReportFile, ...]
) -> None:
    """The first object's answer is an abort: the association was open and idle for all we knew."""
    fill(db, data_dir, written)
    with scp(lambda event: 0x0000) as port:
        sender = Delivery(configured(data_dir, port), Clock())
        assert sender.step(db)
        association = sender._sender._association
        assert association is not None
        association.dul.socket.socket.shutdown(socket.SHUT_RDWR)
        assert sender.step(db)
        sender._sender.close()
    assert states(db) == ["delivered", "delivered"]


def test_a_thread_of_the_library_that_is_held_up_steals_no_answer(
    db: sqlite3.Connection, data_dir: Path, written: tuple[ReportFile, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A busy machine: the library's thread is held up right after it saw that it may go on, and ours before it waits."""

    class HeldUp(pacs._Checkpoint):
        def wait(self, timeout: float | None = None) -> bool:
            may_go_on = super().wait(timeout)
            time.sleep(0.1)
            return may_go_on

    take = DIMSEServiceProvider.get_msg

    def take_late(self: DIMSEServiceProvider, block: bool = False) -> Any:
        time.sleep(0.3 if block else 0.0)
        return take(self, block)

    monkeypatch.setattr(DIMSEServiceProvider, "get_msg", take_late)
    monkeypatch.setattr(pacs, "_Checkpoint", HeldUp)
    monkeypatch.setattr(pacs, "ANSWER_TIMEOUT_S", 2.0)
    came = []
    fill(db, data_dir, written)
    with scp(lambda event: came.append(event) or 0x0000) as port:
        sender = Delivery(configured(data_dir, port), Clock())
        assert sender.step(db)
        assert sender.step(db)
        sender._sender.close()
    assert states(db) == ["delivered", "delivered"]
    assert len(came) == 2  # neither was sent twice


# --- a real PACS


@pytest.mark.slow
@needs_orthanc
def test_orthanc_takes_both_objects_into_the_same_study(
    db: sqlite3.Connection, data_dir: Path, written: tuple[ReportFile, ...], tmp_path: Path
) -> None:
    fill(db, data_dir, written)
    with Orthanc(tmp_path / "pacs") as pacs:
        clock = Clock()
        sender = Delivery(configured(data_dir, pacs.dicom_port), clock)
        empty(sender, db)
        sender._sender.close()
        stored = pacs.instances()
        studies = pacs.get("/studies")
    assert {tags["SOPInstanceUID"] for tags in stored} == {file.SOPInstanceUID for file in written}
    assert {tags["PatientID"] for tags in stored} == {"WRPH000007"}
    assert len(studies) == 1
    assert [(row["state"], row["delivered_at"], row["attempts"], row["last_error"]) for row in rows(db)] == [
        ("delivered", NOW, 1, "")
    ] * 2


@pytest.mark.slow
@needs_orthanc
def test_results_arrive_when_the_pacs_is_back(
    db: sqlite3.Connection, data_dir: Path, written: tuple[ReportFile, ...], tmp_path: Path
) -> None:
    """Delivered to, then killed with the association open, then back: nothing is lost, nothing is doubled."""
    pacs = Orthanc(tmp_path / "pacs")
    clock = Clock()
    sender = Delivery(configured(data_dir, pacs.dicom_port), clock)
    fill(db, data_dir, written)
    empty(sender, db)
    assert states(db) == ["pending", "pending"]
    try:
        pacs.start()
        pacs.wait_ready()
        clock.now += 60.0
        assert sender.step(db)
        assert states(db) == ["delivered", "pending"]
        pacs.kill()
        empty(sender, db)
        assert states(db) == ["delivered", "pending"]
        pacs.start()
        pacs.wait_ready()
        clock.now += 60.0
        empty(sender, db)
        sender._sender.close()
        assert states(db) == ["delivered", "delivered"]
        assert pacs.count_instances() == 2
    finally:
        pacs.stop()


@pytest.mark.slow
@needs_orthanc
def test_the_thread_delivers_what_is_put_in_and_stops(
    db: sqlite3.Connection, data_dir: Path, written: tuple[ReportFile, ...], tmp_path: Path
) -> None:
    stop = threading.Event()
    with Orthanc(tmp_path / "pacs") as pacs:
        thread = threading.Thread(target=Delivery(configured(data_dir, pacs.dicom_port), time.time).run, args=(stop,))
        thread.start()
        fill(db, data_dir, written)
        while "pending" in states(db):
            time.sleep(0.05)
        stop.set()
        thread.join(30.0)
        assert not thread.is_alive()
        assert pacs.count_instances() == 2
    assert states(db) == ["delivered", "delivered"]


def test_an_object_that_the_pacs_breaks_off_at_lets_the_next_go_first(
    db: sqlite3.Connection, data_dir: Path, written: tuple[ReportFile, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(db, data_dir, written)
    clock = Clock()
    sending = Delivery(configured(data_dir, 1), clock)

    def breaks_off_at_the_report(path: Path, now: float) -> Answer:
        if path.name.endswith("SR.dcm"):
            raise PacsAwayError("the PACS closed the association")
        return Answer(Outcome.DELIVERED)

    monkeypatch.setattr(sending._sender, "store", breaks_off_at_the_report)
    for _ in range(20):
        sending.step(db)
        clock.now += 1.0
    assert {row["kind"]: row["state"] for row in rows(db)} == {"SR": "pending", "SC": "delivered"}


def test_a_host_name_that_does_not_resolve_is_a_pacs_that_is_away(
    db: sqlite3.Connection, data_dir: Path, written: tuple[ReportFile, ...]
) -> None:
    fill(db, data_dir, written)
    pacs = {"enabled": True, "host": "pacs.invalid", "port": 104}
    sending = Delivery(config.parse({"pacs": pacs, "box": {"data_dir": "."}}, folder=data_dir), Clock())
    assert not sending.step(db)
    assert all("pacs.invalid cannot be reached" in row["last_error"] for row in rows(db))
