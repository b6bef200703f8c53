"""The accuracy plot: right numbers in the right places, and nothing that a page's security policy refuses."""

import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest

from cloud_hub import plot
from cloud_hub.plot import Line, Point


def _accuracy(heldout: int, before: int, after: int) -> dict[str, int]:
    return {"heldout": heldout, "correct_before": before, "correct_after": after}


def _row(version: int, total: tuple[int, int, int], **sites: tuple[int, int, int]) -> dict[str, object]:
    return {
        "release_version": version,
        "total": _accuracy(*total),
        "sites": {site: _accuracy(*of_site) for site, of_site in sites.items()},
    }


def test_lines_begin_with_what_the_first_release_replaced() -> None:
    ticks, lines = plot.lines(
        [_row(2, (30, 15, 24), north=(10, 5, 8), south=(20, 10, 16)), _row(3, (10, 8, 9), north=(10, 8, 9))]
    )
    assert ticks == ["before v2", "v2", "v3"]
    assert lines == [
        Line("north", (Point(5, 10), Point(8, 10), Point(9, 10))),
        Line("south", (Point(10, 20), Point(16, 20), None)),
        Line(plot.ALL_SITES, (Point(15, 30), Point(24, 30), Point(9, 10))),
    ]


def test_a_site_that_joins_later_starts_later() -> None:
    _, lines = plot.lines(
        [_row(2, (10, 5, 8), north=(10, 5, 8)), _row(3, (20, 9, 18), north=(10, 5, 9), south=(10, 4, 9))]
    )
    assert lines[1] == Line("south", (None, None, Point(9, 10)))


def test_nothing_judged_gives_nothing() -> None:
    assert plot.lines([]) == ([], [])
    assert plot.accuracy_svg([], []) == ""


def test_points_stand_at_their_height_and_say_their_numbers() -> None:
    svg = plot.accuracy_svg(["before v2", "v2"], [Line("north", (Point(5, 10), Point(10, 10)))])
    circles = [element for element in ET.fromstring(svg).iter() if element.tag.endswith("circle")]
    bottom, top = float(circles[0].attrib["cy"]), float(circles[1].attrib["cy"])
    assert top == plot.TOP
    assert bottom == pytest.approx(plot.TOP + (plot.HEIGHT - plot.TOP - plot.BOTTOM) * (0.5 - 0.25) / 0.75 * 2, abs=0.1)
    assert [circle[0].text for circle in circles] == ["north: 5 of 10 right, 50.0%", "north: 10 of 10 right, 100.0%"]


def test_names_are_escaped_and_no_style_or_script_is_used() -> None:
    svg = str(plot.accuracy_svg(["a", "b"], [Line("<script>", (Point(1, 2), Point(2, 2)))]))
    assert "<script" not in svg
    assert "style=" not in svg


def test_labels_of_equal_ends_do_not_overlap_nor_leave_the_picture() -> None:
    lines = [Line(f"site-{number}", (Point(0, 10), Point(0, 10))) for number in range(6)]
    svg = ET.fromstring(plot.accuracy_svg(["a", "b"], lines))
    heights = sorted(float(e.attrib["y"]) for e in svg.iter() if e.attrib.get("class", "").startswith("name"))
    assert len(heights) == 6
    assert all(second - first >= 15.9 for first, second in pairwise(heights))
    assert heights[-1] <= plot.HEIGHT


def test_a_single_release_many_sites_and_many_releases_are_drawn() -> None:
    many = [Line(f"s{number}", tuple(Point(number % 7, 7) for _ in range(40))) for number in range(30)]
    svg = ET.fromstring(plot.accuracy_svg([f"v{number}" for number in range(40)], many))
    axis = [element for element in svg.iter() if element.attrib.get("class") == "axis"]
    assert len(axis) <= 5 + 13
    groups = [element.attrib["class"] for element in svg.iter() if element.tag.endswith("}g")]
    assert groups.count("site-other") == 30 - plot.SITES_COLOURED
    assert "circle" in plot.accuracy_svg(["v1"], [Line("north", (Point(1, 2),))])


def test_bars_hold_their_share() -> None:
    assert 'width="40.0"' in plot.bar_svg(400, 1000)
    assert 'width="100.0"' in plot.bar_svg(2000, 1000)
    assert 'width="0.0"' in plot.bar_svg(0, 0)
