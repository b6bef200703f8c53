"""The review page over HTTP: who may see what, what is shown, what is kept, what is refused."""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import cv2
import httpx
import numpy as np
import pytest
from pydicom import dcmread
from pydicom.uid import generate_uid

from edge_agent import catalog, instances, retention, reviews, users
from edge_agent.pages import SECURITY_HEADERS
from models import phantom_dicom, phantoms
from tests.edge_agent.review_support import (
    PASSWORD,
    REVIEWER,
    T0,
    ReviewBox,
    form_of,
    hidden_fields,
    make_box,
    served,
    sign_in,
)

XR, CT, MR, WAITING, FAILED = 1, 2, 3, 4, 5
PRIVATE = [
    "/", "/quarantine", "/series/1", "/series/1/image/0.png", "/series/1/heatmap/0.png", "/api/worklist",
    "/api/series/1", "/api/quarantine",
]  # fmt: skip


@dataclass
class House:
    box: ReviewBox
    url: str
    browser: httpx.Client  # signed in
    stranger: httpx.Client


def fill(box: ReviewBox) -> None:
    """An X-ray with a nodule (delivered), a CT that abstained, a normal MR (accepted), one waiting, one failed."""
    xr, ct, mr = (phantoms.phantom(*what) for what in (("XR", "nodule", 1), ("CT", "nodule", 2), ("MR", "normal", 3)))
    box.receive(xr, 11, T0)
    first = box.read(xr, XR, {"normal": 0.03, "nodule": 0.91, "consolidation": 0.06}, at=T0 + 1)
    box.deliver(first, "SR", "delivered")
    box.deliver(first, "SC", "delivered")
    box.receive(ct, 12, T0 + 10)
    reason = "more than one label is plausible: normal, nodule"
    second = box.read(ct, CT, {"normal": 0.38, "nodule": 0.52, "emphysema": 0.1}, reason=reason, at=T0 + 11)
    box.deliver(second, "SR", "delivered")
    box.deliver(second, "SC", "pending", error="no answer")
    box.receive(mr, 13, T0 + 20)
    third = box.read(mr, MR, {"normal": 0.97, "neoplasm": 0.02, "haemorrhage": 0.01}, at=T0 + 21)
    box.deliver(third, "SR", "refused", error="0xA900")
    reviews.record(box.db, MR, "accepted", "normal", "Dr. Bob", T0 + 30)
    box.receive(xr, 14, T0 + 40, study=4)
    box.receive(ct, 15, T0 + 50, study=5)
    box.db.execute("UPDATE series SET state = 'failed', reason = 'the images differ in size' WHERE series_no = 5")
    kept = instances.keep(box.data_dir, [b"not DICOM <script>"], min_free_bytes=0)
    catalog.quarantine(box.db, kept, "no DICOM prefix <b>", calling_ae="CT9", now=T0)


@contextmanager
def open_house(folder: Path) -> Iterator[House]:
    box = make_box(folder)
    with served(box) as url, sign_in(url) as browser, httpx.Client(base_url=url, timeout=60.0) as stranger:
        yield House(box, url, browser, stranger)
    box.db.close()


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("filled")
    box = make_box(folder)
    fill(box)
    box.db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    box.db.close()
    return folder


@pytest.fixture(scope="module")
def house(filled: Path) -> Iterator[House]:
    """One for all tests that only look."""
    with open_house(filled) as opened:
        yield opened


@pytest.fixture
def own_house(filled: Path, tmp_path: Path) -> Iterator[House]:
    """A copy for one test that changes something."""
    shutil.copytree(filled, tmp_path / "box")
    with open_house(tmp_path / "box") as opened:
        yield opened


def test_a_stranger_sees_nothing_but_the_login(own_house: House) -> None:
    for path in PRIVATE:
        answer = own_house.stranger.get(path)
        assert answer.status_code in (303, 401), path
        assert answer.headers.get("location", "/login") == "/login"
        assert "PHANTOM" not in answer.text
    assert (
        own_house.stranger.post("/series/1/review", data={"verdict": "accepted", "label": "nodule"}).status_code == 401
    )
    assert own_house.stranger.post("/logout").status_code == 401
    assert own_house.stranger.get("/login").status_code == 200
    assert reviews.history(own_house.box.db, XR) == ()


def test_every_private_path_opens_after_the_login(house: House) -> None:
    for path in PRIVATE:
        assert house.browser.get(path).status_code == 200, path


def test_the_cookie_is_for_this_site_and_not_for_scripts(house: House) -> None:
    answer = house.stranger.post("/login", data={"name": REVIEWER, "password": PASSWORD})
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert "secure" not in cookie  # plain HTTP on loopback


def test_the_cookie_is_secure_with_tls(tmp_path: Path) -> None:
    box = make_box(tmp_path, tls_certificate=tmp_path / "c.pem", tls_key=tmp_path / "k.pem")
    with served(box) as url, httpx.Client(base_url=url) as stranger:
        answer = stranger.post("/login", data={"name": REVIEWER, "password": PASSWORD})
        assert "secure" in answer.headers["set-cookie"].lower()
        assert answer.headers["strict-transport-security"]


@pytest.mark.parametrize("path", ["/", "/login", "/nowhere", "/api/worklist", "/static/review.css"])
def test_every_answer_carries_the_security_headers(house: House, path: str) -> None:
    for client in (house.browser, house.stranger):
        headers = client.get(path).headers
        assert {name: headers.get(name) for name in SECURITY_HEADERS} == dict(SECURITY_HEADERS)


def test_wrong_passwords_are_refused_then_braked(own_house: House, caplog: pytest.LogCaptureFixture) -> None:
    form = {"name": REVIEWER, "password": "wrong password"}
    with caplog.at_level(logging.WARNING, "edge_agent.review"):
        answers = [own_house.stranger.post("/login", data=form) for _ in range(6)]
    assert [answer.status_code for answer in answers] == [401] * 5 + [429]
    assert "Name or password is wrong" in answers[0].text
    assert answers[5].headers["retry-after"] == "1"
    assert "Too many failed attempts" in answers[5].text
    assert REVIEWER not in caplog.text
    assert "wrong password" not in caplog.text
    right = own_house.stranger.post("/login", data={"name": REVIEWER, "password": PASSWORD})
    assert right.status_code == 429  # even the right one waits


def test_a_new_password_ends_open_sessions(own_house: House) -> None:
    users.add_user(own_house.box.db, REVIEWER, "quite another one", T0)
    assert own_house.browser.get("/").status_code == 303


def test_signing_out(own_house: House) -> None:
    csrf = own_house.browser.get("/api/series/1").json()["csrf"]
    assert own_house.browser.post("/logout", data={"csrf": "x"}).status_code == 403
    assert own_house.browser.post("/logout", data={"csrf": csrf}).status_code == 303
    assert own_house.browser.get("/").status_code == 303


def test_the_worklist_shows_the_newest_first_with_all_a_reader_needs(house: House) -> None:
    told = house.browser.get("/api/worklist").json()
    assert [row["series_no"] for row in told["series"]] == [5, 4, 3, 2, 1]
    assert told["counts"] == {"all": 5, "unread": 2, "reviewed": 1, "abstained": 1, "no-result": 2}
    xr = told["series"][-1]
    assert xr["patient"]["PatientID"] == "WRPH000011"
    assert xr["patient"]["PatientName"].startswith("PHANTOM, ")
    assert xr["result"]["version"] == 1
    assert [row["delivery"]["state"] for row in told["series"]] == ["none", "none", "refused", "pending", "delivered"]
    page = house.browser.get("/").text
    for shown in ("WRPH000011", "nodule", "91 %", "abstained", "accepted", "images are arriving", "could not be read"):
        assert shown in page, shown
    assert "AI result. Not for primary diagnosis." in page


@pytest.mark.parametrize(
    ("show", "expected"),
    [("unread", [2, 1]), ("reviewed", [3]), ("abstained", [2]), ("no-result", [5, 4]), ("all", [5, 4, 3, 2, 1])],
)
def test_filters(house: House, show: str, expected: list[int]) -> None:
    told = house.browser.get(f"/api/worklist?show={show}").json()
    assert [row["series_no"] for row in told["series"]] == expected


@pytest.mark.parametrize("query", ["show=everything", "page=0", "page=x", "page=-1", "page=99999999999", "show=1;--"])
def test_odd_selections_are_refused(house: House, query: str) -> None:
    assert house.browser.get(f"/?{query}").status_code == 422
    assert house.browser.get(f"/api/worklist?{query}").json()["error"]


def test_a_page_beyond_the_last_is_empty(house: House) -> None:
    assert house.browser.get("/api/worklist?page=2").json()["series"] == []


def test_a_series_says_what_was_found_and_what_ran(house: House) -> None:
    told = house.browser.get(f"/api/series/{CT}").json()
    assert told["series"]["result"]["findings"]["abstained"]
    assert [read["slice"] for read in told["slices_read"]] == list(range(8))
    assert sum(read["weight"] for read in told["slices_read"]) == pytest.approx(1.0, abs=1e-4)
    page = house.browser.get(f"/series/{CT}").text
    for shown in ("More than one label is plausible", "phantom-tiny 1.0.0", "CPU", "abababab", "emphysema"):
        assert shown in page, shown
    assert hidden_fields(page)["result_no"] == str(told["result_no"])


def test_a_series_without_a_result_shows_its_image_and_its_state(house: House) -> None:
    page = house.browser.get(f"/series/{FAILED}").text
    assert "Could not be read" in page
    assert "the images differ in size" in page
    assert 'id="grey"' in page
    assert 'id="heat"' not in page
    assert 'name="verdict"' not in page
    assert house.browser.get(f"/series/{WAITING}/heatmap/0.png").status_code == 404


def test_image_and_heatmap_are_of_one_shape(house: House) -> None:
    grey, heat = (
        cv2.imdecode(np.frombuffer(house.browser.get(f"/series/{CT}/{kind}/3.png").content, np.uint8), -1)
        for kind in ("image", "heatmap")
    )
    assert grey.ndim == 2
    assert heat.shape == (*grey.shape, 4)
    assert np.ptp(grey) > 100


def test_the_heatmap_lies_on_the_lesion(house: House) -> None:
    phantom = phantoms.phantom("CT", "nodule", 2)
    z = int(phantom.lesion_ZYX.sum(axis=(1, 2)).argmax())
    png = house.browser.get(f"/series/{CT}/heatmap/{z}.png").content
    alpha_YX = cv2.imdecode(np.frombuffer(png, np.uint8), -1)[..., 3] > 128
    lesion_YX = phantom.lesion_ZYX[z]
    assert (alpha_YX & lesion_YX).sum() / (alpha_YX | lesion_YX).sum() > 0.6


@pytest.mark.parametrize(
    "query", ["center=40", "width=400", "center=a&width=1", "center=0&width=0", "center=nan&width=1"]
)
def test_odd_windows_are_refused(house: House, query: str) -> None:
    assert house.browser.get(f"/series/{CT}/image/0.png?{query}").status_code == 422


@pytest.mark.parametrize(
    "path",
    [
        "/series/99", "/series/99999999999999999999999", "/series/x", "/series/-1", "/series/1/image/9.png",
        "/series/99/image/0.png", "/series/1/image/-1.png", "/series/1/heatmap/1.png", "/static/../review.py",
        "/static/%2e%2e/review.py", "/static/", "/nowhere",
    ],
)  # fmt: skip
def test_what_is_not_there_is_404_in_words(house: House, path: str) -> None:
    answer = house.browser.get(path)
    assert answer.status_code == 404
    assert "no " in answer.text


def test_accepting_is_kept_with_who_and_when(own_house: House) -> None:
    form = hidden_fields(own_house.browser.get(f"/series/{XR}").text)
    answer = own_house.browser.post(f"/series/{XR}/review", data={**form, "verdict": "accepted", "label": "nodule"})
    assert (answer.status_code, answer.headers["location"]) == (303, "/series/1#verdict")
    kept = reviews.history(own_house.box.db, XR)
    assert [(review.verdict, review.label, review.reviewer) for review in kept] == [("accepted", "nodule", REVIEWER)]
    assert kept[0].reviewed_at > T0
    assert own_house.browser.get("/api/worklist?show=reviewed").json()["counts"]["reviewed"] == 2


def test_correcting_for_machines(own_house: House) -> None:
    form = {**form_of(own_house.browser, XR), "verdict": "corrected", "label": "normal"}
    answer = own_house.browser.post(f"/series/{XR}/review", data=form, headers={"accept": "application/json"})
    assert answer.status_code == 200
    assert answer.json() == {"review_no": reviews.history(own_house.box.db, XR)[0].review_no}
    assert "corrected" in own_house.browser.get(f"/series/{XR}").text


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"label": "haemorrhage"}, 422),
        ({"verdict": "perhaps"}, 422),
        ({"verdict": "accepted"}, 422),
        ({"result_no": ""}, 422),
        ({"result_no": "-1"}, 422),
        ({"result_no": "2"}, 409),
        ({"result_no": "9" * 40}, 409),
        ({"csrf": ""}, 403),
        ({"csrf": "ü"}, 403),
        ({"label": "x" * 20_000}, 413),
    ],
)
def test_a_verdict_that_does_not_fit_is_refused_and_nothing_is_kept(
    own_house: House, change: dict[str, str], status: int
) -> None:
    form = {**form_of(own_house.browser, XR), "verdict": "corrected", "label": "normal", **change}
    answer = own_house.browser.post(f"/series/{XR}/review", data=form)
    assert answer.status_code == status
    assert len(answer.text) > 200  # a page that says why
    told = own_house.browser.post(f"/series/{XR}/review", data=form, headers={"accept": "application/json"})
    assert told.json()["error"]
    assert reviews.history(own_house.box.db, XR) == ()


def test_a_form_from_another_site_is_refused(own_house: House) -> None:
    form = {**form_of(own_house.browser, XR), "verdict": "corrected", "label": "normal"}
    for path in (f"/series/{XR}/review", "/login"):
        assert own_house.browser.post(path, data=form, headers={"sec-fetch-site": "cross-site"}).status_code == 403
    assert reviews.history(own_house.box.db, XR) == ()


def test_a_newer_result_makes_the_shown_one_outdated(own_house: House) -> None:
    form = {**form_of(own_house.browser, MR), "verdict": "corrected", "label": "neoplasm"}
    own_house.box.db.execute("UPDATE series SET state = 'due' WHERE series_no = ?", (MR,))
    phantom = phantoms.phantom("MR", "normal", 3)
    own_house.box.read(phantom, MR, {"normal": 0.2, "neoplasm": 0.7, "haemorrhage": 0.1}, at=T0 + 60)
    answer = own_house.browser.post(f"/series/{MR}/review", data=form)
    assert answer.status_code == 409
    assert "newer result (version 2)" in answer.text
    unread = own_house.browser.get("/api/worklist?show=unread").json()["series"]
    assert MR in [row["series_no"] for row in unread]  # the verdict was on version 1
    assert "(result version 1)" in own_house.browser.get(f"/series/{MR}").text


def test_late_images_take_the_heatmap_away_until_they_are_read(own_house: House) -> None:
    ds = dcmread(instances.open(own_house.box.db, own_house.box.data_dir, CT)[0])
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    ds.ImagePositionPatient = [*ds.ImagePositionPatient[:2], -500.0]
    ds.save_as(own_house.box.data_dir / "late.dcm")
    assert own_house.box.receive_file(own_house.box.data_dir / "late.dcm", T0 + 99) == CT
    page = own_house.browser.get(f"/series/{CT}").text
    assert "More images of this series came" in page
    assert 'id="heat"' not in page
    assert own_house.browser.get(f"/series/{CT}/heatmap/0.png").status_code == 404


def test_quarantine_lists_reasons_and_escapes_them(house: House) -> None:
    page = house.browser.get("/quarantine").text
    assert "no DICOM prefix &lt;b&gt;" in page
    assert "CT9" in page
    assert house.browser.get("/api/quarantine").json()["files"][0]["size"] == len(b"not DICOM <script>")


def test_patient_text_is_escaped_and_special_characters_are_read(tmp_path: Path) -> None:
    box = make_box(tmp_path)
    phantom = phantoms.phantom("XR", "normal", 1)
    ds = phantom_dicom.image(phantom, 0, phantom_dicom.SeriesOptions(1, 1, 1))
    ds.PatientName = "Müller<script>^Jörg=x^y"
    ds.SeriesDescription = "<img src=x>"
    ds.save_as(tmp_path / "odd.dcm", enforce_file_format=True)
    series_no = box.receive_file(tmp_path / "odd.dcm", T0)
    with served(box) as url, sign_in(url) as browser:
        for page in (browser.get("/").text, browser.get(f"/series/{series_no}").text):
            assert "Müller&lt;script&gt;, Jörg" in page
            assert "&lt;img src=x&gt;" in page
            assert "<script>," not in page


def test_names_in_more_than_one_character_set_are_read(tmp_path: Path) -> None:
    """The first example of PS3.5 section H.3."""
    box = make_box(tmp_path)
    ds = phantom_dicom.image(phantoms.phantom("XR", "normal", 1), 0, phantom_dicom.SeriesOptions(1, 1, 1))
    ds.SpecificCharacterSet = ["", "ISO 2022 IR 87"]
    ds.PatientName = "=山田^太郎=やまだ^たろう"
    ds.save_as(tmp_path / "kanji.dcm", enforce_file_format=True)
    box.receive_file(tmp_path / "kanji.dcm", T0)
    with served(box) as url, sign_in(url) as browser:
        told = browser.get("/api/worklist").json()
    assert told["series"][0]["patient"]["PatientName"] == "山田, 太郎"


def test_lost_files_leave_the_list_and_the_verdict_usable(own_house: House) -> None:
    for path in instances.open(own_house.box.db, own_house.box.data_dir, CT):
        path.unlink()
    assert own_house.browser.get("/").status_code == 200
    page = own_house.browser.get(f"/series/{CT}")
    assert page.status_code == 200
    assert "notice bad" in page.text
    assert "Your verdict" in page.text
    assert own_house.browser.get(f"/series/{CT}/image/0.png").status_code in (404, 422)


def test_removed_images_are_said_and_the_patient_is_known_from_the_report(own_house: House) -> None:
    box = own_house.box
    name = own_house.browser.get(f"/api/series/{XR}").json()["series"]["patient"]["PatientName"]
    (image,) = instances.open(box.db, box.data_dir, XR)
    shutil.copy(image, box.data_dir / "report.dcm")  # stands for the SR, which has the same patient
    box.db.execute("UPDATE outbox SET path = 'report.dcm' WHERE kind = 'SR' AND result_no = 1")
    assert "Images removed" not in own_house.browser.get(f"/series/{XR}").text
    box.db.execute("INSERT INTO removals VALUES (?, ?, 0)", (XR, T0 + 100))
    retention.remove(box.db, box.data_dir, XR)

    page = own_house.browser.get(f"/series/{XR}").text
    assert "Images removed" in page
    assert "this box kept them for 90 days. They are in the PACS" in page
    assert 'name="verdict"' not in page
    assert "notice bad" not in page
    assert "1 image, removed" in own_house.browser.get("/").text
    told = own_house.browser.get(f"/api/series/{XR}").json()["series"]
    assert (told["patient"]["PatientName"], told["images_removed_at"]) == (name, T0 + 100)
    assert name
    assert own_house.browser.get(f"/series/{XR}/image/0.png").status_code == 404


def test_an_empty_box_says_where_to_send(tmp_path: Path) -> None:
    box = make_box(tmp_path)
    with served(box) as url, sign_in(url) as browser:
        assert "No series has come yet. Send one to WARDROUND, port 11112." in browser.get("/").text
    box.db.execute("DELETE FROM users")
    with served(box) as url:
        assert "edge-agent user add" in httpx.get(f"{url}/login").text
