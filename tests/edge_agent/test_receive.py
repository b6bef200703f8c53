"""The SCP against DCMTK's own senders and against hostile bytes: stored, set aside with a reason, or refused with one."""

import contextlib
import csv
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread
from pydicom.uid import (
    CTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    generate_uid,
)
from pynetdicom import AE

from edge_agent import catalog, decode, instances, receive, retention
from edge_agent.catalog import State
from edge_agent.database import connect
from fleet_link.errors import SiteError
from tests.edge_agent.dicom_support import (
    AE_TITLE,
    SHARED_DICOM,
    RunningScp,
    ct_slice,
    dcmtk,
    encoded,
    make_config,
    running_scp,
    send_raw,
    store_raw,
    write,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.skipif(shutil.which("storescu") is None, reason="DCMTK is not installed"),
]


@pytest.fixture
def scp(tmp_path: Path) -> Iterator[RunningScp]:
    (tmp_path / "data").mkdir()
    with running_scp(tmp_path / "data") as running:
        yield running


def send(scp: RunningScp, *arguments: str) -> list[str]:
    """The statuses that storescu was told, in order."""
    sent = dcmtk("storescu", scp.port, *arguments)
    return re.findall(r"Received Store Response \((.*)\)", sent.stdout + sent.stderr)


def raw(scp: RunningScp, body: bytes, **other: str) -> int:
    uids = {"SOPClassUID": CTImageStorage, "SOPInstanceUID": "1.2.3.4.5", "TransferSyntaxUID": ExplicitVRLittleEndian}
    return send_raw(scp.port, body, **{**uids, **other})


def files(scp: RunningScp) -> list[Path]:
    return [path for path in (scp.data_dir / instances.FOLDER).rglob("*") if path.is_file()]


# --- who may call ---


def test_echo(scp: RunningScp) -> None:
    assert dcmtk("echoscu", scp.port).returncode == 0


@pytest.mark.parametrize(
    ("dicom", "called", "refusal"),
    [
        ({}, "OTHER", "Called AE Title Not Recognized"),
        ({"accept_called_ae": ("OTHER",)}, "OTHER", ""),
        ({"accept_called_ae": ("OTHER",)}, AE_TITLE, ""),
        ({"accept_called_ae": ("*",)}, "ANYTHING", ""),
        ({"accept_calling_ae": ("CT1",)}, AE_TITLE, "Calling AE Title Not Recognized"),
        ({"accept_calling_ae": ("CT1", "ECHOSCU")}, AE_TITLE, ""),
    ],
)
def test_ae_titles(
    tmp_path: Path, dicom: dict[str, Any], called: str, refusal: str, caplog: pytest.LogCaptureFixture
) -> None:
    with running_scp(tmp_path, **dicom) as scp:
        echo = dcmtk("echoscu", scp.port, called=called)
    assert (echo.returncode != 0) == bool(refusal)
    assert refusal in echo.stderr
    assert ("refused" in caplog.text) == bool(refusal)  # the operator sees it too


def test_more_associations_than_allowed_are_told_so(tmp_path: Path) -> None:
    with running_scp(tmp_path, max_associations=1) as scp:
        ae = AE("FIRST")
        ae.add_requested_context("1.2.840.10008.1.1")
        first = ae.associate("127.0.0.1", scp.port, ae_title=AE_TITLE)
        assert first.is_established
        second = dcmtk("echoscu", scp.port)
        assert second.returncode != 0
        assert "Local Limit Exceeded" in second.stderr
        first.release()
        scp.wait_for(lambda: dcmtk("echoscu", scp.port).returncode == 0)


def test_what_is_not_storage_is_refused_and_logged(scp: RunningScp, caplog: pytest.LogCaptureFixture) -> None:
    ae = AE("ASKER")
    ae.add_requested_context("1.2.840.10008.5.1.4.1.2.2.1")
    association = ae.associate("127.0.0.1", scp.port, ae_title=AE_TITLE)
    assert association.accepted_contexts == []
    association.abort()
    scp.wait_for(lambda: "Study Root Query/Retrieve Information Model - FIND" in caplog.text)


def test_a_port_in_use_is_refused_with_advice(scp: RunningScp, tmp_path: Path) -> None:
    config = make_config(tmp_path, port=scp.port)
    with pytest.raises(SiteError, match="cannot be opened") as refusal:
        receive.StorageScp(config, lambda: None).start()
    assert "dicom.port" in refusal.value.advice


# --- what is stored ---


def test_the_bytes_are_kept_as_received(scp: RunningScp) -> None:
    ds = ct_slice("1.2.3.4", count=1)
    body = encoded(ds)
    assert raw(scp, body, SOPInstanceUID=ds.SOPInstanceUID) == 0x0000
    (row,) = scp.all("instances")
    stored = (scp.data_dir / row["path"]).read_bytes()
    assert stored.endswith(body)
    meta = dcmread(scp.data_dir / row["path"]).file_meta
    assert meta.TransferSyntaxUID == row["TransferSyntaxUID"] == ExplicitVRLittleEndian
    assert meta.MediaStorageSOPInstanceUID == row["SOPInstanceUID"] == ds.SOPInstanceUID


ENCODINGS = [
    ("-xe", [], "1.2.840.10008.1.2.1"),
    ("-xi", [], "1.2.840.10008.1.2"),
    ("-xb", ["dcmconv", "+tb"], "1.2.840.10008.1.2.2"),
    ("-xd", ["dcmconv", "+td"], "1.2.840.10008.1.2.1.99"),
    ("-xs", ["dcmcjpeg", "+e1"], "1.2.840.10008.1.2.4.70"),
    ("-xt", ["dcmcjpls", "+el"], "1.2.840.10008.1.2.4.80"),
    ("-xr", ["dcmcrle"], "1.2.840.10008.1.2.5"),
    ("-xv", [], JPEG2000Lossless),
]


@pytest.mark.parametrize(("option", "encode", "syntax"), ENCODINGS, ids=[encoding[0] for encoding in ENCODINGS])
def test_storescu_in_each_transfer_syntax(
    scp: RunningScp, tmp_path: Path, option: str, encode: list[str], syntax: str
) -> None:
    ds = ct_slice("1.2.3.4", count=1)
    plain = write(ds, tmp_path / "plain.dcm")
    source = tmp_path / "encoded.dcm"
    if encode:
        subprocess.run([*encode, str(plain), str(source)], check=True)
    elif syntax == JPEG2000Lossless:
        ds.compress(JPEG2000Lossless, generate_instance_uid=False)
        write(ds, source)
    else:
        source = plain
    assert send(scp, option, str(source)) == ["Success"]
    (row,) = scp.all("instances")
    assert row["TransferSyntaxUID"] == syntax
    received = decode.to_volume(instances.open(scp.db, scp.data_dir, row["series_no"])).volume
    assert (received.voxels_ZYX == decode.to_volume([plain]).volume.voxels_ZYX).all()


def test_every_storage_class_and_every_transfer_syntax_of_data_sets_is_known() -> None:
    retired_ultrasound, retired_report, directory = (
        "1.2.840.10008.5.1.4.1.1.6",
        "1.2.840.10008.5.1.4.1.1.88.1",
        "1.2.840.10008.1.3.10",
    )
    assert {CTImageStorage, retired_ultrasound, retired_report, directory} <= receive.storage_classes()
    htj2k, jpeg_xl, retired_jpeg = "1.2.840.10008.1.2.4.201", "1.2.840.10008.1.2.4.110", "1.2.840.10008.1.2.4.55"
    assert {ExplicitVRBigEndian, htj2k, jpeg_xl, retired_jpeg} <= receive.transfer_syntaxes()
    links_instead_of_pixels, xml = "1.2.840.10008.1.2.4.94", "1.2.840.10008.1.2.6.2"
    assert not {links_instead_of_pixels, xml} & receive.transfer_syntaxes()


def test_one_association_proposes_128_classes_and_gets_them_all(scp: RunningScp) -> None:
    ae = AE("MANY")
    syntaxes = sorted(receive.transfer_syntaxes())
    for uid in sorted(receive.storage_classes())[:128]:
        ae.add_requested_context(uid, syntaxes)
    association = ae.associate("127.0.0.1", scp.port, ae_title=AE_TITLE)
    assert len(association.accepted_contexts) == 128
    association.release()


def test_of_several_transfer_syntaxes_the_callers_first_is_taken(scp: RunningScp) -> None:
    ae = AE("CHOOSER")
    ae.add_requested_context(CTImageStorage, ["1.2.3.4.5.6", JPEG2000Lossless, ExplicitVRLittleEndian])
    ae.add_requested_context("1.2.840.10008.5.1.4.1.1.4", [ImplicitVRLittleEndian, ExplicitVRLittleEndian])
    association = ae.associate("127.0.0.1", scp.port, ae_title=AE_TITLE)
    chosen = [context.transfer_syntax[0] for context in association.accepted_contexts]
    assert chosen == [JPEG2000Lossless, ImplicitVRLittleEndian]
    association.release()


@pytest.mark.parametrize("SOPClassUID", ["1.2.840.10008.5.1.4.1.1.6", "1.2.840.10008.5.1.4.1.1.88.1"])
def test_a_retired_class_is_stored(scp: RunningScp, SOPClassUID: str) -> None:
    ds = ct_slice("1.2.3.4", SOPClassUID=SOPClassUID, Modality="US")
    status = raw(scp, encoded(ds), SOPClassUID=SOPClassUID, SOPInstanceUID=ds.SOPInstanceUID)
    assert status == 0x0000
    assert scp.all("instances")[0]["SOPClassUID"] == SOPClassUID


def test_a_series_is_due_as_soon_as_its_association_is_over(scp: RunningScp, tmp_path: Path) -> None:
    folder = tmp_path / "series"
    folder.mkdir()
    for position in range(20):
        write(ct_slice("1.2.3.4", position=position, count=20), folder / f"{position}.dcm")
    assert send(scp, "+sd", str(folder)) == ["Success"] * 20
    scp.wait_for(lambda: len(scp.ended) == 1)
    row = catalog.next_due(scp.db, 0.0, quiet_time_s=1e9)
    assert row is not None
    assert (row.state, row.instance_count) == (State.DUE, 20)
    assert len(decode.to_volume(instances.open(scp.db, scp.data_dir, row.series_no)).source) == 20


def test_what_was_answered_with_success_is_read_although_the_association_was_aborted(scp: RunningScp) -> None:
    ds = ct_slice("1.2.3.4", count=1)
    ae = AE("ABORTER")
    ae.add_requested_context(CTImageStorage, ExplicitVRLittleEndian)
    association = ae.associate("127.0.0.1", scp.port, ae_title=AE_TITLE)
    uids = {"SOPClassUID": CTImageStorage, "SOPInstanceUID": ds.SOPInstanceUID}
    assert store_raw(association, encoded(ds), **uids) == 0x0000
    association.abort()
    scp.wait_for(lambda: len(scp.ended) == 1)
    assert catalog.next_due(scp.db, 0.0, quiet_time_s=1e9) is not None


def test_an_echo_alone_wakes_nobody(scp: RunningScp) -> None:
    dcmtk("echoscu", scp.port)
    ds = ct_slice("1.2.3.4")
    raw(scp, encoded(ds), SOPInstanceUID=ds.SOPInstanceUID)
    scp.wait_for(lambda: len(scp.ended) > 0)
    assert len(scp.ended) == 1


def test_the_same_instance_again_is_success_and_changes_nothing(scp: RunningScp, tmp_path: Path) -> None:
    path = write(ct_slice("1.2.3.4", count=2), tmp_path / "x.dcm")
    assert send(scp, str(path), str(path)) == ["Success", "Success"]
    assert scp.all("series")[0]["instance_count"] == 1
    assert len(files(scp)) == 1


# --- what is set aside or refused ---


def test_other_content_under_the_same_uid_is_set_aside(scp: RunningScp, tmp_path: Path) -> None:
    ds = ct_slice("1.2.3.4")
    first = write(ds, tmp_path / "a.dcm")
    ds.PatientName = "CHANGED^NAME"
    second = write(ds, tmp_path / "b.dcm")
    assert send(scp, str(first), str(second)) == ["Success", "Success"]
    (row,) = scp.all("quarantine")
    assert row["reason"] == "SOPInstanceUID came before with other content"
    assert b"CHANGED^NAME" in (scp.data_dir / row["path"]).read_bytes()


def test_junk_is_kept_and_answered_with_0xc000(scp: RunningScp, caplog: pytest.LogCaptureFixture) -> None:
    junk = b"this is not a data set, whatever its sender says"
    assert raw(scp, junk) == 0xC000
    assert raw(scp, junk) == 0xC000  # sent again: listed once
    (row,) = scp.all("quarantine")
    assert (scp.data_dir / row["path"]).read_bytes().endswith(junk)
    assert row["calling_ae"] == "RAW"
    assert "answered with 0xC000" in caplog.text


def test_another_class_than_announced_is_answered_with_0xa900(scp: RunningScp) -> None:
    ds = ct_slice("1.2.3.4")
    mr = "1.2.840.10008.5.1.4.1.1.4"
    assert raw(scp, encoded(ds), SOPClassUID=mr, SOPInstanceUID=ds.SOPInstanceUID) == 0xA900
    assert scp.all("quarantine")[0]["reason"] == "its SOP class is not the announced one"
    assert scp.all("series") == []


def test_another_instance_than_announced_is_answered_with_0xc000(scp: RunningScp) -> None:
    assert raw(scp, encoded(ct_slice("1.2.3.4")), SOPInstanceUID="9.9.9") == 0xC000
    assert scp.all("instances") == []


def test_a_report_is_success_and_listed_as_no_image(scp: RunningScp, tmp_path: Path) -> None:
    ds = ct_slice("1.2.3.4", SOPClassUID="1.2.840.10008.5.1.4.1.1.88.11", Modality="SR")
    del ds.PixelData
    assert raw(scp, encoded(ds), SOPClassUID=ds.SOPClassUID, SOPInstanceUID=ds.SOPInstanceUID) == 0x0000
    assert [row["reason"] for row in scp.all("quarantine")] == ["not an image"]
    assert scp.all("series") == []


def test_a_disk_at_its_limit_is_0xa700_with_a_clean_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ds = ct_slice("1.2.3.4")
    with running_scp(tmp_path, min_free_bytes=1 << 60) as scp:
        assert raw(scp, encoded(ds), SOPInstanceUID=ds.SOPInstanceUID) == 0xA700
        assert files(scp) == []
        assert scp.all("instances") == []
    assert "refused with 0xA700" in caplog.text


def test_a_catalog_that_refuses_is_0xa700_and_the_repeat_succeeds(scp: RunningScp) -> None:
    ds = ct_slice("1.2.3.4")
    body = encoded(ds)
    scp.db.execute("ALTER TABLE instances RENAME TO hidden")
    assert raw(scp, body, SOPInstanceUID=ds.SOPInstanceUID) == 0xA700
    scp.db.execute("ALTER TABLE hidden RENAME TO instances")
    assert raw(scp, body, SOPInstanceUID=ds.SOPInstanceUID) == 0x0000
    assert len(files(scp)) == 1


def test_no_line_of_the_log_names_a_patient_or_a_uid(
    scp: RunningScp, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="edge_agent")
    ds = ct_slice("1.2.3.4.77")
    path = write(ds, tmp_path / "x.dcm")
    ds.PatientName = "OTHER^NAME"
    send(scp, str(path), str(write(ds, tmp_path / "y.dcm")))
    raw(scp, encoded(ds), SOPInstanceUID="9.9.9")
    lines = " ".join(record.getMessage() for record in caplog.records if record.name.startswith("edge_agent"))
    assert "quarantine" in lines
    for secret in ("TEST", "OTHER", "1.2.3.4.77", ds.SOPInstanceUID):
        assert secret not in lines


# --- callers that do not behave ---


def _closed_by_peer(caller: socket.socket) -> bool:
    caller.settimeout(20)
    try:
        while caller.recv(4096):
            pass
    except ConnectionResetError:
        pass
    return True


def test_silent_callers_do_not_hold_the_port(tmp_path: Path) -> None:
    with running_scp(tmp_path, association_timeout_s=1.0, max_associations=4) as scp:
        callers = [socket.create_connection(("127.0.0.1", scp.port)) for _ in range(6)]
        assert dcmtk("echoscu", scp.port).returncode == 0  # while they are silent
        assert all(_closed_by_peer(caller) for caller in callers)


def test_too_many_connections_are_closed_at_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with running_scp(tmp_path, association_timeout_s=1.0, max_associations=1) as scp:
        callers = [socket.create_connection(("127.0.0.1", scp.port)) for _ in range(8)]
        scp.wait_for(lambda: "connection refused" in caplog.text)
        assert all(_closed_by_peer(caller) for caller in callers)
        scp.wait_for(lambda: dcmtk("echoscu", scp.port).returncode == 0)


@pytest.mark.parametrize(
    "first_bytes",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x01\x00\x7f\xff\xff\xff",  # an association request of 2 GB
        b"\x01\x00\x00\x00\x01\x00half",
        b"\x04\x00\x00\x00\x00\x04\x00\x00\x00\x00",  # data before an association
        bytes(range(256)) * 4,
    ],
)
def test_bytes_that_are_no_association_end_the_connection_and_nothing_else(tmp_path: Path, first_bytes: bytes) -> None:
    with running_scp(tmp_path, association_timeout_s=1.0, idle_timeout_s=2.0) as scp:
        caller = socket.create_connection(("127.0.0.1", scp.port))
        caller.sendall(first_bytes)
        assert _closed_by_peer(caller)
        assert dcmtk("echoscu", scp.port).returncode == 0


def _established(port: int) -> tuple[AE, Any]:
    ae = AE("SLOW")
    ae.add_requested_context(CTImageStorage, ExplicitVRLittleEndian)
    return ae, ae.associate("127.0.0.1", port, ae_title=AE_TITLE)


@pytest.mark.parametrize("pdu", [b"", b"\x04\x00", b"\x04\x00\x00\x00\x10\x00half a pdu", b"\x04\x00\x7f\xff\xff\xff"])
def test_an_association_that_stops_in_the_middle_is_ended(tmp_path: Path, pdu: bytes) -> None:
    with running_scp(tmp_path, idle_timeout_s=1.0) as scp:
        _, association = _established(scp.port)
        association.dul.socket.socket.sendall(pdu)
        scp.wait_for(lambda: not association.is_alive())
        assert dcmtk("echoscu", scp.port).returncode == 0


def test_an_endless_instance_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setattr(receive, "MAX_INSTANCE_LENGTH", 100_000)
    ds = ct_slice("1.2.3.4")
    with running_scp(tmp_path) as scp:
        assert raw(scp, encoded(ds) + b"\0" * 2_000_000, SOPInstanceUID=ds.SOPInstanceUID) == -1
        assert "an instance of more than 100000 bytes" in caplog.text
        assert files(scp) == []


def test_stop_ends_open_associations(tmp_path: Path) -> None:
    with running_scp(tmp_path) as scp:
        _, association = _established(scp.port)
    scp.wait_for(lambda: not association.is_alive())
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", scp.port))


def test_stop_ends_a_caller_that_has_not_asked_for_an_association(tmp_path: Path) -> None:
    scp = receive.StorageScp(make_config(tmp_path), lambda: None)
    scp.start()
    with socket.create_connection(("127.0.0.1", scp.port)) as caller:
        server = scp._server
        assert server is not None
        while not server.active_associations:
            time.sleep(0.01)
        scp.stop()
        assert server.active_associations == []
        assert _closed_by_peer(caller)


def test_stop_lets_who_is_storing_finish(tmp_path: Path) -> None:
    images = [ct_slice("1.2.3.4", position=position) for position in range(40)]
    db = connect(tmp_path)
    scp = receive.StorageScp(make_config(tmp_path), lambda: None)
    scp.start()
    _, association = _established(scp.port)
    answers = [_store(association, images[0])]
    stopping = threading.Thread(target=scp.stop)
    stopping.start()
    answers += [_store(association, ds) for ds in images[1:]]
    association.release()
    stopping.join()
    assert answers == [0x0000] * 40
    assert association.is_released
    assert db.execute("SELECT COUNT(*) FROM instances").fetchone()[0] == 40
    db.close()


def _store(association: Any, ds: Any) -> int:
    if not association.is_established:
        return -1
    return store_raw(association, encoded(ds), SOPClassUID=CTImageStorage, SOPInstanceUID=ds.SOPInstanceUID)


def test_a_twin_that_retention_deletes_meanwhile_is_written_again(
    scp: RunningScp, monkeypatch: pytest.MonkeyPatch
) -> None:
    ds = ct_slice("1.2.3.4")
    assert raw(scp, encoded(ds), SOPInstanceUID=ds.SOPInstanceUID) == 0x0000
    scp.db.execute("INSERT INTO removals VALUES (1, 0.0, 0)")
    add_instance = catalog.add_instance

    def after_retention(*args: Any, **kwargs: Any) -> catalog.Admission:
        retention.remove(args[0], scp.data_dir, 1)
        return add_instance(*args, **kwargs)

    monkeypatch.setattr(catalog, "add_instance", after_retention)
    assert raw(scp, encoded(ds), SOPInstanceUID=ds.SOPInstanceUID) == 0x0000
    assert len(files(scp)) == 1
    assert instances.open(scp.db, scp.data_dir, 1) == tuple(files(scp))


# --- kill -9, and every file we have ---


def test_kill_9_loses_nothing_that_was_answered_with_success(tmp_path: Path) -> None:
    data_dir, folder = tmp_path / "data", tmp_path / "series"
    data_dir.mkdir()
    folder.mkdir()
    for position in range(300):
        write(ct_slice("1.2.3.4", position=position, count=300), folder / f"{position}.dcm")
    program = (
        "import sys, time; from pathlib import Path; from tests.edge_agent.dicom_support import make_config;"
        "from edge_agent.receive import StorageScp; scp = StorageScp(make_config(Path(sys.argv[1])), lambda: None);"
        "scp.start(); print(scp.port, flush=True); time.sleep(600)"
    )
    root = Path(__file__).resolve().parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", program, str(data_dir)], stdout=subprocess.PIPE, text=True, cwd=root
    ) as box:
        assert box.stdout is not None
        port = int(box.stdout.readline())
        sender = ["storescu", "-v", "-aec", AE_TITLE, "+sd", "127.0.0.1", str(port), str(folder)]
        with subprocess.Popen(sender, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as storescu:
            assert storescu.stdout is not None
            lines = []
            for line in storescu.stdout:
                lines.append(line)
                if sum("(Success)" in line for line in lines) == 60:
                    box.send_signal(signal.SIGKILL)
                    break
            lines += list(storescu.stdout)
    answered = sum("(Success)" in line for line in lines)
    db = connect(data_dir)
    catalog.repair(db, data_dir, now=1.0)
    (row,) = db.execute("SELECT * FROM series").fetchall()
    assert 60 <= answered <= row["instance_count"] < 300
    assert not list(data_dir.rglob("*.tmp"))
    db.close()
    with running_scp(data_dir) as scp:
        assert send(scp, "+sd", str(folder)) == ["Success"] * 300
        assert scp.all("series")[0]["instance_count"] == 300
        assert scp.all("quarantine") == []


STORESCU_OPTION = {
    "1.2.840.10008.1.2": "-xi",
    "1.2.840.10008.1.2.1.99": "-xd",
    "1.2.840.10008.1.2.2": "-xb",
    "1.2.840.10008.1.2.4.50": "-xy",
    "1.2.840.10008.1.2.4.51": "-xx",
    "1.2.840.10008.1.2.4.70": "-xs",
    "1.2.840.10008.1.2.4.80": "-xt",
    "1.2.840.10008.1.2.4.81": "-xu",
    "1.2.840.10008.1.2.4.90": "-xv",
    "1.2.840.10008.1.2.4.91": "-xw",
    "1.2.840.10008.1.2.5": "-xr",
}


def _send_as_it_is(scp: RunningScp, path: Path, syntax: str) -> int:
    """What storescu refuses to send goes out unchecked, with the identifiers that pydicom can find."""
    content = path.read_bytes()
    ds = dcmread(BytesIO(content), force=True, stop_before_pixels=True)
    has_meta = content[128:132] == b"DICM"
    meta = getattr(ds, "file_meta", None) or {}
    start = 132 if has_meta else 0
    if has_meta and "FileMetaInformationGroupLength" in meta:
        start += 12 + int(meta.FileMetaInformationGroupLength)
    return raw(
        scp,
        content[start:],
        SOPClassUID=str(ds.get("SOPClassUID") or meta.get("MediaStorageSOPClassUID") or CTImageStorage),
        SOPInstanceUID=str(ds.get("SOPInstanceUID") or generate_uid()),
        TransferSyntaxUID=syntax or ImplicitVRLittleEndian,
    )


def manifest() -> list[dict[str, str]]:
    if not SHARED_DICOM.is_dir():
        return []
    with (SHARED_DICOM / "manifest.csv").open(newline="") as file:
        return list(csv.DictReader(file))


SET_ASIDE = {
    "pyd_bad_sequence.dcm": "SOPInstanceUID is not a UID",  # 64 hexadecimal digits
    "pyd_HTJ2KLossless_08_RGB.dcm": "no StudyInstanceUID",
    "pyd_JPEGLSNearLossless_16.dcm": "no StudyInstanceUID",
    "pyd_JLSN_RGB_ILV0.dcm": "no SOPInstanceUID",
    "pyd_meta_missing_tsyntax.dcm": "no SOPClassUID",
    "pyd_no_meta_group_length.dcm": "no SOPClassUID",
    "pyd_reportsi.dcm": "not an image",
    "pyd_rtstruct.dcm": "not an image",
    "pyd_ExplVR_BigEndNoMeta.dcm": "not an image",
    "pyd_waveform_ecg.dcm": "not an image",
    "pyd_DICOMDIR": "not an image",
}


@pytest.mark.skipif(not SHARED_DICOM.is_dir(), reason="the shared DICOM files are not here")
@pytest.mark.parametrize("row", manifest(), ids=[row["file"] for row in manifest()])
def test_each_real_file_is_stored_or_set_aside_with_a_reason(scp: RunningScp, row: dict[str, str]) -> None:
    path, syntax = SHARED_DICOM / row["file"], row["transfer_syntax_uid"]
    answers = send(scp, "-R", STORESCU_OPTION.get(syntax, "-xe"), str(path))
    answer = answers[0] if answers else f"{_send_as_it_is(scp, path, syntax):04X}"
    reasons = [kept["reason"] for kept in scp.all("quarantine")] + ["stored"] * len(scp.all("instances"))
    assert reasons == [SET_ASIDE.get(row["file"], "stored")]
    assert len(files(scp)) == 1
    understood = reasons[0] in ("stored", "not an image")
    assert answer in (("Success", "0000") if understood else ("Error: CannotUnderstand", "C000"))
    for series in scp.all("series"):
        with contextlib.suppress(
            decode.DecodeError
        ):  # what each becomes is test_decode's matter; nothing else is raised
            decode.to_volume(instances.open(scp.db, scp.data_dir, series["series_no"]))
