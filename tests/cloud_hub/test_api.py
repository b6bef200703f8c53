"""The API over real TLS: what operators may do, and what each wrong request is told."""

import shutil
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import select

from cloud_hub import database
from cloud_hub.releases import SUFFIX
from fleet_link import tokens
from models.bundle import SHIPPED
from tests.cloud_hub.hub_support import ADMIN_TOKEN, HttpsHub, make_hub_files, seed_fleet

pytestmark = pytest.mark.slow


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HttpsHub]:
    hub = HttpsHub(make_hub_files(tmp_path))
    yield hub
    hub.close()


@pytest.fixture
def seeded(hub: HttpsHub) -> HttpsHub:
    seed_fleet(hub.files, now=hub.now)
    return hub


def _get(hub: HttpsHub, path: str) -> Any:
    with hub.admin() as admin:
        answer = admin.get(f"/api/v1{path}")
    assert answer.status_code == 200, answer.text
    return answer.json()


def _post(hub: HttpsHub, path: str, body: object = None) -> httpx.Response:
    with hub.admin() as admin:
        return admin.post(f"/api/v1{path}", json=body)


def test_a_site_and_a_device_are_added_and_the_token_is_one_that_boxes_read(hub: HttpsHub) -> None:
    assert _post(hub, "/sites", {"site": "north"}).status_code == 201
    added = _post(hub, "/devices", {"device": "box-a", "site": "north"}).json()
    assert tokens.parse(added["token"]).device == "box-a"
    assert added["command"] == f"edge-agent enroll {added['token']}"
    assert hub.reloads == 1
    assert "user box-a\n" in (hub.config.paths.broker / "acl").read_text()
    again = _post(hub, "/devices/box-a/token").json()
    assert again["token"] != added["token"]
    assert [(row["device"], row["state"]) for row in _get(hub, "/devices")["devices"]] == [("box-a", "awaited")]
    assert [(row["site"], row["devices"]) for row in _get(hub, "/sites")["sites"]] == [("north", 1)]


def test_without_the_admin_token_nothing_is_told_or_done(hub: HttpsHub) -> None:
    headers = [None, "Bearer", "Bearer wrong", "Basic dGVzdA==", "Bearer test-admin-toke", "Bearer ä"]
    calls = [("GET", "/devices"), ("POST", "/sites"), ("POST", "/devices/box-a/revoke")]
    with hub.client() as client:
        for header in headers:
            for method, path in calls:
                given = {} if header is None else {"authorization": header.encode()}
                answer = client.request(method, f"/api/v1{path}", headers=given)
                assert (answer.status_code, set(answer.json())) == (401, {"error", "advice"})
    assert hub.refusals() == [("", "api", "wrong admin token")]


def test_revoking_reaches_registry_and_broker(seeded: HttpsHub) -> None:
    seeded.files.write_access()
    assert _post(seeded, "/devices/box-n1/revoke").json()["state"] == "revoked"
    assert seeded.reloads == 1
    assert "user box-n1\n" not in (seeded.config.paths.broker / "acl").read_text()
    assert _post(seeded, "/devices/box-n1/revoke").status_code == 201
    refused = _post(seeded, "/devices/box-n1/token")
    assert (refused.status_code, refused.json()["error"]) == (409, "device box-n1 is revoked")


def test_the_states_of_devices(seeded: HttpsHub) -> None:
    states = {row["device"]: row["state"] for row in _get(seeded, "/devices")["devices"]}
    assert states == {"box-n1": "online", "box-n2": "online", "box-s1": "away", "box-old": "revoked"}
    assert _get(seeded, "/status")["devices"] == {"away": 1, "online": 2, "revoked": 1}
    shown = _get(seeded, "/devices/box-n2")
    assert shown["alarms"] == ["the disk is nearly full"]
    assert [row["release_version"] for row in shown["releases"]] == [2]


def test_an_expired_certificate_shows_on_a_silent_device(hub: HttpsHub, tmp_path: Path) -> None:
    hub.files.add_device("box-a")
    hub.files.device_files(tmp_path, "box-a", days=1)
    hub.now += 2 * 86400
    assert _get(hub, "/devices/box-a")["state"] == "expired"


def test_a_certificate_that_ends_soon_is_an_alarm_on_api_and_page(hub: HttpsHub, tmp_path: Path) -> None:
    for device, days in (("box-a", 31), ("box-b", 2), ("box-c", 2)):
        hub.files.add_device(device)
        hub.files.device_files(tmp_path, device, days=days)
    hub.now += 1800.0
    assert _post(hub, "/devices/box-c/revoke").status_code == 201
    rows = {row["device"]: row for row in _get(hub, "/devices")["devices"]}
    assert rows["box-a"]["certificate_ends_at"] > hub.now + 30 * 86400
    assert [len(rows[device]["alarms"]) for device in ("box-a", "box-b", "box-c")] == [0, 1, 0]
    assert "certificate ends in 47 hours" in rows["box-b"]["alarms"][0]
    with hub.client(follow_redirects=True) as browser:
        page = browser.post("/login", data={"token": ADMIN_TOKEN, "next": "/devices/box-b"}).text
    assert "certificate ends in 47 hours" in page
    assert "Certificate ends" in page


def test_a_flood_of_wrong_tokens_writes_a_few_rows(hub: HttpsHub) -> None:
    with hub.client() as client:
        for _ in range(30):
            assert client.get("/api/v1/devices").status_code == 401
            assert client.post("/login", data={"token": "wrong"}).status_code == 401
    hub.context.strangers.tell()
    with hub.files.database.reading() as session:
        counts = {row.what: row.count for row in session.query(database.Refusal)}
    assert counts == {"api": 10, "login": 10, "strangers": 40}


def test_a_body_that_breaks_off_is_no_defect_of_ours(hub: HttpsHub, caplog: pytest.LogCaptureFixture) -> None:
    trust = ssl.create_default_context(cafile=str(hub.config.paths.ca_certificate))
    with caplog.at_level("ERROR"):
        for _ in range(3):
            plain = socket.create_connection(("127.0.0.1", hub.config.https.port))
            with trust.wrap_socket(plain, server_hostname="localhost") as stranger:
                stranger.sendall(b"POST /api/v1/sites HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\nabc")
        hub.close()  # waits for what is under way
    assert caplog.records == []


def test_a_round_shows_each_device_with_state_reason_and_bytes(seeded: HttpsHub) -> None:
    row = _get(seeded, "/rounds/round-3")
    assert row["device_states"] == {"delivered": 1, "joined": 1, "declined": 1}
    members = {member["device"]: member for member in row["members"]}
    assert members["box-n1"]["bytes_received"] == 1_048_576
    assert (members["box-n2"]["bytes_received"], members["box-n2"]["bytes_expected"]) == (400_000, 1_000_000)
    assert members["box-s1"]["reason"] == "3 reviewed cases, the plan asks for 8"
    assert [r["round_id"] for r in _get(seeded, "/rounds")["rounds"]] == ["round-3", "round-2", "round-1"]
    assert _get(seeded, "/rounds/round-1")["release_version"] == 2


def test_a_round_is_started_with_what_is_given_over_the_hubs_defaults(seeded: HttpsHub, tmp_path: Path) -> None:
    wish = {"kind": "unsafe_open", "epochs": 3, "devices": ["box-n1", "box-s1"]}
    for device in wish["devices"]:
        seeded.files.device_files(tmp_path, device)
    busy = _post(seeded, "/rounds", wish)
    assert (busy.status_code, busy.json()["error"]) == (409, "round round-3 is on (uploading)")
    with seeded.files.database.writing() as session:
        session.get_one(database.Round, "round-3").state = "dropped"
        bases = session.scalars(select(database.Release.bundle_digest)).all()
    seeded.files.config.paths.releases.mkdir(exist_ok=True)
    for digest in bases:
        shutil.copy(SHIPPED, seeded.files.config.paths.releases / f"{digest}{SUFFIX}")
    assert _post(seeded, "/rounds", {}).status_code == 409  # masked: two boxes are too few for it
    unknown = _post(seeded, "/rounds", wish | {"devices": ["box-n1", "nobody"]})
    assert (unknown.status_code, "nobody" in unknown.json()["error"]) in ((404, True), (409, True))
    started = _post(seeded, "/rounds", wish)
    assert started.status_code == 201, started.text
    row = started.json()
    assert (row["epochs"], row["min_examples"], row["state"]) == (3, seeded.config.rounds.min_examples, "invited")
    assert [member["device"] for member in row["members"]] == ["box-n1", "box-s1"]
    assert _get(seeded, f"/rounds/{row['round_id']}")["base_digest"] == "a" * 64  # release 2 is with its canaries only
    assert (row["buffer"], row["stale_max"]) == (0, None)
    _post(seeded, f"/rounds/{row['round_id']}/drop", {})
    buffered = _post(seeded, "/rounds", wish | {"buffer": 2, "stale_max": 3}).json()
    assert (buffered["buffer"], buffered["stale_max"]) == (2, 0)  # there is no older release


def test_accuracy_is_summed_over_boxes_and_sites(seeded: HttpsHub) -> None:
    row = _get(seeded, "/releases/2")
    assert (row["accuracy"]["heldout"], row["accuracy"]["correct_before"], row["accuracy"]["correct_after"]) == (
        40,
        23,
        35,
    )
    assert row["sites"]["north"] == {
        "heldout": 20,
        "correct_before": 11,
        "correct_after": 17,
        "before": 0.55,
        "after": 0.85,
    }
    assert row["outcomes"] == {"activated": 2, "refused": 1}
    [judged] = _get(seeded, "/accuracy")["accuracy"]
    assert judged["total"]["after"] == 35 / 40
    assert [r["release_version"] for r in _get(seeded, "/releases")["releases"]] == [2, 1]


def test_refusals_are_shown_latest_first(seeded: HttpsHub) -> None:
    assert [row["reason"] for row in _get(seeded, "/refusals")["refusals"]] == [
        "certificate verify failed",
        "replayed sequence 12",
    ]


@pytest.mark.parametrize("path", ["/devices/nobody", "/rounds/none", "/releases/99", "/nothing", "/releases/x"])
def test_what_is_not_there_is_404_in_json(seeded: HttpsHub, path: str) -> None:
    with seeded.admin() as admin:
        answer = admin.get(f"/api/v1{path}")
    assert answer.status_code == 404
    assert answer.json()["error"]


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/sites", {"site": 3}, "Expected `str`"),
        ("/sites", {"site": "x", "more": 1}, "unknown field `more`"),
        ("/sites", {}, "missing required field `site`"),
        ("/sites", [], "Expected `object`"),
        ("/rounds", {"epochs": 0}, ">= 1"),
        ("/rounds", {"clip_norm": -1}, "> 0"),
        ("/rounds", {"rule": "loudest"}, "Invalid enum value 'loudest'"),
        ("/rounds", {"buffer": 1001}, "<= 1000"),
        ("/rounds", {"buffer": 3, "stale_max": 16}, "<= 15"),
    ],
)
def test_a_wrong_body_is_400_with_the_field(hub: HttpsHub, path: str, body: object, words: str) -> None:
    answer = _post(hub, path, body)
    assert answer.status_code == 400
    assert words in answer.json()["error"]


def test_bytes_that_are_no_json_and_a_huge_body_are_refused(hub: HttpsHub) -> None:
    with hub.admin() as admin:
        assert admin.post("/api/v1/sites", content=b"{").status_code == 400
        assert admin.post("/api/v1/sites", content=b"\xff").status_code == 400
        assert admin.post("/api/v1/sites", content=b" " * 100_000).status_code == 413
        assert admin.delete("/api/v1/sites").status_code == 405


def test_a_conflict_is_409_and_changes_nothing(hub: HttpsHub) -> None:
    _post(hub, "/sites", {"site": "north"})
    again = _post(hub, "/sites", {"site": "north"})
    assert (again.status_code, again.json()["error"]) == (409, "site north exists already")
    nowhere = _post(hub, "/devices", {"device": "box-a", "site": "south"})
    assert (nowhere.status_code, nowhere.json()["advice"]) == (404, "fleet site add south")
    assert hub.reloads == 0
