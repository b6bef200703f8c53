"""The hub page: login, what it shows, and its armour; the last tests drive it in a real browser."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from cloud_hub import dashboard, database
from tests.cloud_hub.hub_support import ADMIN_TOKEN, HttpsHub, make_hub_files, seed_fleet

pytestmark = pytest.mark.slow

PAGES = ["/", "/devices", "/devices/box-n2", "/rounds", "/rounds/round-3", "/releases", "/releases/2", "/refusals"]
CHROMIUM = shutil.which("chromium")


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HttpsHub]:
    hub = HttpsHub(make_hub_files(tmp_path))
    seed_fleet(hub.files, now=hub.now)
    yield hub
    hub.close()


def _login(client: httpx.Client, token: str = ADMIN_TOKEN, wanted: str = "/") -> httpx.Response:
    return client.post("/login", data={"token": token, "next": wanted})


def test_every_page_asks_for_a_login_and_leads_back(hub: HttpsHub) -> None:
    with hub.client() as client:
        for page in PAGES:
            answer = client.get(page)
            assert (answer.status_code, answer.headers["location"]) == (303, f"/login?next={page}")
        assert f'value="{PAGES[2]}"' in client.get("/login", params={"next": PAGES[2]}).text
        answer = _login(client, wanted=PAGES[2])
        assert (answer.status_code, answer.headers["location"]) == (303, PAGES[2])
        cookie = answer.headers["set-cookie"].lower()
        assert all(word in cookie for word in ("httponly", "secure", "samesite=strict", "path=/"))
        assert ADMIN_TOKEN not in cookie
        for page in PAGES:
            assert client.get(page).status_code == 200


def test_a_wrong_token_is_refused_and_seen(hub: HttpsHub) -> None:
    with hub.client() as client:
        answer = _login(client, "wrong")
        assert answer.status_code == 401
        assert "not the admin token" in answer.text
        assert "set-cookie" not in answer.headers
        assert client.post("/login").status_code == 401
        assert client.post("/login", content=b"x" * 10_000).status_code == 413
    assert ("", "login", "wrong admin token at the hub page") in hub.refusals()


def test_a_cookie_ends_with_its_time_with_logout_and_with_another_admin_token(hub: HttpsHub) -> None:
    with hub.client() as client:
        _login(client)
        assert client.post("/logout").status_code == 303
        assert client.get("/").status_code == 303
        _login(client)
        hub.now += hub.config.https.session_hours * 3600 + 1
        assert client.get("/").status_code == 303
    cookie = dashboard.make_cookie("old token", expires_at=2000.0)
    assert dashboard.cookie_is_good(cookie, "old token", now=1000.0)
    assert not dashboard.cookie_is_good(cookie, "new token", now=1000.0)
    assert not dashboard.cookie_is_good("3000." + cookie.partition(".")[2], "old token", now=1000.0)
    for broken in ("", ".", "2000.", "x.y", "2000"):
        assert not dashboard.cookie_is_good(broken, "old token", now=1000.0)


@pytest.mark.parametrize(
    "wanted", ["https://evil.example", "//evil.example", "/\\evil.example", "/a\r\nb", "", "javascript:x"]
)
def test_login_leads_to_this_page_only(wanted: str) -> None:
    assert dashboard.local_path(wanted) == "/"


def test_every_answer_carries_the_armour(hub: HttpsHub) -> None:
    with hub.client() as client:
        for path in ("/", "/login", "/static/hub.css", "/api/v1/devices", "/nothing"):
            headers = client.get(path).headers
            assert "default-src 'none'" in headers["content-security-policy"]
            assert "unsafe" not in headers["content-security-policy"]
            assert headers["x-content-type-options"] == "nosniff"


def test_pages_show_what_the_tables_hold(hub: HttpsHub) -> None:
    with hub.client() as client:
        _login(client)
        overview = client.get("/").text
        for word in ("box-n1", "the disk is nearly full", "round-2", "57% → <strong>88%</strong>", "<svg"):
            assert word in overview
        shown = client.get("/rounds/round-3").text
        for word in ("3 reviewed cases, the plan asks for 8", "1.0 MiB", "390.6 KiB", 'aria-current="step">uploading'):
            assert word in shown
        assert "known-answer batch differs by 0.2" in client.get("/releases/2").text
        assert "replayed sequence 12" in client.get("/refusals").text
        for path in ("/devices/nobody", "/rounds/none", "/releases/99"):
            assert client.get(path).status_code == 404


def test_what_a_stranger_writes_is_shown_as_text(hub: HttpsHub) -> None:
    with hub.files.database.writing() as session:
        database.record_refusal(session, device="<b>x", what="message", reason="<script>alert(1)</script>", now=hub.now)
    with hub.client() as client:
        _login(client)
        text = client.get("/refusals").text
    assert "&lt;script&gt;alert(1)" in text
    assert "<script>alert" not in text
    assert "<b>x" not in text


def test_an_empty_hub_says_what_to_do_next(tmp_path: Path) -> None:
    hub = HttpsHub(make_hub_files(tmp_path))
    try:
        with hub.client() as client:
            _login(client)
            text = client.get("/").text
    finally:
        hub.close()
    assert "fleet site add north" in text
    assert "fleet round start" in text


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_in_a_browser_the_page_logs_in_obeys_its_policy_and_follows_the_fleet(hub: HttpsHub) -> None:
    from playwright.sync_api import sync_playwright

    said: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_context(ignore_https_errors=True).new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(hub.config.url + "/rounds/round-3")
        page.fill("#token", ADMIN_TOKEN)
        page.click("button")
        page.wait_for_url(hub.config.url + "/rounds/round-3")
        assert page.locator("h1").inner_text().split() == ["round-3", "uploading"]
        with hub.files.database.writing() as session:
            session.get_one(database.Round, "round-3").state = "summed"
        page.locator("h1 .state-summed").wait_for()
        page.goto(hub.config.url)
        assert page.locator("svg.plot circle").count() == 6
        assert page.locator("details table").is_hidden()
        page.click("summary")
        assert page.locator("details table").is_visible()
        browser.close()
    assert said == []
