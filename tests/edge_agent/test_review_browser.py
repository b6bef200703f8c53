"""A radiologist's way through the review page in headless Chromium: login, worklist, sliders, keys, correction."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect, sync_playwright

from edge_agent import reviews
from tests.edge_agent.review_support import PASSWORD, REVIEWER, ReviewBox, make_box, served
from tests.edge_agent.test_review import CT, XR, fill

pytestmark = pytest.mark.slow
CHROMIUM = shutil.which("chromium")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReviewBox]:
    made = make_box(tmp_path_factory.mktemp("box"))
    fill(made)
    yield made
    made.db.close()


@pytest.fixture(scope="module")
def url(box: ReviewBox) -> Iterator[str]:
    with served(box) as at:
        yield at


@pytest.fixture
def page(url: str, tmp_path: Path) -> Iterator[Page]:
    """At the login. Anything the page's own policy blocks, or an error in its script, fails the test."""
    if CHROMIUM is None:
        pytest.skip("chromium is not installed (Debian package chromium)")
    complaints: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        opened = browser.new_page(viewport={"width": 1280, "height": 800})
        opened.on("console", lambda said: complaints.append(said.text) if said.type in ("error", "warning") else None)
        opened.on("pageerror", lambda error: complaints.append(str(error)))
        opened.goto(f"{url}/login")
        yield opened
        opened.screenshot(path=tmp_path / "last.png")
        browser.close()
    assert complaints == []


def sign_in(page: Page) -> None:
    page.fill("input[name=name]", REVIEWER)
    page.fill("input[name=password]", PASSWORD)
    page.click("button:has-text('Sign in')")
    expect(page.locator("table.worklist")).to_be_visible()


def open_series(page: Page, series_no: int) -> None:
    page.locator(f'a.row[href="/series/{series_no}"]').click()
    expect(page.locator("#viewer[data-shown]")).to_be_visible()


def shown(page: Page) -> int:
    return int(page.locator("#viewer").get_attribute("data-shown") or -1)


def test_login_worklist_sliders_correction_verdict(page: Page, box: ReviewBox) -> None:
    sign_in(page)
    open_series(page, CT)
    expect(page.locator("p.caution")).to_have_text("AI result. Not for primary diagnosis.")
    expect(page.locator(".finding .badge")).to_have_text("abstained")

    page.locator("#slice").fill("1")
    expect(page.locator("#viewer")).to_have_attribute("data-shown", "1")
    expect(page.locator("#grey")).to_have_attribute("alt", "Slice 2 of 8")
    expect(page.locator("#where")).to_contain_text("2 / 8")

    page.locator("#opacity").fill("80")
    assert page.locator("#heat").evaluate("image => image.style.opacity") == "0.8"
    assert page.locator("#heat").evaluate("image => image.naturalWidth > 1")

    page.locator("label.choice", has_text="emphysema").click()
    page.click("button:has-text('Correct')")
    expect(page.locator("p.given")).to_contain_text(f"corrected to emphysema by {REVIEWER}")
    expect(page.locator("ol.history li")).to_have_count(1)
    assert [review.label for review in reviews.history(box.db, CT)] == ["emphysema"]

    page.click("nav a:has-text('Worklist')")
    expect(page.locator("table.worklist tr", has_text="to emphysema")).to_have_count(1)


def test_keys_wheel_and_attention_bar_move_through_the_slices(page: Page) -> None:
    sign_in(page)
    open_series(page, CT)
    for key, expected in (("Home", 0), ("ArrowRight", 1), ("ArrowUp", 2), ("ArrowLeft", 1), ("ArrowLeft", 0), ("ArrowLeft", 0), ("End", 7), ("PageDown", 6)):  # fmt: skip
        page.keyboard.press(key)
        expect(page.locator("#viewer")).to_have_attribute("data-shown", str(expected))
    page.locator("#viewer").hover()
    page.mouse.wheel(0, 100)
    expect(page.locator("#viewer")).to_have_attribute("data-shown", "7")
    box = page.locator("#attention").bounding_box()
    assert box
    page.mouse.click(box["x"] + box["width"] * 2.5 / 8, box["y"] + 10)
    expect(page.locator("#viewer")).to_have_attribute("data-shown", "2")
    assert page.locator("#slice").input_value() == "2"


def test_windows_invert_and_heatmap_on_and_off(page: Page) -> None:
    sign_in(page)
    open_series(page, CT)
    lung = page.locator("button.window", has_text="Lung")
    lung.click()
    expect(lung).to_have_attribute("aria-pressed", "true")
    expect(page.locator("#level")).to_have_text("L -600 · W 1500")
    expect(page.locator("#grey[src*='center=-600&width=1500']")).to_be_visible()
    page.locator("#viewer").hover()
    page.mouse.down()
    page.mouse.move(700, 500, steps=4)
    page.mouse.up()
    expect(page.locator("#level")).not_to_have_text("L -600 · W 1500")
    page.locator("#viewer").dblclick()
    expect(page.locator("button.window").first).to_have_attribute("aria-pressed", "true")
    page.click("#invert")
    expect(page.locator("#viewer")).to_have_class("inverted")
    page.keyboard.press("h")
    assert page.locator("#opacity").input_value() == "0"
    page.keyboard.press("h")
    assert page.locator("#opacity").input_value() == "45"


def test_an_x_ray_has_no_slice_slider_and_can_be_accepted(page: Page) -> None:
    sign_in(page)
    open_series(page, XR)
    assert page.locator("#slice").count() == 0
    page.keyboard.press("ArrowRight")
    assert shown(page) == 0
    page.click("button:has-text('Accept nodule')")
    expect(page.locator("p.given")).to_contain_text(f"accepted by {REVIEWER}")


@pytest.mark.parametrize("size", [(1280, 800), (390, 844)])
def test_the_whole_image_is_shown_and_the_heatmap_lies_upon_it(page: Page, url: str, size: tuple[int, int]) -> None:
    page.set_viewport_size({"width": size[0], "height": size[1]})
    sign_in(page)
    for series_no in (CT, XR):
        page.goto(f"{url}/series/{series_no}")
        expect(page.locator("#viewer[data-shown]")).to_be_visible()
        frame, grey, heat = (page.locator(name).bounding_box() for name in ("#viewer", "#grey", "#heat"))
        assert frame == grey == heat
        assert page.locator("#grey").evaluate("image => getComputedStyle(image).objectFit") == "contain"


def test_a_slice_that_cannot_be_fetched_is_never_shown_as_another(page: Page) -> None:
    sign_in(page)
    # Before the page opens: it fetches the other slices ahead.
    page.route("**/image/7.png?*", lambda route: route.fulfill(status=200, content_type="image/png", body="broken"))
    open_series(page, CT)
    page.keyboard.press("End")
    expect(page.locator("#where")).to_contain_text("slice 8: no image came")
    expect(page.locator("#grey")).to_be_hidden()
    expect(page.locator("#heat")).to_be_hidden()
    page.keyboard.press("Home")
    expect(page.locator("#grey")).to_be_visible()


def test_a_correction_needs_a_label(page: Page, box: ReviewBox) -> None:
    sign_in(page)
    open_series(page, XR)
    before = len(reviews.history(box.db, XR))
    page.click("button:has-text('Correct')")
    assert page.locator("input[name=label]").first.evaluate("choice => !choice.checkValidity()")
    assert len(reviews.history(box.db, XR)) == before


@pytest.mark.parametrize("width", [1280, 800, 390])
def test_no_page_scrolls_sideways(page: Page, url: str, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    sign_in(page)
    for path in ("/", f"/series/{CT}", f"/series/{XR}", "/series/5", "/quarantine"):
        page.goto(url + path)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, path
